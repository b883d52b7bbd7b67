"""Benchmarks: what we measure ourselves with, and against what. Nothing here is installed.

`gateway` is the table of `make bench-gateway`, `engines` that of `make bench`. `lakes` makes data,
`servers` starts what is measured, `load` asks it, `table` shows what came out.
"""
