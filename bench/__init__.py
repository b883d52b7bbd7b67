"""Benchmarks of the project against floors and alternatives. Nothing here is installed.

`gateway` is the table of `make bench-gateway`, `engines` that of `make bench`: its parts are
`drains`, `consolidating`, `whole` and `control_room`. `traffic` generates heartbeats, `lakes` and
`backlogs` store them, `servers` starts what is measured, `load`, `posting` and `pace` send
requests, `measure` gives a function a process of its own, `table` shows the results. `decoding` and
`request` are studies of one thing each.
"""
