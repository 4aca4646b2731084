"""What a case of the soak tests found."""

from __future__ import annotations

import gc
import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: a long run goes on after a failure, but not for ever
MAX_NOTES = 50
#: what two busy cores need to schedule a few processes, on top of a fifth of the deadline
SCHEDULING_S = 0.1


class TooMuchWentWrongError(AssertionError):
    """A long run has MAX_NOTES failures or leaks: there is no use in going on."""


class Tally:
    """Counts rounds and notes what went wrong: raised at once, except in a long run."""

    def __init__(
        self, seed: int = 1, *, is_long: bool = False, on_round: Callable[[], object] | None = None
    ) -> None:
        self.seed = seed
        self.is_long = is_long
        self.rounds = 0
        self.failures: list[str] = []
        self.leaks: list[str] = []
        #: by how much the slowest call exceeded its deadline; negative when none did
        self.worst_over_s = float("-inf")
        self._on_round = on_round

    def round(self, seconds_over_deadline: float = 0.0) -> None:
        """One round is done. Seconds below zero, or none, are within the deadline."""
        self.rounds += 1
        self.worst_over_s = max(self.worst_over_s, seconds_over_deadline)
        if self._on_round is not None:
            self._on_round()

    def failure(self, what: str) -> None:
        """Notes what went wrong in this round; raises AssertionError unless the run is long."""
        self._note(self.failures, what)

    def leak(self, what: str, before: float, after: float, allowed: float = 0) -> None:
        """Notes a leak if `after` is more than `before` and what is allowed; else does nothing."""
        if after - before > allowed:
            self._note(self.leaks, f"{what}: {before:g} before, {after:g} after")

    @contextmanager
    def deadline(self, seconds: float) -> Iterator[None]:
        """What is under it is a failure if it takes longer than the deadline and a fifth."""
        begun = time.monotonic()
        try:
            yield
        finally:
            took = time.monotonic() - begun
            self.worst_over_s = max(self.worst_over_s, took - seconds)
        if took > 1.2 * seconds + SCHEDULING_S:
            self.failure(f"took {took:.3f} s, the deadline was {seconds:.3f} s")

    @property
    def is_clean(self) -> bool:
        return not self.failures and not self.leaks

    def _note(self, notes: list[str], what: str) -> None:
        text = f"round {self.rounds} of seed {self.seed}: {what}"
        notes.append(text)
        if not self.is_long:
            raise AssertionError(text)
        if len(notes) >= MAX_NOTES:
            raise TooMuchWentWrongError(f"{len(notes)} notes, the last one: {text}")


def descriptors(pid: int | str = "self") -> int:
    """How many files a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def threads(pid: int | str = "self") -> int:
    """How many threads a process has."""
    return len(os.listdir(f"/proc/{pid}/task"))


def resident_nbytes(pid: int | str = "self") -> int:
    """How much memory of a process is resident; of this one after its garbage is collected.

    Without what is mapped from files: a kernel that takes away idle pages (DAMON) takes those, and
    they come back, 34 MB in a run of CI.
    """
    if pid == "self":
        gc.collect()
    with open(f"/proc/{pid}/status") as file:
        ours = [line.split()[1] for line in file if line.startswith(("RssAnon:", "RssShmem:"))]
    return sum(map(int, ours)) * 1024
