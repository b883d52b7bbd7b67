"""Entries of the buffer into rows: decoding, and isolating what kills a decoder."""
