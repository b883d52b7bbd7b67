"""Fault-injection tests: real processes, killed and paused at named points, and a strict count.

    make chaos                  200 kills and 2 million acknowledged heartbeats; 15 minutes at most
    make chaos ARGS=--short     what CI runs; under 2 minutes

Not a part of the package. `points` is the catalogue of named points and `victim` the launcher that
makes a process die at one of them; `load` sends and remembers what was acknowledged, `proxy` loses
answers, `members`, `buffer_server` and `director` run the processes and inject the faults,
`checker` reads the lake with plain DuckDB, `report` shows the outcome. The last run's figures are
in docs/reliability.md.
"""
