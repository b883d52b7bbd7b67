"""Decoding of the buffer's entries into rows, with crashing entries isolated in a child process."""
