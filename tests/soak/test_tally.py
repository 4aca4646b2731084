"""What a soak test notes is an error at once in a short run, and counted in a long one."""

from __future__ import annotations

import pytest

from soak.tally import MAX_NOTES, Tally, TooMuchWentWrongError


def test_a_short_run_stops_at_once() -> None:
    tally = Tally(seed=7)
    with pytest.raises(AssertionError, match="round 0 of seed 7: it broke"):
        tally.failure("it broke")
    with pytest.raises(AssertionError, match="threads: 3 before, 5 after"):
        tally.leak("threads", 3, 5, allowed=1)
    with pytest.raises(AssertionError, match="the deadline was -1"), tally.deadline(-1.0):
        pass


def test_a_long_run_counts_and_goes_on_but_not_for_ever() -> None:
    rounds: list[int] = []
    tally = Tally(is_long=True, on_round=lambda: rounds.append(tally.rounds))
    assert tally.is_clean
    tally.round(0.25)
    tally.round()
    assert (tally.worst_over_s, rounds) == (0.25, [1, 2])
    tally.leak("threads", 3, 3)
    assert tally.is_clean
    for _ in range(MAX_NOTES - 1):
        tally.failure("it broke")
    assert len(tally.failures) == MAX_NOTES - 1
    with pytest.raises(TooMuchWentWrongError):
        tally.failure("it broke")
    assert not tally.is_clean
