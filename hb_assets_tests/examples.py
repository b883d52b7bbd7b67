"""How many examples a costly property gets: a usual run's number, more in `make test-long`."""

from __future__ import annotations

from hypothesis import settings

_USUAL = 100
"""Examples of a property that names no number, in the profile of a usual run."""


def examples(usual: int) -> int:
    """`usual`, times what the profile gives more than a usual run's."""
    return usual * settings().max_examples // _USUAL
