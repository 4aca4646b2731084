"""`llm-datadist doctor --peer` links to a running cluster, says how it is, and leaves no trace."""

from __future__ import annotations

import ctypes
import json
import socket
import subprocess
import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
from doctor_command import WITHOUT_FOREIGN_MEMORY, ask, ask_here

from llm_datadist import BlocksCacheKey, LLMRole, LLMStatusCode
from llm_datadist.testing.cluster import Node, NodeProcess, make_array
from llm_datadist.testing.timing import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

ID = 4711
KEY = BlocksCacheKey(ID, 0)
SHAPE = (2, 8, 64)
SECURITY = json.dumps({"secret": "a secret of more than sixteen bytes"})
OTHER_NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc")


def start(peer: NodeProcess, *, is_accessible: bool = True, security: str | None = None) -> int:
    settings = {} if security is None else {"link_security": security}
    return peer.call(
        Node.start, LLMRole.PROMPT, ID, listen_ip_info="127.0.0.1:0",
        enable_remote_cache_accessible=is_accessible, **settings,
    )  # fmt: skip


def publish(node: Node) -> None:
    node.blocks_cache(*SHAPE, seed=1, key=BlocksCacheKey(0, 0))


def linked_ids(node: Node) -> list[int]:
    return [link.cluster_id for link in node.datadist.links()]


def test_a_running_cluster_is_described_and_goes_on_as_before(
    node: Node, peer: NodeProcess, is_accessible: bool
) -> None:
    port = start(peer, is_accessible=is_accessible)
    peer.call(publish)
    node.start(LLMRole.DECODER, 1, enable_remote_cache_accessible=is_accessible)
    assert node.link(port, ID) == LLMStatusCode.LLM_SUCCESS
    said = ask("--peer", f"127.0.0.1:{port}")
    assert said.problems() == set()
    data = said.findings["link"]["data"]
    assert data["cluster_id"] == ID
    assert data["mode"] == ("remote-accessible" if is_accessible else "two-sided")
    assert data["protocol"] == 1
    assert data["our_cluster_id"] not in (ID, 1)
    assert 0 < data["link_s"] < 3
    assert said.findings["path"]["data"] == {"path": "cma", "path_reason": ""}
    assert 0 < said.findings["round trip"]["data"]["round_trip_s"] < 1
    assert eventually(lambda: peer.call(linked_ids) == [1])
    cache = node.blocks_cache(*SHAPE)
    node.manager.pull_blocks(KEY, cache, list(range(8)), list(range(8)))
    np.testing.assert_array_equal(node.arrays[cache.cache_id], make_array(SHAPE, 1))


#: of the peer's process, which other tests have after this one
LET_GO = threading.Event()


def let_go_of_the_gil(node: Node) -> None:
    LET_GO.set()


def keep_the_gil(node: Node) -> None:
    """Most of the time, in pieces, as some extension modules do."""

    LET_GO.clear()

    def keep() -> None:
        while not LET_GO.is_set():
            ctypes.PyDLL(None).usleep(150_000)  # PyDLL: without letting go
            time.sleep(0.005)

    threading.Thread(target=keep, daemon=True).start()


def test_a_peer_that_holds_the_gil_is_told_from_a_slow_network(peer: NodeProcess) -> None:
    port = start(peer, is_accessible=False)
    peer.call(keep_the_gil)
    try:
        said = ask("--peer", f"127.0.0.1:{port}")
    finally:
        peer.call(let_go_of_the_gil)
    assert said.state_of("round trip") == "note"
    data = said.findings["round trip"]["data"]
    assert data["slowest_s"] > 0.1 > data["kernel_s"]
    assert "a C call in it holds the GIL" in said.text("round trip")


def test_security_of_the_environment_is_what_it_links_with(peer: NodeProcess) -> None:
    port = start(peer, security=SECURITY)
    there = ("--peer", f"localhost:{port}")
    assert ask(*there, security=SECURITY).state_of("round trip") == "ok"
    for other in ("", json.dumps({"secret": "another secret of sixteen bytes"})):
        said = ask_here(*there, security=other)
        assert said.problems() == {"link"}
        assert f"localhost:{port} could not be linked" in said.text("link")
        assert "both ends need the same" in said.text("link")
    assert peer.call(linked_ids) == []


def test_a_slow_path_that_could_be_mended_is_a_problem(peer: NodeProcess) -> None:
    port = start(peer, is_accessible=False)
    said = ask("--peer", f"127.0.0.1:{port}", wrapper=WITHOUT_FOREIGN_MEMORY)
    assert said.problems() == {"path", "seccomp"}
    assert said.text("path").startswith("tcp, verified in both directions")
    assert "Operation not permitted; in a container, allow it" in said.text("path")
    assert said.state_of("round trip") == "ok"


def test_another_pid_namespace_is_named(peer: NodeProcess) -> None:
    try:
        subprocess.run([*OTHER_NAMESPACE, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"PID namespaces need privileges and util-linux: {error}")
    port = start(peer)
    said = ask("--peer", f"127.0.0.1:{port}", wrapper=OTHER_NAMESPACE)
    assert said.problems() == {"path"}
    assert "let the containers share one" in said.text("path")
    assert said.findings["PID namespace"]["data"]["is_host"] is False


@pytest.fixture
def talker() -> Iterator[int]:
    """A port at which something else than a cluster listens, and speaks first."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            with server.accept()[0] as sock:
                sock.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
                sock.recv(1024)

        thread = threading.Thread(target=greet)
        thread.start()
        yield server.getsockname()[1]
        thread.join()


def test_what_is_no_cluster_is_told_from_one(talker: int) -> None:
    said = ask_here("--peer", f"127.0.0.1:{talker}")
    assert said.problems() == {"link"}
    assert said.findings["link"]["data"]["status"] == "LLM_FAILED"
    assert "is it a cluster? LLM_DATADIST_LINK_SECURITY is not set here" in said.text("link")


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    said = ask_here("--peer", f"127.0.0.1:{port}")
    assert said.problems() == {"link"}
    assert said.findings["link"]["data"]["status"] == "LLM_LINK_FAILED"
    assert "the peer must listen there" in said.text("link")
