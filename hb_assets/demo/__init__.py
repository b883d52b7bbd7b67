"""A simulated fleet of wearables, whose traffic `hb up` sends as its sample."""
