"""How the lake's files are named, written durably, locked, verified and read."""
