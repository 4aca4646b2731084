"""finalize ends in time whatever others do: slow peers, silent servers, callbacks that hang."""

from __future__ import annotations

import gc
import socket
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from edges.user import KEY, SUCCESS, User, settings, start_owner, status_of
from llm_datadist import (
    LayerSynchronizer,
    LLMDataDist,
    LLMRole,
    LLMStatusCode,
    TransferWithCacheKeyConfig,
)
from llm_datadist.testing.cluster import Node, NodeProcess, cluster_info
from llm_datadist.testing.faults import FaultProxy
from llm_datadist.testing.timing import takes_at_most
from soak.stage import Doing
from soak.tally import descriptors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pytest

TIMEOUT_MS = 500
#: the time-out of the calls that run, two seconds for the rest, and a busy machine
BOUND_S = TIMEOUT_MS / 1000 + 2.0 + 1.0
BROKEN = """
from llm_datadist.transport.tcp import TcpTransport

class Broken(TcpTransport):
    name = "broken"

    def close(self):
        raise ZeroDivisionError("the fabric is gone")
"""


def finalize_in_time(node: Node) -> None:
    with takes_at_most(BOUND_S):
        node.datadist.finalize()
    assert LLMDataDist.llm_engine_instance is None


def test_a_peer_that_takes_its_answer_slowly_does_not_keep_its_owner(
    node: Node, victim: NodeProcess
) -> None:
    port = start_owner(node, "tcp", TIMEOUT_MS)
    with FaultProxy(port) as proxy:
        victim.call(start_to_pull, proxy.port)
        proxy.slow(1 << 16)  # two minutes for all of it
        before = proxy.nbytes_passed()
        victim.begin(pull)
        while proxy.nbytes_passed() == before:
            pass
        finalize_in_time(node)
        assert victim.result() != SUCCESS


def start_to_pull(node: Node, port: int) -> None:
    User(node, "tcp", port, 60_000)


def pull(node: Node) -> LLMStatusCode:
    blocks = list(range(16))
    return status_of(lambda: node.manager.pull_blocks(KEY, node.caches[1], blocks, blocks))


def test_a_transport_that_cannot_be_closed_is_said_and_the_rest_ends(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "broken_fabric.py").write_text(BROKEN)
    info = tmp_path / "broken_fabric-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-fabric\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[llm_datadist.transports]\nbroken = broken_fabric:Broken\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    names = {thread.name for thread in threading.enumerate()}
    port = start_owner(node, "broken", TIMEOUT_MS)
    finalize_in_time(node)
    assert "ending the transport broken failed: the fabric is gone" in caplog.text
    assert {thread.name for thread in threading.enumerate()} == names
    assert start_owner(node, "tcp", TIMEOUT_MS, port=port) == port


def finalize_while_it_links(
    node: Node, host: str, port: int, has_begun: Callable[[], object]
) -> None:
    """A link call of a minute, and finalize in its middle: both end, and nothing is left."""
    node.start(LLMRole.DECODER, 2, **settings("tcp", TIMEOUT_MS))
    datadist = node.datadist
    infos = [cluster_info(port, 1, host)]
    linking = Doing(lambda: status_of(lambda: datadist.link_clusters(infos, 60_000)))
    has_begun()
    finalize_in_time(node)
    assert linking.result(BOUND_S) == LLMStatusCode.LLM_FAILED


def finalize_beside_a_silent_name_server(node: Node) -> int:
    """The name of the peer is being looked up; how many descriptors are left afterwards."""
    asked, look_up = threading.Semaphore(0), socket.getaddrinfo

    def getaddrinfo(host: str, *args: Any, **options: Any) -> list[Any]:
        if host == "silent.test":
            asked.release()
            threading.Event().wait()
        return look_up(host, *args, **options)

    socket.getaddrinfo = getaddrinfo  # type: ignore[assignment]  # of this process, which ends
    node.start(LLMRole.DECODER, 2, **settings("tcp", TIMEOUT_MS))  # opens what is opened once
    node.stop()
    before = descriptors()
    for _ in range(2):
        finalize_while_it_links(node, "silent.test", 1, lambda: asked.acquire(timeout=10))
    gc.collect()
    return descriptors() - before


def test_a_name_server_that_says_nothing(victim: NodeProcess) -> None:
    """The bound is checked there."""
    victim.call(finalize_beside_a_silent_name_server)


def test_a_listener_that_accepts_and_says_nothing(node: Node) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ExitStack() as kept:
        before = descriptors()
        for count in range(1, 4):
            finalize_while_it_links(
                node,
                "127.0.0.1",
                server.getsockname()[1],
                lambda: kept.enter_context(server.accept()[0]),
            )
            gc.collect()
            assert descriptors() <= before + count


class Hanging(LayerSynchronizer):
    """Computes a layer for ever."""

    def __init__(self) -> None:
        self.asked, self.let_go = threading.Event(), threading.Event()

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        self.asked.set()
        return self.let_go.wait(60)


def test_a_synchronizer_that_never_returns(node: Node, peer: NodeProcess, path: str) -> None:
    user = User(node, path, peer.call(start_owner, path), TIMEOUT_MS)
    hanging, blocks = Hanging(), list(range(16))
    config = TransferWithCacheKeyConfig(KEY, range(1), range(1))
    task = user.manager.transfer_cache_async(user.source, hanging, [config], blocks, blocks)
    assert hanging.asked.wait(10)
    finalize_in_time(node)
    with takes_at_most(1.0):
        assert task.get_results(100) == [LLMStatusCode.LLM_TIMEOUT]
    hanging.let_go.set()
    assert task.synchronize(10_000) not in (SUCCESS, LLMStatusCode.LLM_TIMEOUT)
