"""Links that ask who is there: by a shared secret, or by mutual TLS."""

from __future__ import annotations

import json
import logging
import mmap
import socket
import sys
import threading
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import trustme

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    DataType,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
)
from llm_datadist.testing.cluster import Node, NodeProcess, addrs_of, make_array
from llm_datadist.testing.timing import eventually, takes_at_most
from llm_datadist.transport import ktls

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from llm_datadist.links.table import LinkInfo

SUCCESS = LLMStatusCode.LLM_SUCCESS
KEY = BlocksCacheKey(1, 0)
SHAPE = (4, 64, 32 * 1024)
SECRET = "a secret of more than sixteen bytes"
BY_SECRET = json.dumps({"secret": SECRET})


class Authority:
    """A CA, and certificates of it as files."""

    def __init__(self, folder: Path, name: str) -> None:
        ca, leaf = trustme.CA(), folder / f"{name}-leaf.pem"
        certificate = ca.issue_cert("cluster.example")
        self.ca, self.key = folder / f"{name}-ca.pem", folder / f"{name}-key.pem"
        ca.cert_pem.write_to_path(str(self.ca))
        certificate.private_key_pem.write_to_path(str(self.key))
        leaf.write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
        self.certificate = leaf

    def option(self, trusted: Authority | None = None) -> str:
        """A `link_security` with this authority's certificate, which trusts another's."""
        ca = (trusted or self).ca
        fields = {"ca": ca, "certificate": self.certificate, "key": self.key}
        return json.dumps({name: str(path) for name, path in fields.items()})


@pytest.fixture(scope="session")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> tuple[Authority, Authority]:
    folder = tmp_path_factory.mktemp("authorities")
    return Authority(folder, "ours"), Authority(folder, "theirs")


@pytest.fixture(params=["secret", "tls"])
def security(request: pytest.FixtureRequest, authorities: tuple[Authority, Authority]) -> str:
    return BY_SECRET if request.param == "secret" else authorities[0].option()


def own_blocks(node: Node, seed: int) -> int:
    return node.blocks_cache(*SHAPE, seed=seed, key=KEY).cache_id


def start_pair(node: Node, peer: NodeProcess, **settings: Any) -> int:
    """An owner of blocks in the other process; this one is not linked yet."""
    port = peer.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **settings)
    peer.call(own_blocks, 1)
    node.start(LLMRole.DECODER, 2, **settings)
    return port


def test_links_that_trust_each_other_move_bytes(
    node: Node, peer: NodeProcess, path: str, is_accessible: bool, security: str
) -> None:
    port = start_pair(
        node, peer, transfer_path=path, enable_remote_cache_accessible=is_accessible,
        link_security=security,
    )  # fmt: skip
    assert node.link(port, 1) == SUCCESS
    assert node.datadist.links()[0].path == path
    cache = node.blocks_cache(*SHAPE)
    src = list(range(0, 64, 2))
    dst = list(reversed(src))
    node.manager.pull_blocks(KEY, cache, src, dst)
    expected = np.zeros(SHAPE, np.uint8)
    expected[:, dst] = make_array(SHAPE, 1)[:, src]
    np.testing.assert_array_equal(node.arrays[cache.cache_id], expected)
    assert node.unlink(port, 1) == SUCCESS
    assert node.link(port, 1) == SUCCESS


AEAD = "cryptography.hazmat.primitives.ciphers.aead"


def hide_ciphers(node: Node, *, is_hidden: bool) -> None:
    """As if the package were not installed in that process."""
    sys.modules.pop(AEAD, None)
    if is_hidden:
        sys.modules[AEAD] = None  # type: ignore[assignment]


def links(node: Node) -> list[LinkInfo]:
    return node.datadist.links()


@pytest.mark.parametrize("without", ["caller", "listener", "nobody"])
def test_records_are_for_two_ends_that_can(
    node: Node, peer: NodeProcess, authorities: tuple[Authority, Authority], without: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """An end that cannot seals by TLS alone, whoever it meets, and so does the other."""
    if without == "caller":
        monkeypatch.setitem(sys.modules, AEAD, None)  # Python's word for what is missing
    settings = {"transfer_path": "tcp", "link_security": authorities[0].option()}
    peer.call(hide_ciphers, is_hidden=without == "listener")
    try:
        port = start_pair(node, peer, **settings)
    finally:
        peer.call(hide_ciphers, is_hidden=False)
    assert node.link(port, 1) == SUCCESS
    expected = "tls-records" if without == "nobody" else "tls"
    if not ktls.why_not():  # that needs no package
        expected = "ktls"
    [here], [there] = node.datadist.links(), peer.call(links)
    assert (here.encryption, there.encryption) == (expected, expected)
    cache = node.blocks_cache(*SHAPE)
    node.manager.pull_blocks(KEY, cache, [1, 2, 3], [3, 9, 7])
    expected_bytes = make_array(SHAPE, 1)[:, [1, 2, 3]]
    np.testing.assert_array_equal(node.arrays[cache.cache_id][:, [3, 9, 7]], expected_bytes)


def array_of(node: Node, cache_id: int) -> Any:
    return node.arrays[cache_id]


def test_a_listener_pushes_over_a_link_that_its_caller_made(
    node: Node, peer: NodeProcess, path: str, security: str
) -> None:
    settings: dict[str, Any] = {
        "transfer_path": path, "enable_remote_cache_accessible": True, "link_security": security,
    }  # fmt: skip
    port = node.start(LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **settings)
    cache = node.blocks_cache(*SHAPE, seed=3)
    peer.call(Node.start, LLMRole.DECODER, 2, **settings)
    cache_id = peer.call(own_blocks, 4)
    assert peer.call(Node.link, port, 1) == SUCCESS
    assert eventually(lambda: len(node.datadist.links()) == 1)
    node.manager.push_blocks(BlocksCacheKey(2, 0), cache, [5, 6], [1, 0])
    got, source = peer.call(array_of, cache_id), make_array(SHAPE, 3)
    np.testing.assert_array_equal(got[:, [1, 0]], source[:, [5, 6]])
    np.testing.assert_array_equal(got[:, 2:], make_array(SHAPE, 4)[:, 2:])


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was logged at WARNING or above, so far."""
    caplog.set_level(logging.WARNING, "LLM_DATADIST")
    return lambda: [record.getMessage() for record in caplog.records]


def link_to(node: Node, port: int, peer: NodeProcess, security: str) -> LLMStatusCode:
    """From a peer with that security; afterwards it is stopped."""
    peer.call(Node.start, LLMRole.DECODER, 2, link_security=security)
    try:
        return peer.call(Node.link, port, 1)
    finally:
        peer.call(Node.stop)


@pytest.mark.parametrize("wrong", ["other", "none", "other-kind"])
def test_wrong_or_missing_credentials_are_refused_and_logged_once(
    node: Node, peer: NodeProcess, authorities: tuple[Authority, Authority], security: str,
    wrong: str, warnings: Callable[[], list[str]],
) -> None:  # fmt: skip
    ours, theirs = authorities
    is_secret = security == BY_SECRET
    other_secret = json.dumps({"secret": "another secret of many bytes"})
    attempts = {
        "other": other_secret if is_secret else theirs.option(),
        "none": "",
        "other-kind": ours.option() if is_secret else BY_SECRET,
    }
    port = node.start(LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", link_security=security)
    for _ in range(3):
        with takes_at_most(3.6):
            status = link_to(node, port, peer, attempts[wrong])
        assert status in (LLMStatusCode.LLM_LINK_FAILED, LLMStatusCode.LLM_FAILED)
    assert node.datadist.links() == []
    assert len([line for line in warnings() if "127.0.0.1" in line]) == 1, warnings()
    assert not any(SECRET in line for line in warnings())
    assert link_to(node, port, peer, security) == SUCCESS


def test_an_open_listener_is_not_for_a_caller_that_wants_security(
    node: Node, peer: NodeProcess, security: str
) -> None:
    port = node.start(LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0")
    with takes_at_most(3.6):
        assert link_to(node, port, peer, security) != SUCCESS
    assert node.datadist.links() == []
    assert link_to(node, port, peer, "") == SUCCESS


def test_a_stranger_learns_nothing(node: Node, security: str) -> None:
    """No word of ours before the credential: not our id, not our caches, not our version."""
    port = node.start(LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", link_security=security)
    with socket.create_connection(("127.0.0.1", port), 5) as sock:
        sock.settimeout(5)
        sock.sendall(b"\x31\x44\x44\x4c" + bytes(60))
        came = b""
        while data := sock.recv(4096):
            came += data
    assert len(came) <= 16, "an alert of TLS at most"


class Relay:
    """Passes bytes between a caller and a listener, and keeps what the caller said."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self.said: list[bytearray] = []
        self.answered: list[bytearray] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._server.accept()
            except OSError:
                return
            listener = socket.create_connection(("127.0.0.1", self._port))
            for source, target, kept in (
                (caller, listener, self.said), (listener, caller, self.answered)
            ):  # fmt: skip
                kept.append(bytearray())
                threading.Thread(
                    target=self._pass, args=(source, target, kept[-1]), daemon=True
                ).start()

    @staticmethod
    def _pass(source: socket.socket, target: socket.socket, kept: bytearray) -> None:
        try:
            while data := source.recv(65536):
                kept += data
                target.sendall(data)
        except OSError:
            pass
        finally:
            for sock in (source, target):
                sock.close()

    def close(self) -> None:
        self._server.close()


@pytest.fixture
def relayed(node: Node, peer: NodeProcess, security: str) -> Any:
    """Blocks that were pulled over TCP through a relay."""
    settings = {"transfer_path": "tcp", "link_security": security}
    relay = Relay(start_pair(node, peer, **settings))
    assert node.link(relay.port, 1) == SUCCESS
    cache = node.blocks_cache(*SHAPE)
    node.manager.pull_blocks(KEY, cache, [7], [0])
    np.testing.assert_array_equal(node.arrays[cache.cache_id][:, 0], make_array(SHAPE, 1)[:, 7])
    yield relay
    relay.close()


def test_only_tls_hides_the_bytes_on_the_wire(relayed: Relay, security: str) -> None:
    block = make_array(SHAPE, 1)[0, 7, :256].tobytes()
    is_readable = any(block in answer for answer in relayed.answered)
    assert is_readable == (security == BY_SECRET)
    assert not any(SECRET.encode() in bytes(said) for said in (*relayed.said, *relayed.answered))


def test_what_a_caller_said_is_of_no_use_again(relayed: Relay, node: Node) -> None:
    with ExitStack() as stack:
        socks: list[socket.socket] = []
        for said in list(relayed.said):  # all at once: each is heard out for ten seconds
            sock = socket.create_connection(("127.0.0.1", relayed._port), 5)
            socks.append(stack.enter_context(sock))
            sock.settimeout(15)
            sock.sendall(bytes(said))
        for sock in socks:
            came = b""
            with suppress(ConnectionResetError):
                while data := sock.recv(65536):
                    came += data
            assert node.datadist.links()[0].cluster_id == 1, "the honest link goes on"
            assert len(came) < SHAPE[2], "a replay gets no bytes of a cache"


def own_hole(node: Node, size: int) -> int:
    """Blocks of which the last half is mapped no more."""
    hole = mmap.mmap(-1, size)
    addr = np.frombuffer(hole, np.uint8).ctypes.data
    del_from = size // 2
    desc = CacheDesc(1, [4, size // 4], DataType.DT_INT8)
    cache = node.manager.register_blocks_cache(desc, [addr], BlocksCacheKey(1, 9))
    import ctypes

    libc = ctypes.CDLL(None)
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    assert libc.munmap(addr + del_from, size - del_from) == 0
    node.caches[cache.cache_id] = cache
    node.hole = hole  # type: ignore[attr-defined]  # kept: closing it would unmap again
    return cache.cache_id


def test_memory_that_is_not_mapped_is_an_error_under_tls_too(
    node: Node, victim: NodeProcess, authorities: tuple[Authority, Authority]
) -> None:
    size = 4 * 1024 * 1024
    port = start_pair(node, victim, transfer_path="tcp", link_security=authorities[0].option())
    victim.call(own_hole, size)
    assert node.link(port, 1) == SUCCESS
    array = make_array((1, 4, size // 4), None)
    desc = CacheDesc(1, [4, size // 4], DataType.DT_INT8)
    cache = node.manager.register_blocks_cache(desc, addrs_of(array))
    node.manager.pull_blocks(BlocksCacheKey(1, 9), cache, [0, 1], [0, 1])
    with pytest.raises(LLMException, match="not mapped") as error:
        node.manager.pull_blocks(BlocksCacheKey(1, 9), cache, [1, 3], [0, 2])
    assert error.value.status_code == LLMStatusCode.LLM_PARAM_INVALID
    node.manager.pull_blocks(BlocksCacheKey(1, 9), cache, [1], [3])


@pytest.mark.parametrize("address", ["0.0.0.0:0", "127.0.0.1:0"])
@pytest.mark.parametrize("security_option", ["", BY_SECRET])
def test_listening_to_the_world_without_security_warns_once(
    node: Node, address: str, security_option: str, warnings: Callable[[], list[str]]
) -> None:
    node.start(LLMRole.PROMPT, 1, listen_ip_info=address, link_security=security_option)
    warned = [line for line in warnings() if "without link security" in line]
    is_dangerous = address.startswith("0") and not security_option
    assert len(warned) == is_dangerous


@pytest.mark.parametrize(
    "option",
    [
        "not JSON, but hush-hush-hush",
        '["hush-hush-hush"]',
        '{"secret": "hush"}',
        '{"secret": 16161616161616161616}',
        '{"secret": "hush-hush-hush-hush", "ca": "/x"}',
        '{"secret_file": "/no/such/file"}',
        '{"ca": "/no/such/file", "certificate": "/x", "key": "/y"}',
        '{"password": "hush-hush-hush-hush"}',
        "{}",
    ],
)
def test_what_is_no_security_is_refused_without_a_word_of_the_secret(option: str) -> None:
    with pytest.raises(LLMException, match="LinkSecurity") as error:
        LLMDataDist(LLMRole.PROMPT, 1).init(
            {"llm.EnableCacheManager": "1", "llm_datadist.LinkSecurity": option}
        )
    assert error.value.status_code == LLMStatusCode.LLM_PARAM_INVALID
    assert "hush" not in str(error.value)


def test_the_environment_and_a_file_give_the_secret(
    node: Node, peer: NodeProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "secret"
    file.write_text(SECRET + "\n")
    option = json.dumps({"secret_file": str(file)})
    monkeypatch.setenv("LLM_DATADIST_LINK_SECURITY", option)
    port = node.start(LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0")
    assert link_to(node, port, peer, "") != SUCCESS
    assert link_to(node, port, peer, BY_SECRET) == SUCCESS
