"""The command line `hb`: each module holds one command, or a few that belong together.

Belongs here: arguments, progress, tables, exit codes, and the supervision of `hb up`. Doesn't
belong here: the work itself, which the layers below do. `dagster` is never imported: the commands
talk to it over HTTP.
"""
