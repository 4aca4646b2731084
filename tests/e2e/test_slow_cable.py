"""Links between hosts over a cable that is slow, loses packets, and is cut for good."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
import two_hosts
from slow_cable import SlowCable
from two_hosts import CABLE, HOSTS, Hosts, set_up

from llm_datadist import BlocksCacheKey, LLMException, LLMRole, LLMStatusCode
from llm_datadist.testing.cluster import Node, make_array
from llm_datadist.testing.timing import eventually, takes_at_most

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llm_datadist.testing.cluster import Bytes, NodeProcess

machines, apart = two_hosts.machines, two_hosts.apart

SUCCESS, TIMEOUT = LLMStatusCode.LLM_SUCCESS, LLMStatusCode.LLM_TIMEOUT
KEY = BlocksCacheKey(1, 0)
SHAPE = (4, 64, 32 * 1024)
#: an eighth of a cache, 1 MiB
FEW = list(range(0, 64, 8))
ALL = list(range(64))
DELAY_S, LOSS = 0.01, 0.01


class Outcome(NamedTuple):
    """Of a pull: its status, how long it took, and the cache that it was to fill."""

    status: LLMStatusCode
    seconds: float
    cache_id: int


class Ends(NamedTuple):
    """Cluster 1 on one host, cluster 2 on the other, linked by a slow cable."""

    hosts: Hosts
    cable: SlowCable


# -- run by the hosts ------------------------------------------------------------------------------


def start(node: Node, cluster_id: int, timeout_ms: int, *, is_accessible: bool) -> int:
    role = LLMRole.PROMPT if cluster_id == 1 else LLMRole.DECODER
    listen = f"{HOSTS[0]}:0" if cluster_id == 1 else ""
    port = node.start(role, cluster_id, listen_ip_info=listen, sync_kv_timeout=timeout_ms,
                      enable_remote_cache_accessible=is_accessible)  # fmt: skip
    node.blocks_cache(*SHAPE, seed=cluster_id, key=BlocksCacheKey(cluster_id, 0))
    return port


def pull(node: Node, cluster_id: int, blocks: list[int]) -> Outcome:
    cache = node.blocks_cache(*SHAPE)
    begun = time.monotonic()
    status = SUCCESS
    try:
        node.manager.pull_blocks(BlocksCacheKey(cluster_id, 0), cache, blocks, blocks)
    except LLMException as error:
        status = error.status_code
    return Outcome(status, time.monotonic() - begun, cache.cache_id)


def array_of(node: Node, cache_id: int) -> Bytes:
    return node.arrays[cache_id]


def unlink_by_force(node: Node, port: int) -> LLMStatusCode:
    return node.unlink(port, 1, force=True)


def linked_ids(node: Node) -> list[int]:
    return [link.cluster_id for link in node.datadist.links()]


# -- tests -----------------------------------------------------------------------------------------


@pytest.fixture
def ends(apart: Hosts) -> Iterator[Ends]:
    try:
        cable = SlowCable([process.pid for process in apart], CABLE, DELAY_S)
    except OSError as error:
        pytest.skip(f"a slow cable needs /dev/net/tun, and the right to use it (root): {error}")
    set_up(apart)
    with cable:
        yield Ends(apart, cable)
        for process in apart:
            process.call(Node.stop)


def link(ends: Ends, timeout_ms: int, *, is_accessible: bool = False) -> int:
    one, other = ends.hosts
    port = one.call(start, 1, timeout_ms, is_accessible=is_accessible)
    other.call(start, 2, timeout_ms, is_accessible=is_accessible)
    with takes_at_most(5):
        assert other.call(Node.link, port, 1, 5000, host=HOSTS[0]) == SUCCESS
    return port


def outcome_of(process: NodeProcess) -> Outcome:
    """Of the pull that was begun there."""
    outcome = process.result()
    assert isinstance(outcome, Outcome)
    return outcome


def assert_arrived(array: Bytes, blocks: list[int], cluster_id: int) -> None:
    expected = np.zeros(SHAPE, np.uint8)
    expected[:, blocks] = make_array(SHAPE, cluster_id)[:, blocks]
    np.testing.assert_array_equal(array, expected)


def test_what_is_slow_and_lossy_is_no_error_within_the_deadline(
    ends: Ends, is_accessible: bool
) -> None:
    ends.cable.loss = LOSS
    link(ends, 10_000, is_accessible=is_accessible)
    pulls = list(zip(ends.hosts, (2, 1), strict=True))
    for process, cluster_id in pulls:
        process.begin(pull, cluster_id, FEW)
    for process, cluster_id in pulls:
        outcome = outcome_of(process)
        assert outcome.status == SUCCESS
        assert 2 * DELAY_S <= outcome.seconds <= 10
        assert_arrived(process.call(array_of, outcome.cache_id), FEW, cluster_id)
    assert ends.cable.num_lost > 0


def test_a_deadline_that_is_too_short_is_a_timeout_in_time_and_nothing_arrives_later(
    ends: Ends, is_accessible: bool
) -> None:
    link(ends, 400, is_accessible=is_accessible)
    other = ends.hosts[1]
    ends.cable.delay_s = 10 * DELAY_S
    outcome = other.call(pull, 1, ALL)
    assert outcome.status == TIMEOUT
    assert outcome.seconds <= 1.2 * 0.4 + 0.1
    ends.cable.delay_s = DELAY_S
    left = other.call(array_of, outcome.cache_id)
    passed = ends.cable.num_passed
    assert other.call(pull, 1, [5]).status == SUCCESS
    assert ends.cable.num_passed > passed
    np.testing.assert_array_equal(other.call(array_of, outcome.cache_id), left)


def test_a_host_that_vanishes_during_a_pull_is_an_error_in_time(
    ends: Ends, is_accessible: bool
) -> None:
    """Nobody is told: no reset, no end. What can be linked again needs no consent of the lost."""
    port = link(ends, 500, is_accessible=is_accessible)
    one, other = ends.hosts
    assert other.call(pull, 1, [5]).status == SUCCESS
    passed = ends.cable.num_passed
    other.begin(pull, 1, ALL)
    assert eventually(lambda: ends.cable.num_passed > passed + 100)
    ends.cable.cut()
    one.begin(pull, 2, [5])
    for outcome in (outcome_of(other), other.call(pull, 1, [5]), outcome_of(one)):
        assert outcome.status == TIMEOUT
        assert outcome.seconds <= 1.2 * 0.5 + 0.1
    with takes_at_most(0.5):
        assert other.call(unlink_by_force, port) == SUCCESS
    assert other.call(linked_ids) == []
