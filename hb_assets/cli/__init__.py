"""The command line `hb`: each module holds one command, or a few that belong together.

Arguments, progress, tables, exit codes, and the supervision of `hb up`; the layers below do the
work. `dagster` is never imported: the commands talk to it over HTTP.
"""
