"""How often what is random, or races, is tried.

The counts in the tests are those that found the faults, or showed that they were mended. `make
test` tries a fifth of them, so that it ends in minutes; TEST_EFFORT=1, as `make test-all` has it,
tries them all, and TEST_EFFORT=10 ten times as many.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sized

_EFFORT = float(os.environ.get("TEST_EFFORT", "0.2"))


def rounds(count: int) -> int:
    return max(1, round(count * _EFFORT))


def rounds_until(count: int, struck: Sized, enough: int) -> Iterator[None]:
    """So many, and more as long as chance has not struck often enough: machines differ in speed."""
    for number in range(20 * count):
        if number >= rounds(count) and len(struck) >= enough:
            return
        yield
