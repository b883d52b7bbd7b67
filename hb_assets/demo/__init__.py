"""What `hb up` shows itself with: a simulated fleet of wearables."""
