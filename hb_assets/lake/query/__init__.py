"""Queries of one user's heart rate: the files that hold it, its rows, their means over time."""
