"""What a test says about time: how long something may take, and that something comes true soon."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def takes_at_most(seconds: float) -> Iterator[None]:
    """Fails the test when the block under it takes longer; an error of the block goes first."""
    begun = time.monotonic()
    yield
    took = time.monotonic() - begun
    assert took <= seconds, f"took {took:.3f} s, allowed are {seconds:.3f} s"


#: between two looks. Who looks without a pause keeps a processor, and, yielding it by
#: `sched_yield`, the kernel's own work from it: packets on the loopback waited for half a second
_PAUSE_S = 1e-3


def eventually(check: Callable[[], bool], within_s: float = 5.0) -> bool:
    """Whether `check` comes true in time: for what another process learns of a little later."""
    end = time.monotonic() + within_s
    while not check():
        if time.monotonic() > end:
            return False
        time.sleep(_PAUSE_S)
    return True
