"""Compaction of fragments into consolidated files: when, from which inputs, merging, pruning."""
