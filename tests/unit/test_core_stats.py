"""core.stats by example: histograms, and what others are told."""

from __future__ import annotations

import pytest

from llm_datadist.core import messages as m
from llm_datadist.core.stats import (
    BOUNDS_S,
    MAX_TOLD,
    ClusterStats,
    HeldKey,
    Histogram,
    LinkStats,
    OperationStats,
    PoolStats,
)


def histogram(**counts: int) -> Histogram:
    """By bucket: `b3=2` is two times in bucket 3."""
    filled = [counts.get(f"b{index}", 0) for index in range(len(BOUNDS_S) + 1)]
    return Histogram(tuple(filled), float(sum(filled)))


def operation(name: str, nbytes: int) -> OperationStats:
    empty = Histogram()
    return OperationStats(name, 1, "tcp", 1, (), nbytes, 1, empty, empty, empty, empty)


def cluster(**fields: object) -> ClusterStats:
    return ClusterStats(1, 1.0, 0, 0, 0, True, **fields)  # type: ignore[arg-type]


def test_a_histogram_without_entries_has_no_quantiles() -> None:
    assert Histogram().quantile_s(0.5) is None


@pytest.mark.parametrize(
    ("fraction", "expected_s"), [(0.25, 0.5e-6), (0.5, 1e-6), (0.75, 7.5e-6), (1.0, 10e-6)]
)
def test_quantiles_are_interpolated_within_a_bucket(fraction: float, expected_s: float) -> None:
    times = histogram(b0=2, b3=2)  # up to 1 us, and from 5 to 10
    assert times.quantile_s(fraction) == pytest.approx(expected_s)


def test_what_is_beyond_the_last_bound_counts_as_that() -> None:
    assert histogram(b22=5).quantile_s(0.99) == BOUNDS_S[-1]


def test_the_difference_of_two_histograms_is_what_came_between() -> None:
    now, before = histogram(b1=5, b2=1), histogram(b1=3)
    assert now.since(before) == histogram(b1=2, b2=1)


def test_after_a_restart_everything_is_new() -> None:
    assert histogram(b1=1).since(histogram(b1=3)) == histogram(b1=1)


def test_strangers_are_not_told_addresses_reasons_and_ids() -> None:
    link = LinkStats(2, "tcp", "linked", "cma: another host", "10.0.0.7:26000", 1)
    stats = cluster(links=(link,), oldest_key=HeldKey(5, 1.5, 77, 3, True))
    told = stats.told(to_stranger=True)
    assert told.links == (LinkStats(2, "tcp", "linked", num_running=1),)
    assert told.oldest_key == HeldKey(5, 1.5)
    assert stats.told(to_stranger=False) == stats


def test_the_answer_of_the_busiest_cluster_fits_a_frame() -> None:
    link = LinkStats(2**64 - 1, "tcp", "leaving", "x" * 10_000, "[" + "f" * 39 + "]:65535", 2**30)
    full = Histogram((2**62,) * (len(BOUNDS_S) + 1), 1e12)
    failures = (("LLM_KV_CACHE_NOT_EXIST", 2**62),) * 30
    pools = (PoolStats("DEVICE", "buffers of 2097152", 2**62, 2**62, 2**62),) * 1000
    busy = [
        OperationStats("transfer", n, "tcp", n, failures, n, n, full, full, full, full)
        for n in range(1024)
    ]
    whole = cluster(links=(link,) * 5000, operations=tuple(busy), pools=pools)
    told = whole.told(to_stranger=False)
    assert (len(told.links), len(told.operations)) == (MAX_TOLD, MAX_TOLD)
    assert told.operations[0].nbytes == 1023, "the busiest first"
    frame = m.encode(m.Stats(told))
    assert len(frame) < m.MAX_STATS_NBYTES
    assert m.decode(frame[m.HEADER.size :]) == m.Stats(told)
