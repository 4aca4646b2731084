"""Resharding against the naive copy: exactly the bytes asked for arrive, each of them once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layout_cases import Case

if TYPE_CHECKING:
    from random import Random


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.randoms(use_true_random=False))
def test_any_layout_goes_to_any_layout_as_a_naive_copy_would(rng: Random) -> None:
    Case.random(rng).check()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.randoms(use_true_random=False))
def test_each_source_pushes_what_it_has_and_touches_nothing_else(rng: Random) -> None:
    Case.random(rng).check_pushes()
