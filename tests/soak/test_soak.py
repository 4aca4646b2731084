"""Each case of the soak tests, for a few seconds: `python -m soak` runs them for long."""

from __future__ import annotations

import pytest

from soak.cases import CASES, Case
from soak.tally import Tally


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_soak(case: Case) -> None:
    tally = Tally(seed=1)
    case.function(case.short, tally)
    assert tally.rounds >= 1
    assert tally.is_clean, (tally.failures, tally.leaks)
