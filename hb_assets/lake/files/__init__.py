"""The kinds of file in the lake: a module each, with its footer or its JSON."""
