"""Several devices in one process, the C++-shaped interface. Seed 002, decision D30."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import pytest
from cpp_cluster import LISTEN, LOCAL, describe, pool_cfg, pool_class
from device_clusters import (
    SHAPE,
    THEIRS,
    Several,
    add_there,
    info_of,
    linked_there,
    look_there,
    several,
    start_there,
    stop_there,
)

from llm_datadist import cpp as c
from llm_datadist.testing.cluster import make_array
from llm_datadist.testing.faults import FaultProxy
from llm_datadist.testing.timing import eventually, takes_at_most

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llm_datadist.testing.cluster import NodeProcess

BOTH = pytest.mark.parametrize("devices", [2, 4])


@pytest.fixture
def remote(peer: NodeProcess) -> Iterator[NodeProcess]:
    """Another process for clusters, finalized after the test."""
    yield peer
    peer.call(stop_there)


@pytest.fixture
def pair() -> Iterator[Several]:
    """Cluster 1 with two devices, not initialised yet."""
    with several(1, 2) as cluster:
        yield cluster


def logged(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


# -- transfers --


@BOTH
@pytest.mark.shows("D30", "cpp.devices")
def test_each_device_moves_with_the_same_device_of_the_peer(
    remote: NodeProcess, path: str, devices: int
) -> None:
    with several(1, devices) as ours:
        ports = remote.call(start_there, 5, devices, path)
        assert len(set(ports)) == devices
        assert ours.initialize(path) == c.LLM_SUCCESS
        assert ours.link(ports) == c.LLM_SUCCESS
        assert ours.num_links(5) == devices
        assert {link.path for link in ours.datadist.links()} == {path}
        theirs, cache = remote.call(add_there, 5, THEIRS, 1), ours.add(SHAPE, 2)
        expected, source = make_array((devices, *SHAPE), 2), make_array((devices, *THEIRS), 1)

        index = c.CacheIndex(5, theirs)
        assert ours.datadist.PullKvBlocks(index, cache, [15, 3], [0, 6]) == c.LLM_SUCCESS
        expected[:, :, [0, 6]] = source[:, :, [15, 3]]
        assert np.array_equal(ours.array_of(cache), expected)

        row = c.CacheIndex(5, theirs, 9)
        assert ours.datadist.PullKvCache(row, cache, 2, 40) == c.LLM_SUCCESS
        expected[:, :, 2, :40] = source[:, :, 9, :40]
        assert np.array_equal(ours.array_of(cache), expected)

        ext = c.KvCacheExtParam((0, 0), (1, 1), 2)
        assert ours.datadist.PushKvBlocks(cache, index, [6], [1], ext) == c.LLM_SUCCESS
        source[:, 2:4, 1] = expected[:, 0:2, 6]
        assert ours.datadist.PushKvCache(cache, c.CacheIndex(5, theirs, 4), 7) == c.LLM_SUCCESS
        source[:, :, 4] = expected[:, :, 7]
        assert np.array_equal(remote.call(look_there, 5, theirs), source)


@BOTH
@pytest.mark.shows("cpp.devices")
def test_allocated_caches_are_on_every_device(devices: int) -> None:
    with several(1, devices) as ours:
        cfg = pool_cfg(pool_class(1 << 21, 256, 8192), buf_pool_size=1 << 22)
        assert ours.initialize(BUF_POOL_CFG=cfg) == c.LLM_SUCCESS
        status, cache = ours.datadist.AllocateCache(describe(SHAPE))
        assert status == c.LLM_SUCCESS
        assert len(set(cache.tensor_addrs)) == devices * SHAPE[0]
        registered = ours.add(SHAPE, 3)
        assert (cache.cache_id, registered.cache_id) == (1, 2)
        copy = ours.datadist.CopyKvBlocks
        assert copy(registered, cache, [0, 1], [[4, 5], [6, 7]]) == c.LLM_SUCCESS
        assert ours.datadist.CopyKvCache(registered, cache, 2, 3) == c.LLM_SUCCESS
        assert copy(cache, registered, [3, 4, 7], [[0, 1, 2]]) == c.LLM_SUCCESS
        expected = make_array((devices, *SHAPE), 3)
        expected[:, :, [0, 1, 2]] = expected[:, :, [2, 0, 1]]
        assert np.array_equal(ours.array_of(registered), expected)
        assert ours.datadist.DeallocateCache(cache.cache_id) == c.LLM_SUCCESS
        assert copy(cache, registered, [3], [[0]]) == c.LLM_KV_CACHE_NOT_EXIST
        assert ours.datadist.UnregisterKvCache(registered.cache_id) == c.LLM_SUCCESS
        assert copy(registered, registered, [3], [[0]]) == c.LLM_KV_CACHE_NOT_EXIST


def test_each_device_has_a_pool_of_its_own() -> None:
    with several(1, 2) as ours:
        assert ours.initialize(BUF_POOL_CFG=pool_cfg(buf_pool_size=1 << 20)) == c.LLM_SUCCESS
        desc = describe((1, 1, 1 << 20))
        status, cache = ours.datadist.AllocateCache(desc)  # all that there is, on both
        assert status == c.LLM_SUCCESS
        assert ours.datadist.AllocateCache(desc)[0] == c.LLM_OUT_OF_MEMORY
        ours.datadist.DeallocateCache(cache.cache_id)
        assert ours.datadist.AllocateCache(desc)[0] == c.LLM_SUCCESS


def test_a_cache_that_one_device_cannot_have_is_on_none(
    pair: Several, caplog: pytest.LogCaptureFixture
) -> None:
    assert pair.initialize() == c.LLM_SUCCESS
    array = make_array((2, *SHAPE), None)
    addrs = [*(int(t.ctypes.data) for t in array[0]), *[2**64 - 1] * SHAPE[0]]
    assert pair.datadist.RegisterKvCache(describe(SHAPE), addrs) == (c.LLM_PARAM_INVALID, -1)
    assert "device 1: no tensor of" in logged(caplog)
    good = pair.add(SHAPE, 4)
    assert good.cache_id == 2  # of 1 a peer may have seen the part of device 0
    other = c.Cache(1, [], describe(SHAPE))
    assert pair.datadist.CopyKvBlocks(other, good, [0], [[1]]) == c.LLM_KV_CACHE_NOT_EXIST
    assert pair.datadist.CopyKvBlocks(good, good, [0], [[1]]) == c.LLM_SUCCESS


def test_a_call_on_a_cache_of_one_device_less_is_refused(
    pair: Several, caplog: pytest.LogCaptureFixture
) -> None:
    assert pair.initialize() == c.LLM_SUCCESS
    array = make_array(SHAPE, None)
    addrs = [int(tensor.ctypes.data) for tensor in array]
    assert pair.datadist.RegisterKvCache(describe(SHAPE), addrs) == (c.LLM_PARAM_INVALID, -1)
    assert "4 addresses for 4 tensors on each of 2 devices" in logged(caplog)


# -- options --


@pytest.mark.shows("cpp.devices")
@pytest.mark.parametrize(("devices", "listens"), [(2, 3), (4, 2), (2, 1), (1, 2)])
def test_lists_of_unequal_length_are_refused_with_both_counts(
    devices: int, listens: int, caplog: pytest.LogCaptureFixture
) -> None:
    with several(1, devices) as ours:
        assert ours.initialize(listens=listens) == c.LLM_PARAM_INVALID
        assert f"{devices} device(s) and {listens} address(es) to listen on" in logged(caplog)
        assert ours.initialize(listens=devices) == c.LLM_SUCCESS


def test_an_address_that_one_device_cannot_have_leaves_none_listening(pair: Several) -> None:
    with several(7, 1) as other:
        assert other.initialize(listens=1) == c.LLM_SUCCESS
        taken = f"127.0.0.1:{other.ports[0]}"
        assert pair.initialize(LISTEN_IP_INFO=f"{LISTEN};{taken}") == c.LLM_FAILED
        assert pair.ports == []
        assert pair.initialize(listens=2) == c.LLM_SUCCESS
        assert len(pair.ports) == 2


@pytest.mark.shows("cpp.devices")
def test_the_role_is_set_on_all_devices_or_on_none(
    pair: Several, caplog: pytest.LogCaptureFixture
) -> None:
    assert pair.initialize(listens=2, ENABLE_SET_ROLE="1") == c.LLM_SUCCESS
    before = pair.ports
    with several(7, 1) as other:
        assert other.initialize(listens=1) == c.LLM_SUCCESS
        wanted = {c.OPTION_LISTEN_IP_INFO: f"{LISTEN};127.0.0.1:{other.ports[0]}"}
        assert pair.datadist.SetRole(c.LlmRole.kPrompt, wanted) == c.LLM_FAILED
    assert pair.ports == before
    alone = {c.OPTION_LISTEN_IP_INFO: LISTEN}
    assert pair.datadist.SetRole(c.LlmRole.kPrompt, alone) == c.LLM_PARAM_INVALID
    assert "2 device(s) and 1 address(es) to listen on" in logged(caplog)
    assert pair.ports == before
    assert pair.datadist.SetRole(c.LlmRole.kDecoder) == c.LLM_SUCCESS
    assert pair.ports == []
    both = {c.OPTION_LISTEN_IP_INFO: f"{LISTEN};{LISTEN}"}
    assert pair.datadist.SetRole(c.LlmRole.kPrompt, both) == c.LLM_SUCCESS
    assert len(set(pair.ports)) == 2


# -- links --


@pytest.mark.shows("cpp.devices")
@pytest.mark.parametrize(("ours_has", "theirs_has"), [(2, 4), (4, 2), (1, 2), (2, 1)])
def test_two_ends_with_different_numbers_of_devices_are_refused_by_both_counts(
    remote: NodeProcess, ours_has: int, theirs_has: int, caplog: pytest.LogCaptureFixture
) -> None:
    ports = remote.call(start_there, 5, theirs_has)
    with several(1, ours_has) as ours:
        assert ours.initialize() == c.LLM_SUCCESS
        wanted = (ports * 4)[:ours_has]
        assert ours.link(wanted) == c.LLM_PARAM_INVALID
        text = f"cluster 1 has {ours_has} device(s), and cluster 5 has {theirs_has}"
        assert text in logged(caplog)
        assert ours.datadist.links() == []
        assert remote.call(linked_there, 5, 1) == 0


@pytest.mark.shows("cpp.devices")
def test_devices_at_each_others_addresses_are_refused(
    pair: Several, remote: NodeProcess, caplog: pytest.LogCaptureFixture
) -> None:
    ports = remote.call(start_there, 5, 2)
    assert pair.initialize() == c.LLM_SUCCESS
    assert pair.link(ports[::-1]) == c.LLM_PARAM_INVALID
    assert "device 0 of cluster 1 called device 1 of cluster 5" in logged(caplog)
    assert pair.datadist.links() == []
    assert pair.link(ports) == c.LLM_SUCCESS
    assert pair.link(ports) == c.LLM_ALREADY_LINK
    assert pair.num_links(5) == remote.call(linked_there, 5, 1) == 2


@pytest.mark.parametrize(("local", "remote_count"), [(2, 1), (2, 3), (1, 2), (3, 2)])
def test_as_many_addresses_as_devices_are_needed(
    pair: Several, local: int, remote_count: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert pair.initialize() == c.LLM_SUCCESS
    info = info_of([9] * remote_count)
    info.local_ip_infos = [LOCAL] * local
    invalid = c.LLM_PARAM_INVALID
    assert pair.datadist.LinkLlmClusters([info], 1000) == (invalid, [invalid])
    assert "2 are needed" in logged(caplog) or "for 2 devices" in logged(caplog)


@pytest.mark.shows("cpp.devices")
def test_where_one_device_cannot_be_reached_none_is_linked(
    remote: NodeProcess, caplog: pytest.LogCaptureFixture
) -> None:
    ports = remote.call(start_there, 5, 4)
    with several(1, 4) as ours:
        assert ours.initialize() == c.LLM_SUCCESS
        with FaultProxy(ports[2]) as dead:
            gone = dead.port
        assert ours.link([*ports[:2], gone, ports[3]]) == c.LLM_LINK_FAILED
        assert "device 2: cannot connect to" in logged(caplog)
        assert ours.datadist.links() == []
        assert eventually(lambda: remote.call(linked_there, 5, 1) == 0)
        assert ours.link(ports) == c.LLM_SUCCESS
        assert ours.num_links(5) == 4


@pytest.mark.shows("cpp.devices")
def test_when_the_listener_of_one_device_dies_the_whole_link_ends(remote: NodeProcess) -> None:
    ports = remote.call(start_there, 5, 2, "tcp")
    theirs = remote.call(add_there, 5, THEIRS, 1)
    with several(1, 2) as ours, FaultProxy(ports[1]) as proxy:
        assert ours.initialize("tcp") == c.LLM_SUCCESS
        assert ours.link([ports[0], proxy.port]) == c.LLM_SUCCESS
        cache = ours.add(SHAPE)
        index = c.CacheIndex(5, theirs)
        assert ours.datadist.PullKvBlocks(index, cache, [1], [1]) == c.LLM_SUCCESS
        proxy.cut()
        assert eventually(lambda: ours.datadist.links() == [])
        assert eventually(lambda: remote.call(linked_there, 5, 1) == 0)
        assert ours.datadist.PullKvBlocks(index, cache, [1], [1]) == c.LLM_NOT_YET_LINK
        # reset as soon as it is accepted, or a moment later
        assert ours.link([ports[0], proxy.port]) in (c.LLM_FAILED, c.LLM_LINK_FAILED)
        assert ours.datadist.links() == []
        proxy.restore()
        assert ours.link([ports[0], proxy.port]) == c.LLM_SUCCESS
        assert ours.datadist.PullKvBlocks(index, cache, [2], [2]) == c.LLM_SUCCESS
        expected = make_array((2, *THEIRS), 1)[:, :, 2]
        assert np.array_equal(ours.array_of(cache)[:, :, 2], expected)


@pytest.mark.parametrize("force", [False, True])
def test_unlinking_ends_the_links_of_all_devices(
    pair: Several, remote: NodeProcess, force: bool
) -> None:
    ports = remote.call(start_there, 5, 2)
    assert pair.initialize() == c.LLM_SUCCESS
    for _ in range(3):
        assert pair.link(ports) == c.LLM_SUCCESS
        unlinked = pair.datadist.UnlinkLlmClusters([info_of(ports)], 3000, force)
        assert unlinked == (c.LLM_SUCCESS, [c.LLM_SUCCESS])
        assert pair.datadist.links() == []
        assert eventually(lambda: remote.call(linked_there, 5, 1) == 0)


def test_a_listener_pushes_over_links_that_its_caller_made(
    pair: Several, remote: NodeProcess, path: str
) -> None:
    assert pair.initialize(path, listens=2) == c.LLM_SUCCESS
    remote.call(start_there, 5, 2, path)
    assert remote.call(link_there, pair.ports) == c.LLM_SUCCESS
    theirs, cache = remote.call(add_there, 5, THEIRS, None), pair.add(SHAPE, 6)
    pushed = pair.datadist.PushKvBlocks(cache, c.CacheIndex(5, theirs), [1, 2], [8, 9])
    assert pushed == c.LLM_SUCCESS
    arrived = remote.call(look_there, 5, theirs)
    assert np.array_equal(arrived[:, :, 8:10], pair.array_of(cache)[:, :, 1:3])
    assert not arrived[:, :, :8].any()


def link_there(node: object, ports: list[int]) -> c.Status:
    import device_clusters

    return device_clusters._there[5].link(ports, 1)


# -- failing, and ending --


@pytest.mark.shows("cpp.devices")
def test_a_device_that_stands_still_fails_the_call_and_nothing_arrives_later(
    remote: NodeProcess,
) -> None:
    ports = remote.call(start_there, 5, 4, "tcp")
    theirs = remote.call(add_there, 5, (4, 16, 1 << 16), 1)
    with several(1, 4) as ours, FaultProxy(ports[2]) as proxy:
        assert ours.initialize("tcp", SYNC_CACHE_WAIT_TIME="2000") == c.LLM_SUCCESS
        assert ours.link([*ports[:2], proxy.port, ports[3]]) == c.LLM_SUCCESS
        cache, blocks = ours.add((4, 16, 1 << 16)), list(range(16))
        index = c.CacheIndex(5, theirs)
        assert ours.datadist.PullKvBlocks(index, cache, [0], [0]) == c.LLM_SUCCESS
        proxy.stall()
        with takes_at_most(4.0):
            assert ours.datadist.PullKvBlocks(index, cache, blocks, blocks) == c.LLM_TIMEOUT
        mine = ours.array_of(cache)
        mine[:] = 0x55
        proxy.restore()
        other = ours.add((4, 16, 1 << 16))
        assert eventually(lambda: pull(ours, index, other, blocks) == c.LLM_SUCCESS)
        assert np.array_equal(ours.array_of(other), make_array((4, 4, 16, 1 << 16), 1))
        assert (mine == 0x55).all()


def pull(ours: Several, index: c.CacheIndex, cache: c.Cache, blocks: list[int]) -> c.Status:
    return ours.datadist.PullKvBlocks(index, cache, blocks, blocks)


def test_finalizing_ends_all_devices_and_their_ports_are_free(
    pair: Several, remote: NodeProcess
) -> None:
    ports = remote.call(start_there, 5, 2)
    assert pair.initialize(listens=2) == c.LLM_SUCCESS
    ours = pair.ports
    assert pair.link(ports) == c.LLM_SUCCESS
    with takes_at_most(3.0):
        pair.datadist.Finalize()
    assert eventually(lambda: remote.call(linked_there, 5, 1) == 0)
    again = ";".join(f"127.0.0.1:{port}" for port in ours)
    assert pair.initialize(LISTEN_IP_INFO=again) == c.LLM_SUCCESS
    assert pair.ports == ours
    assert pair.link(ports) == c.LLM_SUCCESS


def test_failures_name_the_device(pair: Several, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    assert pair.initialize() == c.LLM_SUCCESS
    cache = pair.add(SHAPE)
    assert pull(pair, c.CacheIndex(5, 1), cache, [1]) == c.LLM_NOT_YET_LINK
    assert "device 0: cluster 1 is not linked to cluster 5" in logged(caplog)
    assert pull(pair, c.CacheIndex(1, 1), cache, [1]) == c.LLM_PARAM_INVALID
    assert "the key names this cluster itself" in logged(caplog)
