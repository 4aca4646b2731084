"""Several devices: a key is one key, and leads to one cache on all of them. Decision D30."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest
import v1_devices
from v1_cluster import DECODER, NOT_EXIST, PROMPT, assert_refused
from v1_devices import SUCCESS, Several, rows_there, several, start_there

from llm_datadist import CacheKey, LLMException, LLMStatusCode
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
