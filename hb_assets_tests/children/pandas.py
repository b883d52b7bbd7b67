"""No pandas in the processes that tests start, as where nobody installed it.

It is there for tests of readers alone. pyarrow and pandera import it where they find it: a third of
a second in each process.
"""

from __future__ import annotations

raise ModuleNotFoundError("No module named 'pandas'", name="pandas")  # pandera looks at the words
