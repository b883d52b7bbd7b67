"""Mutation tests: lines of the code changed one at a time, each with the test that must fail.

    make mutants                 all of them, ten minutes
    make mutants ARGS=--short    a quarter of them, another one each day, as in CI

Not a part of the package. `catalogue` says what is changed, `__main__` changes it in a copy.
"""
