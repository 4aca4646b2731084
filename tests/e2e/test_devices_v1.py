"""Several devices in one process, the v1 mode. Appendix C, decision D30."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import v1_devices
from v1_cluster import DECODER, INVALID, NOT_EXIST, PROMPT, Gate, assert_refused, desc_of
from v1_devices import (
    PAGE,
    SUCCESS,
    Several,
    addrs_there,
    blocks_there,
    info_of,
    read_there,
    rows_there,
    several,
    start_there,
    there,
)

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    DataType,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMStatusCode,
    Placement,
    TransferConfig,
)
from llm_datadist.kv_cache import KvCache
from llm_datadist.testing.cluster import Node, addrs_of, make_array

if TYPE_CHECKING:
    from llm_datadist.testing.cluster import NodeProcess

remote = v1_devices.remote

BOTH = pytest.mark.parametrize("devices", [2, 4])

# -- the sample of the v1 mode, written anew: prompt and decoder with four devices each --

KEYS = [CacheKey(1, req_id=req_id) for req_id in range(4)]
DESC = CacheDesc(num_tensors=4, shape=[4, 4, 8], data_type=DataType.DT_FLOAT16)


def run_prompt(node: Node) -> list[int]:
    """Listens, allocates a cache under four keys and computes it; the ports of its devices."""
    prompt = Several(PROMPT, 1, 4).start(listens=True)
    there.append(prompt)
    cache = prompt.manager.allocate_cache(DESC, KEYS)
    assert [len(addrs) for addrs in cache.per_device_tensor_addrs] == [4, 4, 4, 4]
    for index in range(4):
        for device, tensor in enumerate(prompt.manager.get_cache_tensors(cache, index)):
            tensor.numpy()[:] = 10 * device + index
    prompt.manager.deallocate_cache(cache)  # its keys keep it until they are pulled
    return prompt.ports


@pytest.mark.shows("v1.devices", "D30")
def test_the_v1_samples_way_with_four_devices(remote: NodeProcess) -> None:
    ports = remote.call(run_prompt)
    with several(DECODER, 4) as decoder:
        decoder.start()
        cluster = info_of(ports)
        linked = decoder.datadist.link_clusters([cluster], 5000)
        assert linked == (SUCCESS, [SUCCESS])
        decoder.datadist.check_link_status(1)
        manager = decoder.manager
        cache = manager.allocate_cache(DESC)
        for row, key in enumerate(KEYS):
            manager.pull_cache(key, cache, row)
        for index in range(4):
            for device, tensor in enumerate(manager.get_cache_tensors(cache, index)):
                assert (tensor.numpy() == 10 * device + index).all()
        assert_refused(NOT_EXIST, "req_id=2", manager.pull_cache, KEYS[2], cache, 0)
        assert decoder.datadist.unlink_clusters([cluster], 5000) == (SUCCESS, [SUCCESS])
        with pytest.raises(LLMException) as error:
            decoder.datadist.check_link_status(1)
        assert error.value.status_code is LLMStatusCode.LLM_NOT_YET_LINK


# -- each operation, on every device --


@BOTH
@pytest.mark.shows("v1.devices")
def test_pulls_are_done_on_every_device(remote: NodeProcess, path: str, devices: int) -> None:
    ports = remote.call(start_there, PROMPT, devices, path)
    keys, blocks_key = [CacheKey(1, 10), CacheKey(1, 11)], BlocksCacheKey(1, 7)
    remote.call(rows_there, 3, 2, 64, seed=1, keys=keys)
    remote.call(blocks_there, 3, 8, 32, seed=2, key=blocks_key)
    with several(DECODER, devices) as ours:
        ours.start(transfer_path=path)
        assert ours.link(ports) == SUCCESS
        assert {link.path for link in ours.datadist.links()} == {path}
        rows, blocks = ours.rows(3, 2, 64, seed=3), ours.blocks(3, 6, 32, seed=4)
        ours.manager.pull_cache(keys[1], rows, 0, src_cache_offset=8, dst_cache_offset=24)
        expected = make_array((devices, 3, 2, 64), 3)
        expected[:, :, 0, 24:] = make_array((devices, 3, 2, 64), 1)[:, :, 1, 8:48]
        assert np.array_equal(ours.read(rows), expected)
        ours.manager.pull_blocks(blocks_key, blocks, [7, 0], [1, 2])
        expected = make_array((devices, 3, 6, 32), 4)
        expected[:, :, [1, 2]] = make_array((devices, 3, 8, 32), 2)[:, :, [7, 0]]
        assert np.array_equal(ours.read(blocks), expected)


@BOTH
@pytest.mark.shows("v1.devices")
def test_copies_and_swaps_are_done_on_every_device(devices: int) -> None:
    with several(PROMPT, devices) as ours:
        ours.start()
        manager = ours.manager
        src, dst = ours.rows(2, 3, 64, seed=1), ours.rows(2, 2, 64, seed=2)
        manager.copy_cache(dst, src, 1, 2, 8, 40)
        expected = make_array((devices, 2, 2, 64), 2)
        expected[:, :, 1, 8:48] = make_array((devices, 2, 3, 64), 1)[:, :, 2, 8:48]
        assert np.array_equal(ours.read(dst), expected)

        blocks, host = ours.blocks(2, 8, 64, seed=3), make_array((devices, 2, 4, 64), 4)
        manager.copy_blocks(blocks, {1: [2, 7]})
        expected = make_array((devices, 2, 8, 64), 3)
        expected[:, :, [2, 7]] = expected[:, :, [1, 1]]
        cpu = CacheDesc(2, [4, 64], DataType.DT_UINT8, Placement.HOST)
        swapped = KvCache.create_cpu_cache(cpu, [addrs_of(device) for device in host])
        manager.swap_blocks(swapped, blocks, {3: 0})
        expected[:, :, 0] = host[:, :, 3]
        manager.swap_blocks(blocks, swapped, {7: 1})
        host_after = make_array((devices, 2, 4, 64), 4)
        host_after[:, :, 1] = expected[:, :, 7]
        assert np.array_equal(ours.read(blocks), expected)
        assert np.array_equal(host, host_after)

        alone = KvCache.create_cpu_cache(cpu, addrs_of(host[0]))
        text = rf"src_cache is on 1 device\(s\), dst_cache on {devices}"
        assert_refused(INVALID, text, manager.swap_blocks, alone, blocks, {0: 0})
        assert np.array_equal(ours.read(blocks), expected)


@BOTH
@pytest.mark.shows("v1.devices")
def test_layers_are_sent_to_the_addresses_of_every_device(
    remote: NodeProcess, path: str, devices: int
) -> None:
    ports = remote.call(start_there, DECODER, devices, path)
    theirs = remote.call(blocks_there, 6, 8, 32, seed=None, key=None)
    addrs = remote.call(addrs_there, theirs)
    assert [len(each) for each in addrs] == [6] * devices
    with several(PROMPT, devices) as ours:
        ours.start(transfer_path=path)
        assert ours.link(ports) == SUCCESS
        cache = ours.blocks(4, 8, 32, seed=1)
        # layers 0 and 1 of ours are layers 1 and 2 of theirs
        wanted = [addr for each in addrs for addr in each[2:]]
        config = TransferConfig(1, wanted, range(2))
        task = ours.manager.transfer_cache_async(cache, Gate().open(), [config], [1, 5], [7, 2])
        assert task.synchronize(20000) == SUCCESS
        expected = make_array((devices, 6, 8, 32), None)
        expected[:, 2:, [7, 2]] = ours.read(cache)[:, :, [1, 5]]
        assert np.array_equal(remote.call(read_there, theirs), expected)
        few = TransferConfig(1, wanted[:4], range(2))
        text = f"4 dst_addrs for the 4 tensors of .* on each of {devices} devices"
        transfer = ours.manager.transfer_cache_async
        assert_refused(INVALID, text, transfer, cache, Gate().open(), [few], [1], [7])


# -- all or none --


@pytest.mark.shows("v1.devices")
def test_what_one_device_has_no_memory_for_is_allocated_on_none() -> None:
    with several(PROMPT, 2) as ours:
        ours.start(pages=2)
        manager = ours.manager
        first = manager.allocate_cache(desc_of(2, 1, PAGE))
        array = manager.get_cache_tensors(first)[1].numpy()
        manager.deallocate_cache(first)  # the array keeps the memory of device 1
        key = CacheKey(2, 9)
        with pytest.raises(LLMException, match="device 1: no memory"):
            manager.allocate_cache(desc_of(2, 1, PAGE), [key])
        free = [usage.free_nbytes for usage in ours.datadist.pools()[Placement.DEVICE]]
        assert free == [2 * PAGE, 0]
        del array
        assert manager.allocate_cache(desc_of(2, 1, PAGE), [key]).cache_id > first.cache_id


@pytest.mark.shows("v1.devices")
def test_the_role_is_switched_on_all_devices() -> None:
    with several(DECODER, 2) as ours:
        ours.start(enable_switch_role=True)
        switch = ours.datadist.switch_role
        one = {"llm.listenIpInfo": "127.0.0.1:0"}
        assert_refused(
            INVALID, r"2 device\(s\) and 1 address\(es\) to listen on", switch, PROMPT, one
        )
        switch(PROMPT, {"llm.listenIpInfo": "127.0.0.1:0;127.0.0.1:0"})
        assert len(set(ours.ports)) == 2
        ours.rows(2, 1, 64, keys=[CacheKey(2, 1)])
        switch(DECODER)
        assert ours.ports == []


# -- options --


@pytest.mark.shows("v1.devices")
def test_lists_of_unequal_length_are_refused_with_both_counts() -> None:
    datadist = LLMDataDist(PROMPT, 1)
    options = {"ge.exec.deviceId": "0;1;2", "llm.listenIpInfo": "127.0.0.1:0;127.0.0.1:0"}
    text = r"3 device\(s\) and 2 address\(es\) to listen on: llm\.listenIpInfo"
    assert_refused(INVALID, text, datadist.init, options)
    datadist.init({**options, "ge.exec.deviceId": "0;1"})
    assert len(datadist.listen_endpoints) == 2
    datadist.finalize()


def cluster_info(count: int, **others: object) -> str:
    return json.dumps(
        {
            "cluster_id": 1,
            "logic_device_id": [f"0:0:{device}:0" for device in range(count)],
            "listen_ip_info": [{"ip": "127.0.0.1", "port": 0}] * count,
            **others,
        }
    )


@pytest.mark.shows("v1.cluster_info")
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_cluster_listens_where_its_cluster_info_says(count: int) -> None:
    config = LLMConfig()
    config.cluster_info = cluster_info(count)
    with several(PROMPT, count, 1) as ours:
        ours.datadist.init(config.generate_options())
        assert len(set(ours.ports)) == count
        assert {endpoint.host for endpoint in ours.datadist.listen_endpoints} == {"127.0.0.1"}


@pytest.mark.shows("v1.cluster_info")
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"llm.ClusterInfo": cluster_info(1, cluster_id=7)}, "is of cluster 7, this is cluster 1"),
        ({"llm.ClusterInfo": "nothing"}, "llm.ClusterInfo is no JSON"),
        (
            {"llm.ClusterInfo": cluster_info(1), "llm.listenIpInfo": "127.0.0.1:26000"},
            "llm.listenIpInfo and llm.ClusterInfo are one option and differ",
        ),
        (
            {"llm.ClusterInfo": cluster_info(2), "ge.exec.deviceId": "0"},
            r"ge.exec.deviceId names 1 device\(s\), and logic_device_id of llm.ClusterInfo 2",
        ),
        (
            {"llm.ClusterInfo": cluster_info(2, logic_device_id=[])},
            r"1 device\(s\) and 2 address\(es\)",
        ),
        (
            {"llm.ClusterInfo": cluster_info(1, listen_ip_info=[{"ip": "here", "port": 1}])},
            "must have an IPv4 or IPv6 address, got 'here:1'",
        ),
        (
            {"llm.ClusterInfo": cluster_info(2, logic_device_id=["0:0:0:0", "0:0:0:0"])},
            "logic_device_id of llm.ClusterInfo names a device twice",
        ),
        (
            {"llm.ClusterInfo": cluster_info(2, logic_device_id=["x", ""])},
            "logic_device_id of llm.ClusterInfo must be numbers with \":\" .* got 'x'",
        ),
        (
            {"llm.ClusterInfo": cluster_info(1, logic_device_id=["0:0::0"])},
            "logic_device_id of llm.ClusterInfo must be numbers with \":\" .* got '0:0::0'",
        ),
        (
            {"llm.ClusterInfo": json.dumps({"listen_ip": [{"ip": "127.0.0.1", "port": 0}]})},
            "llm.ClusterInfo has no field 'listen_ip': it has cluster_id, listen_ip_info",
        ),
        (
            {"llm.ClusterInfo": cluster_info(1, listen_ip_info=[{"ip": "::1", "prot": 0}])},
            "listen_ip_info of llm.ClusterInfo has no field 'prot': it has ip, port",
        ),
    ],
)
def test_a_cluster_info_that_cannot_be_is_refused(options: dict[str, str], text: str) -> None:
    assert_refused(INVALID, text, LLMDataDist(PROMPT, 1).init, options)


@pytest.mark.shows("D30")
@pytest.mark.parametrize("mode", ["enable_cache_manager", "local_comm_res"])
def test_the_cache_manager_has_one_device_and_names_what_has_several(mode: str) -> None:
    config = LLMConfig()
    config.device_id = [0, 1]
    if mode == "enable_cache_manager":
        config.enable_cache_manager = True
    else:
        config.local_comm_res = ""
    text = r"2 devices: the cache manager has one\. Several are for the v1 mode .*LlmDataDist"
    assert_refused(INVALID, text, LLMDataDist(PROMPT, 1).init, config.generate_options())


# -- being looked into --


def test_the_figures_of_all_devices_are_added_up(remote: NodeProcess) -> None:
    ports = remote.call(start_there, PROMPT, 2)
    keys = [CacheKey(1, 10), CacheKey(1, 11)]
    remote.call(rows_there, 2, 2, 64, seed=1, keys=keys)
    with several(DECODER, 2) as ours:
        ours.start(metrics=True)
        assert ours.link(ports) == SUCCESS
        cache = ours.rows(2, 1, 64)
        for key in keys:
            ours.manager.pull_cache(key, cache)
        stats = ours.datadist.stats()
        assert (stats.num_links, stats.num_caches) == (2, 1)
        pulls = [each for each in stats.operations if each.operation == "pull"]
        assert [(each.succeeded, each.nbytes) for each in pulls] == [(4, 2 * 2 * 2 * 64)]
        assert pulls[0].duration.count == 4
        assert [link.cluster_id for link in ours.datadist.links()] == [1, 1]
