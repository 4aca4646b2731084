"""How often what is random, or races, is tried.

The counts in the tests are those that found the faults, or showed that they were mended. `make
test` tries a fifth of them, so that it ends in minutes; TEST_EFFORT=1, as `make test-all` has it,
tries them all, and TEST_EFFORT=10 ten times as many.
"""

from __future__ import annotations

import os

_EFFORT = float(os.environ.get("TEST_EFFORT", "0.2"))


def rounds(count: int) -> int:
    return max(1, round(count * _EFFORT))
