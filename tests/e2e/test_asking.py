"""A running cluster says how it is to whoever asks, as far as its link security allows."""

from __future__ import annotations

import json
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest
import trustme

from llm_datadist import CacheDesc, CacheKey, DataType, LLMException, LLMRole, LLMStatusCode
from llm_datadist.core import messages as m
from llm_datadist.core.frames import FrameReader
from llm_datadist.endpoint import Endpoint
from llm_datadist.link_security import LinkSecurity
from llm_datadist.options import read_link_security
from llm_datadist.peer.asking import ask_stats
from llm_datadist.testing.cluster import Node, NodeProcess
from llm_datadist.testing.timing import takes_at_most

if TYPE_CHECKING:
    from llm_datadist.core.stats import ClusterStats

SECRET = json.dumps({"secret": "a secret of more than sixteen bytes"})
OTHER = json.dumps({"secret": "another secret of many bytes"})
POOL = '{"memory_size": 1048576}'


def ask(port: int, security: str = "", timeout_s: float = 5.0) -> ClusterStats:
    parsed = LinkSecurity.parse(security) if security else None
    return ask_stats(Endpoint("127.0.0.1", port), parsed, timeout_s)


def start(node: Node, peer: NodeProcess, security: str = "") -> int:
    """Cluster 1 here, with a key in its pool, linked to a cluster 2 that it called."""
    theirs = peer.call(
        Node.start, LLMRole.DECODER, 2, listen_ip_info="127.0.0.1:0", link_security=security
    )
    port = node.start(
        LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", link_security=security, mem_pool_cfg=POOL
    )
    node.manager.allocate_cache(CacheDesc(1, [1, 64], DataType.DT_INT8), [CacheKey(1, 77)])
    assert node.link(theirs, 2) == LLMStatusCode.LLM_SUCCESS
    return port


def test_a_cluster_answers_who_is_not_linked(node: Node, peer: NodeProcess) -> None:
    stats = ask(start(node, peer))
    ours = node.datadist.stats()
    assert (stats.cluster_id, stats.num_links, stats.num_keys) == (1, 1, 1)
    assert stats.pools == ours.pools
    assert [(link.peer, link.path) for link in stats.links] == [(2, ours.links[0].path)]
    assert len(node.datadist.links()) == 1, "asking makes no link"


def test_an_address_without_a_route_does_not_end_the_dialling(
    node: Node, peer: NodeProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = start(node, peer)

    def two_addresses(_host: str, port: int, **_: Any) -> list[Any]:
        stream = (socket.SOCK_STREAM, 6, "")
        return [
            (socket.AF_INET, *stream, ("255.255.255.255", port)),  # ENETUNREACH for a stream
            (socket.AF_INET, *stream, ("127.0.0.1", port)),
        ]

    monkeypatch.setattr(socket, "getaddrinfo", two_addresses)
    assert ask_stats(Endpoint("two.example", port), None, 5.0).cluster_id == 1


def test_without_link_security_addresses_and_keys_are_kept_back(
    node: Node, peer: NodeProcess
) -> None:
    stats = ask(start(node, peer))
    assert node.datadist.stats().links[0].endpoint
    assert stats.links[0].endpoint == ""
    assert stats.oldest_key is not None
    assert (stats.oldest_key.id, stats.oldest_key.model_id) == (None, None)


def test_who_has_the_secret_learns_all(node: Node, peer: NodeProcess) -> None:
    stats, ours = ask(start(node, peer, SECRET), SECRET), node.datadist.stats()
    assert stats.links == ours.links
    assert stats.oldest_key is not None
    assert stats.oldest_key.id == 77


def test_the_environment_gives_the_secret(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    port = node.start(LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", link_security=SECRET)
    monkeypatch.setenv("LLM_DATADIST_LINK_SECURITY", SECRET)
    stats = ask_stats(Endpoint("127.0.0.1", port), read_link_security({}), 5.0)
    assert stats.cluster_id == 1


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A `link_security` by mutual TLS."""
    folder, ca = tmp_path_factory.mktemp("certificates"), trustme.CA()
    leaf = ca.issue_cert("cluster.example")
    ca.cert_pem.write_to_path(str(folder / "ca.pem"))
    leaf.private_key_pem.write_to_path(str(folder / "key.pem"))
    (folder / "certificate.pem").write_bytes(b"".join(b.bytes() for b in leaf.cert_chain_pems))
    return json.dumps({name: f"{folder}/{name}.pem" for name in ("ca", "certificate", "key")})


def test_tls_asks_for_a_certificate(node: Node, certificates: str) -> None:
    port = node.start(LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", link_security=certificates)
    assert ask(port, certificates).cluster_id == 1
    for other in ("", SECRET):
        with takes_at_most(5.0), pytest.raises(LLMException, match="same link security"):
            ask(port, other)


@pytest.mark.parametrize("security", ["", OTHER], ids=["none", "another"])
def test_who_lacks_the_secret_learns_nothing(node: Node, security: str) -> None:
    port = node.start(LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", link_security=SECRET)
    with takes_at_most(5.0), pytest.raises(LLMException, match="same link security") as error:
        ask(port, security)
    assert error.value.status_code == LLMStatusCode.LLM_NOT_YET_LINK
    assert ask(port, SECRET).cluster_id == 1


def test_nobody_there_says_so(node: Node) -> None:
    port = node.start(LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0")
    node.stop()
    with pytest.raises(LLMException, match=f"cannot connect to 127.0.0.1:{port}") as error:
        ask(port)
    assert error.value.status_code == LLMStatusCode.LLM_LINK_FAILED


def test_somebody_silent_is_a_timeout() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        takes_at_most(1.0),
        pytest.raises(LLMException) as error,
    ):
        ask(silent.getsockname()[1], timeout_s=0.2)
    assert error.value.status_code == LLMStatusCode.LLM_TIMEOUT


def test_a_silent_name_server_is_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    answered, look_up = threading.Event(), socket.getaddrinfo

    def getaddrinfo(host: str, *args: Any, **options: Any) -> list[Any]:
        answered.wait(30)
        return look_up("127.0.0.1", *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    try:
        with takes_at_most(1.0), pytest.raises(LLMException, match=r"silent\.test") as error:
            ask_stats(Endpoint("silent.test", 1), None, 0.2)
    finally:
        answered.set()
    assert error.value.status_code == LLMStatusCode.LLM_TIMEOUT


def test_the_connection_ends_with_the_answer(node: Node) -> None:
    port = node.start(LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0")
    came: list[m.AnyMessage] = []
    reader = FrameReader()
    with socket.create_connection(("127.0.0.1", port), 5) as sock:
        sock.sendall(m.encode(m.AskStats()))
        while data := sock.recv(65536):
            reader.feed(data)
            came.extend(reader)
    assert [type(message) for message in came] == [m.Stats]
