"""Several devices: a key is one key, and leads to one cache on all of them. Decision D30."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest
import v1_devices
from v1_cluster import DECODER, NOT_EXIST, PROMPT, assert_refused
from v1_devices import SUCCESS, Several, rows_there, several, start_there

from llm_datadist import CacheKey, LLMException, LLMStatusCode, Placement
from llm_datadist.keys import NO_ID
from llm_datadist.testing.cluster import Node, make_array
from llm_datadist.testing.faults import FaultProxy
from llm_datadist.testing.timing import eventually

if TYPE_CHECKING:
    from llm_datadist.kv_cache import KvCache
    from llm_datadist.testing.cluster import NodeProcess

remote = v1_devices.remote

SHAPE = (2, 1, 1 << 16)
KEY = CacheKey(1, 10)


def has(ours: Several, cache: KvCache, device: int, seed: int) -> bool:
    return np.array_equal(ours.read(cache)[device], make_array((2, *SHAPE), seed)[device])


def hand_over_there(node: Node, key: CacheKey) -> int:
    """A cache that only its key holds."""
    cache_id = rows_there(node, *SHAPE, seed=1, keys=[key])
    owner = v1_devices.there[0]
    owner.manager.deallocate_cache(owner.caches.pop(cache_id))
    return cache_id


def used_there(node: Node) -> list[int]:
    """So many bytes of the pool of each device."""
    usages = v1_devices.there[0].datadist.pools()[Placement.DEVICE]
    return [usage.used_nbytes for usage in usages]


def move_key_there(node: Node, key: CacheKey, seed: int) -> int:
    """From the cache that it leads to, which stays, to another one."""
    v1_devices.there[0].manager.remove_cache_key(key)
    return rows_there(node, *SHAPE, seed=seed, keys=[key])


@pytest.mark.shows("v1.devices")
@pytest.mark.parametrize("key", [KEY, CacheKey(1, NO_ID, prefix_id=3)], ids=["request", "prefix"])
def test_all_devices_pull_from_the_same_cache_although_its_key_moves_meanwhile(
    remote: NodeProcess, key: CacheKey
) -> None:
    """Device 0 has pulled from the first cache when the key moves, and device 1 from none."""
    ports = remote.call(start_there, PROMPT, 2, "tcp")
    remote.call(rows_there, *SHAPE, seed=1, keys=[key])
    with several(DECODER, 2) as ours, FaultProxy(ports[1]) as proxy:
        ours.start(transfer_path="tcp")
        assert ours.link([ports[0], proxy.port]) == SUCCESS
        cache = ours.rows(*SHAPE)
        proxy.stall()
        thread = threading.Thread(target=ours.manager.pull_cache, args=(key, cache))
        thread.start()
        assert eventually(lambda: has(ours, cache, 0, 1))
        remote.call(move_key_there, key, seed=2)
        proxy.restore()
        thread.join(20)
        assert has(ours, cache, 1, 2)
        assert has(ours, cache, 0, 2)


@pytest.mark.shows("v1.devices")
def test_a_key_is_not_used_up_by_a_pull_that_failed_on_one_device(remote: NodeProcess) -> None:
    ports = remote.call(start_there, PROMPT, 2, "tcp")
    key = CacheKey(1, 10)
    remote.call(rows_there, 2, 1, 1 << 16, seed=1, keys=[key])
    with several(DECODER, 2) as ours, FaultProxy(ports[1]) as proxy:
        ours.start(transfer_path="tcp", sync_kv_timeout=1500)
        assert ours.link([ports[0], proxy.port]) == SUCCESS
        cache = ours.rows(2, 1, 1 << 16)
        proxy.stall()
        with pytest.raises(LLMException, match="device 1: ") as error:
            ours.manager.pull_cache(key, cache)
        assert error.value.status_code is LLMStatusCode.LLM_TIMEOUT
        proxy.restore()
        assert eventually(lambda: has_pulled(ours, key, cache))
        assert np.array_equal(ours.read(cache), make_array((2, 2, 1, 1 << 16), 1))
        assert_refused(NOT_EXIST, "req_id=10", ours.manager.pull_cache, key, cache)


def has_pulled(ours: Several, key: CacheKey, cache: KvCache) -> bool:
    try:
        ours.manager.pull_cache(key, cache)
    except LLMException as error:
        if error.status_code is not LLMStatusCode.LLM_TIMEOUT:
            raise
        return False
    return True


@pytest.mark.shows("v1.devices")
@pytest.mark.parametrize("lost", [0, 1])
def test_a_key_is_used_up_on_all_devices_or_on_none_when_a_link_is_lost_behind_the_pull(
    remote: NodeProcess, lost: int
) -> None:
    ports = remote.call(start_there, PROMPT, 2, "tcp")
    with several(DECODER, 2) as ours, FaultProxy(ports[0]) as first, FaultProxy(ports[1]) as second:
        ours.start(transfer_path="tcp")
        through = [first.port, second.port]
        assert ours.link(through) == SUCCESS
        cache = ours.rows(*SHAPE)
        said = []
        for req_id in range(4):  # the first ones open connections
            remote.call(hand_over_there, CacheKey(1, req_id))
            ours.manager.pull_cache(CacheKey(1, req_id), cache)
            said.append(first.nbytes_passed(to_caller=False))
        each = min(np.diff(said).tolist())
        assert remote.call(used_there) == [0, 0]

        remote.call(hand_over_there, KEY)
        proxy = (first, second)[lost]
        # the owner lacks the end of what it is told last, which is that all has arrived
        proxy.cut(after_nbytes=each - 4, to_caller=False)
        ours.manager.pull_cache(KEY, cache)
        assert proxy.wait(2.0 if lost == 0 else 0.0) == (lost == 0)
        first.restore()
        second.restore()
        used = remote.call(used_there)
        assert used[0] == used[1]
        assert (used[0] > 0) == (lost == 0)
        if lost == 0:  # the call can be made again, and nothing is held on any device then
            assert eventually(lambda: ours.link(through) == SUCCESS)
            ours.manager.pull_cache(KEY, cache)
            assert remote.call(used_there) == [0, 0]
        remote.call(hand_over_there, KEY)
