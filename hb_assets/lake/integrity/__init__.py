"""Checks of the lake's files, and what is known to be damaged or lost."""
