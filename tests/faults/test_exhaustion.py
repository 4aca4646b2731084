"""Something runs out: memory, addresses, disk. A clear error, and all well afterwards.

What harms a whole process happens in one of its own.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from scarcity import (
    GIVEN_OUT,
    KEY,
    SHAPE,
    SUCCESS,
    TIMEOUT_MS,
    descriptors,
    in_time,
    pull,
    start_owner,
    start_puller,
)

from llm_datadist import (
    CacheDesc,
    DataType,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
)
from llm_datadist.testing.cluster import Node, NodeProcess, cluster_info

if TYPE_CHECKING:
    from collections.abc import Iterator

NO_MEMORY = LLMStatusCode.LLM_OUT_OF_MEMORY


# -- memory ----------------------------------------------------------------------------------------


def allocate(node: Node, blocks: int) -> Any:
    desc = CacheDesc(SHAPE[0], [blocks, SHAPE[2]], DataType.DT_INT8)
    return node.manager.allocate_blocks_cache(desc)


@pytest.mark.shows("pool.exhausted")
def test_threads_that_exhaust_a_pool_leave_it_whole(
    node: Node, peer: NodeProcess, path: str
) -> None:
    """Each allocates, pulls and frees; the pool has room for a third of them."""
    port = start_owner(peer, path)
    nbytes = SHAPE[0] * SHAPE[1] * SHAPE[2]
    start_puller(node, path, mem_pool_cfg=json.dumps({"memory_size": 3 * nbytes}))
    assert node.link(port, 1) == SUCCESS
    together = threading.Barrier(8)

    def work() -> list[LLMStatusCode]:
        statuses = []
        for _ in range(10):
            together.wait(20)
            try:
                cache = allocate(node, SHAPE[1])
            except LLMException as error:
                statuses.append(error.status_code)
                together.wait(20)
                continue
            node.manager.pull_blocks(KEY, cache, [0], [1])
            statuses.append(SUCCESS)
            together.wait(20)
            node.manager.deallocate_blocks_cache(cache)
        return statuses

    with ThreadPoolExecutor(8) as pool:
        rounds = [call.result(60) for call in [pool.submit(work) for _ in range(8)]]
    for statuses in zip(*rounds, strict=True):
        assert set(statuses) == {SUCCESS, NO_MEMORY}
        assert statuses.count(SUCCESS) <= 3
    (usage,) = next(iter(node.datadist.pools().values()))
    assert usage.free_nbytes == usage.capacity_nbytes == usage.largest_free_nbytes
    assert pull(node) == SUCCESS


def test_a_pool_that_the_system_refuses_is_out_of_memory_and_init_may_be_tried_again(
    peer: NodeProcess, victim: NodeProcess
) -> None:
    port = start_owner(peer, "tcp")
    statuses = victim.call(start_with_too_much)
    assert statuses == [NO_MEMORY] * 3
    assert victim.call(Node.link, port, 1) == SUCCESS
    assert victim.call(pull) == SUCCESS


def start_with_too_much(node: Node) -> list[LLMStatusCode]:
    """The address space ends soon; then a pool of moderate size is tried."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), limits[1]))
    statuses = []
    before = descriptors(node)
    for _ in range(3):
        try:
            node.start(LLMRole.DECODER, 2, mem_pool_cfg=json.dumps({"memory_size": 8 << 30}))
        except LLMException as error:
            statuses.append(error.status_code)
    assert descriptors(node) == before
    start_puller(node, "tcp", mem_pool_cfg=json.dumps({"memory_size": 1 << 20}))
    return statuses


# -- addresses -------------------------------------------------------------------------------------


def test_of_all_that_want_one_port_one_gets_it_and_the_others_may_try_again(
    node: Node, victim: NodeProcess
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    start_owner(victim, "tcp", f"127.0.0.1:{port}")
    for _ in range(3):
        with pytest.raises(LLMException, match=rf"127\.0\.0\.1:{port}.*another process") as error:
            start_puller(node, "tcp", listen_ip_info=f"127.0.0.1:{port}")
        assert error.value.status_code == LLMStatusCode.LLM_FAILED
        assert LLMDataDist.llm_engine_instance is None
    start_puller(node, "tcp", listen_ip_info="127.0.0.1:0")
    assert node.link(port, 1) == SUCCESS
    assert pull(node) == SUCCESS
    node.stop()
    victim.kill()  # the port of the dead is free at once
    start_puller(node, "tcp", listen_ip_info=f"127.0.0.1:{port}")


#: of a range that is for documentation only
ADDRESS = "198.51.100.77"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=10)


@pytest.fixture
def address() -> Iterator[str]:
    """An address of this machine that can be removed."""
    if shutil.which("ip") is None:
        pytest.skip("there is no ip(8)")
    try:
        ip("addr", "add", f"{ADDRESS}/32", "dev", "lo")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"addresses cannot be added here: {error.stderr!r}")
    yield ADDRESS
    subprocess.run(["ip", "addr", "del", f"{ADDRESS}/32", "dev", "lo"], capture_output=True)


def test_a_listener_whose_address_is_gone_is_a_clear_error_until_it_is_back(
    node: Node, victim: NodeProcess, address: str
) -> None:
    port = start_owner(victim, "tcp", f"{address}:0")
    start_puller(node, "tcp")
    assert node.link(port, 1, host=address) == SUCCESS
    assert pull(node) == SUCCESS
    ip("addr", "del", f"{address}/32", "dev", "lo")
    with in_time():
        assert pull(node) in {SUCCESS, *GIVEN_OUT}  # open connections may or may not survive
    node.datadist.unlink_clusters([cluster_info(port, 1, address)], TIMEOUT_MS, force=True)
    with in_time():
        assert node.link(port, 1, TIMEOUT_MS, host=address) in GIVEN_OUT
    with in_time():
        assert pull(node) == LLMStatusCode.LLM_NOT_YET_LINK
    ip("addr", "add", f"{address}/32", "dev", "lo")
    assert node.link(port, 1, host=address) == SUCCESS
    assert pull(node) == SUCCESS


# -- disk ------------------------------------------------------------------------------------------


def log_to_a_full_disk(node: Node) -> None:
    """Every record, in both ways that programs log: a file of their own, and the output."""
    logger = logging.getLogger("LLM_DATADIST")
    logger.addHandler(logging.FileHandler("/dev/full"))
    logger.addHandler(logging.StreamHandler(open("/dev/full", "w")))  # noqa: SIM115
    logger.setLevel(logging.DEBUG)
    sys.stderr = open("/dev/full", "w")  # noqa: SIM115  # where logging complains about it


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_logs_that_cannot_be_written_harm_nothing(
    node: Node, peer: NodeProcess, victim: NodeProcess, path: str
) -> None:
    victim.call(log_to_a_full_disk)
    port = start_owner(victim, path)
    with socket.create_connection(("127.0.0.1", port), 5) as stranger:  # whom the loop logs
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert stranger.recv(100) == b""
    start_puller(node, path)
    for _ in range(3):
        assert node.link(port, 1) == SUCCESS
        assert pull(node) == SUCCESS
        assert node.unlink(port, 1) == SUCCESS
    node.stop()
    victim.call(Node.stop)
    port = start_owner(peer, path)
    victim.call(start_puller, path)
    assert victim.call(Node.link, 9, 7) == LLMStatusCode.LLM_LINK_FAILED  # which is logged
    assert victim.call(pull) == LLMStatusCode.LLM_NOT_YET_LINK
    assert victim.call(Node.link, port, 1) == SUCCESS
    assert victim.call(pull) == SUCCESS
