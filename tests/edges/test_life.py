"""Roles switched by several threads at once, and programs that end in the middle of it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from edges.user import SMALL, User, settings, start_owner
from llm_datadist import LLMRole
from llm_datadist.testing.faults import FaultProxy
from llm_datadist.testing.timing import takes_at_most
from soak.stage import Doing

if TYPE_CHECKING:
    from llm_datadist.testing.cluster import Node, NodeProcess

LISTENS = "0A"


def listening_ports(node: Node) -> list[int]:
    """Where this process listens."""
    inodes = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            inodes.add(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:  # the listing's own
            continue
    ports = []
    for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == LISTENS and f"socket:[{fields[9]}]" in inodes:
            ports.append(int(fields[1].split(":")[1], 16))
    return ports


def switch_from_threads(node: Node, rounds: int) -> list[str]:
    """After each round exactly one port is open: that which the cluster says."""
    node.start(LLMRole.MIX, 1, **settings("tcp"))
    wrong = []
    for round_ in range(rounds):
        together = threading.Barrier(4)

        def switch(role: LLMRole, barrier: threading.Barrier = together) -> None:
            barrier.wait(10)
            node.datadist.switch_role(role, {"llm.listenIpInfo": "127.0.0.1:0"})

        roles = [LLMRole.PROMPT, LLMRole.DECODER, LLMRole.MIX, LLMRole.PROMPT]
        for thread in [Doing(lambda role=role: switch(role)) for role in roles]:  # type: ignore[misc]  # which role
            thread.result(20)
        endpoint, ports = node.datadist.listen_endpoint, listening_ports(node)
        if endpoint is None or ports != [endpoint.port]:
            wrong.append(f"round {round_}: {endpoint}, and listening on {ports}")
    node.datadist.switch_role(LLMRole.DECODER)
    if listening_ports(node) or node.datadist.listen_endpoint is not None:
        wrong.append("a port is still open after the role that has none")
    return wrong


def test_roles_switched_from_several_threads_leave_exactly_one_port_open(
    victim: NodeProcess,
) -> None:
    assert victim.call(switch_from_threads, 30) == []


PROGRAM = """
    import atexit, sys, threading
    from llm_datadist import *
    from llm_datadist.testing.cluster import Node

    node = Node()

    def last():
        "Runs after the library's own handler: everything may be called, and says what it is."
        for call in (node.datadist.finalize, lambda: manager.unregister_cache(1), node.stop):
            try:
                call()
            except (LLMException, RuntimeError) as error:
                assert "finalized" in str(error), error
        print("ended", flush=True)

    atexit.register(last)
    node.start(LLMRole.DECODER, 2, transfer_path="tcp", sync_kv_timeout=2000,
               enable_remote_cache_accessible=True)
    manager = node.manager
    assert node.link(int(sys.argv[1]), 1) == LLMStatusCode.LLM_SUCCESS
    cache = node.blocks_cache(2, 16, 1 << 18)
    blocks = list(range(16))

    def pull():
        while True:
            manager.pull_blocks(BlocksCacheKey(1, 0), cache, blocks, blocks)
            began.set()

    began = threading.Event()
    threading.excepthook = lambda _: None
    threading.Thread(target=pull, daemon=True).start()
    began.wait(10)
    {end}
"""


@pytest.mark.parametrize("end", ["", "raise SystemExit(0)", "node.datadist.finalize()"])
def test_a_program_that_ends_in_the_middle_of_a_pull_ends_in_time(
    peer: NodeProcess, end: str
) -> None:
    """Also when the peer stands still: the handlers at exit are bounded."""
    with FaultProxy(peer.call(start_owner, "tcp")) as proxy:
        program = textwrap.dedent(PROGRAM).replace("{end}", end)
        with takes_at_most(20):
            run = subprocess.run(
                [sys.executable, "-c", program, str(proxy.port)],
                timeout=60,
                capture_output=True,
                text=True,
            )
        assert (run.returncode, run.stderr, run.stdout[-6:]) == (0, "", "ended\n")


def test_ending_twice_from_two_threads_is_one_end(node: Node, peer: NodeProcess) -> None:
    for _ in range(5):
        User(node, "tcp", peer.call(start_owner, "tcp", shape=SMALL), shape=SMALL)
        datadist = node.datadist
        for thread in [Doing(datadist.finalize) for _ in range(2)]:
            thread.result(10)
        node.stop()
        peer.call(type(node).stop)
