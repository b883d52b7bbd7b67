"""Benchmarks: what we measure ourselves with, and against what. Nothing here is installed.

`gateway` is the table of `make bench-gateway`, `engines` that of `make bench`: its parts are
`drains`, `consolidating`, `whole` and `control_room`. `traffic` says what comes in, `lakes` and
`backlogs` keep it, `servers` starts what is measured, `load` and `pace` ask it, `measure` gives a
function a process of its own, `table` shows what came out. `decoding` and `request` are studies of
one thing each.
"""
