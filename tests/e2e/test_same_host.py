"""Links of one host: over which path they are where the ends share less than all of it, and why."""

from __future__ import annotations

import logging
import os
import subprocess
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import numpy as np
import pytest
from rank_members import logged, record_log
from two_hosts import HOSTS, lay_cable, leave_host, start_apart

from isolation import become, hide_tmp, needs_root, unshared
from llm_datadist import BlocksCacheKey, LLMRole, LLMStatusCode
from llm_datadist.testing.cluster import Node, NodeProcess, make_array
from llm_datadist.testing.faults import FaultProxy
from llm_datadist.testing.timing import eventually
from sandbox import forbid_foreign_memory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SUCCESS = LLMStatusCode.LLM_SUCCESS
SHAPE = (4, 16, 4096)
ROLES = (LLMRole.PROMPT, LLMRole.DECODER)
PID_NAMESPACE = "the peer is in another PID namespace: let the containers share one (--pid)"
NETWORK = "the peer is in another network namespace: let the containers share one (--network)"

Pair = tuple[NodeProcess, NodeProcess]


# -- run by the processes --------------------------------------------------------------------------


def start(node: Node, cluster_id: int, host: str = "127.0.0.1", **settings: object) -> int:
    record_log(node)
    logging.getLogger("LLM_DATADIST").setLevel(logging.WARNING)
    role = ROLES[cluster_id - 1]
    port = node.start(role, cluster_id, listen_ip_info=f"{host}:0", **settings)
    node.blocks_cache(*SHAPE, seed=cluster_id, key=BlocksCacheKey(cluster_id))
    return port


def import_all(node: Node) -> None:
    """What another user, or whoever has another /tmp, could not read."""
    port = start(node, 1)
    node.link(port, host="localhost")
    node.stop()


def pulls(node: Node, cluster_id: int) -> bool:
    cache, blocks = node.blocks_cache(*SHAPE), list(range(SHAPE[1]))
    node.manager.pull_blocks(BlocksCacheKey(cluster_id), cache, blocks, blocks[::-1])
    return np.array_equal(node.arrays[cache.cache_id], make_array(SHAPE, cluster_id)[:, ::-1])


def way(node: Node) -> tuple[str, str]:
    [link] = node.datadist.links()
    return link.path, link.path_reason


def num_links(node: Node) -> int:
    return len(node.datadist.links())


def tcp_connections(_: Node) -> set[str]:
    """The TCP connections of this process, but for those that only listen."""
    listens = "0A"
    mine = set()
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the one that lists them
            mine.add(os.readlink(f"/proc/self/fd/{fd}"))
    with open("/proc/self/net/tcp") as table:
        rows = [line.split() for line in table][1:]
    ours = [row for row in rows if f"socket:[{row[9]}]" in mine]
    return {f"{row[1]}-{row[2]}" for row in ours if row[3] != listens}


# -- pairs of them ---------------------------------------------------------------------------------


@pytest.fixture
def here() -> Iterator[NodeProcess]:
    """A process like any other."""
    with NodeProcess() as process:
        yield process


def link(one: NodeProcess, other: NodeProcess, host: str = "127.0.0.1") -> list[tuple[str, str]]:
    """Links them, moves blocks both ways; the path and its reason at the caller, at the called."""
    port = one.call(start, 1, host)
    other.call(start, 2)
    assert other.call(Node.link, port, 1, host=host) == SUCCESS
    assert other.call(pulls, 1)
    assert one.call(pulls, 2)
    return [other.call(way), one.call(way)]


def warnings(process: NodeProcess) -> list[str]:
    """What it said of the path, at WARNING or above."""
    lines = process.call(logged).splitlines()
    return [line for line in lines if "because cma is not available" in line]


# -- tests -----------------------------------------------------------------------------------------


def test_private_mounts_do_not_matter(here: NodeProcess, tmp_path: Path) -> None:
    """The socket is no file: neither /tmp nor any directory need be the same at both ends."""
    with unshared(tmp_path, "--mount") as apart:
        apart.call(import_all)  # which may lie there
        apart.call(hide_tmp)
        assert link(here, apart) == [("cma", ""), ("cma", "")]


@needs_root
@pytest.mark.parametrize("is_caller", [False, True], ids=["called", "calls"])
def test_a_process_that_does_not_see_the_other_one_is_linked_by_tcp(
    here: NodeProcess, is_caller: bool
) -> None:
    """It knows that there is somebody, and no number for it."""
    with start_apart() as apart:
        pair = (here, apart) if is_caller else (apart, here)
        [(path, reason), at_called] = link(*pair)
        assert (path, at_called) == ("tcp", ("tcp", reason))
        assert PID_NAMESPACE in reason
        assert len(warnings(pair[1])) == 1


@needs_root
def test_two_processes_that_do_not_see_each_other_are_linked_by_tcp() -> None:
    with start_apart() as one, start_apart() as other:
        assert link(one, other) == [("tcp", f"cma: {PID_NAMESPACE}")] * 2


def test_from_another_user_namespace_the_system_does_not_let_it_read(
    here: NodeProcess, tmp_path: Path
) -> None:
    """A process may not read those of a namespace around its own, whoever it is in there."""
    with unshared(tmp_path, "--user", "--map-root-user") as apart:
        [(path, reason), _] = link(here, apart)
        assert path == "tcp"
        assert "cma: process_vm_readv" in reason
        assert "in a container, allow it" in reason


@needs_root
def test_another_network_namespace_of_this_host_is_named_once() -> None:
    with NodeProcess() as one, NodeProcess() as other:
        pair = [one, other]
        try:
            for process in pair:
                process.call(leave_host)
            lay_cable(pair)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"a cable between namespaces needs nsenter, iproute2 and veth: {error}")
        [at_caller, at_other] = link(one, other, HOSTS[0])
        assert at_caller == ("tcp", f"cma: {NETWORK}")
        assert at_other == at_caller
        [warning] = warnings(other)
        assert NETWORK in warning
        assert warnings(one) == []


@needs_root
@pytest.mark.parametrize("is_caller", [False, True], ids=["called", "calls"])
def test_another_user_is_linked_by_tcp(here: NodeProcess, is_caller: bool) -> None:
    """Though one of them, root, could read the other."""
    with NodeProcess() as apart:
        apart.call(import_all)
        apart.call(become, 65534)
        pair = (here, apart) if is_caller else (apart, here)
        ways = link(*pair)
        assert [path for path, _ in ways] == ["tcp", "tcp"]
        at_caller = "here 65534, the peer 0" if is_caller else "here 0, the peer 65534"
        assert f"run both processes as the same user ({at_caller})" in ways[0][1]
        assert len(warnings(pair[1])) == 1


@pytest.mark.parametrize("is_caller", [False, True], ids=["called", "calls"])
def test_a_process_that_may_not_read_others_is_linked_by_tcp(
    here: NodeProcess, is_caller: bool
) -> None:
    with NodeProcess() as apart:
        apart.call(forbid_foreign_memory)
        pair = (here, apart) if is_caller else (apart, here)
        [(path, reason), at_called] = link(*pair)
        assert (path, at_called) == ("tcp", ("tcp", reason))
        assert "process_vm_readv" in reason


def test_a_link_of_one_host_has_no_tcp_connection(is_accessible: bool) -> None:
    """Neither its control connection nor any stream, whoever asks: they are Unix sockets."""
    settings = {"enable_remote_cache_accessible": is_accessible}
    with ExitStack() as stack:
        one, other = (stack.enter_context(NodeProcess()) for _ in ROLES)
        proxy = stack.enter_context(FaultProxy(one.call(start, 1, **settings)))
        other.call(start, 2, **settings)
        assert other.call(Node.link, proxy.port, 1) == SUCCESS
        assert other.call(way) == ("cma", "")
        assert eventually(lambda: proxy.num_connections == 0)
        passed = proxy.nbytes_passed(), proxy.nbytes_passed(to_caller=False)
        proxy.cut()  # nobody can call there any more
        for _ in range(3):
            assert other.call(pulls, 1)
            assert one.call(pulls, 2)
        assert (proxy.nbytes_passed(), proxy.nbytes_passed(to_caller=False)) == passed
        assert one.call(tcp_connections) == set() == other.call(tcp_connections)
        assert other.call(Node.unlink, proxy.port, 1) == SUCCESS
        assert eventually(lambda: one.call(num_links) == 0)
