"""Fragments into consolidated files: when, out of what, the merge, and pruning what is left."""
