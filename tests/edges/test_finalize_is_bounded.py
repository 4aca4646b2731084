"""finalize ends in time whatever others do: slow peers, silent servers, callbacks that hang."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest

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

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

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


@pytest.fixture
def silent_name(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A host whose name server says nothing."""
    answered, look_up = threading.Event(), socket.getaddrinfo

    def getaddrinfo(host: str, *args: Any, **options: Any) -> list[Any]:
        if host == "silent.test":
            answered.wait(60)
        return look_up("127.0.0.1", *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield "silent.test"
    answered.set()


def link_that_is_cut_short(node: Node, host: str, port: int) -> None:
    """A link call of a minute, and finalize in its middle: both end."""
    datadist = node.datadist
    begun = threading.Event()

    def link() -> Any:
        begun.set()
        return datadist.link_clusters([cluster_info(port, 1, host)], 60_000)

    linking = Doing(lambda: status_of(link))
    assert begun.wait(10)
    finalize_in_time(node)
    linking.result(BOUND_S)
    assert datadist is not LLMDataDist.llm_engine_instance


def test_a_name_server_that_says_nothing(node: Node, silent_name: str) -> None:
    for _ in range(3):
        node.start(LLMRole.DECODER, 2, **settings("tcp", TIMEOUT_MS))
        link_that_is_cut_short(node, silent_name, 1)


def test_a_listener_that_accepts_and_says_nothing(node: Node) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        for _ in range(3):
            node.start(LLMRole.DECODER, 2, **settings("tcp", TIMEOUT_MS))
            link_that_is_cut_short(node, "127.0.0.1", server.getsockname()[1])


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
