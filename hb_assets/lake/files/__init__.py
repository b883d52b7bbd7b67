"""The kinds of file in the lake, a module each, with their footer metadata or their JSON."""
