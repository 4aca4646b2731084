"""Strangers and members, with each kind of link security: who gets in, and what is reached then."""

from __future__ import annotations

import socket
import ssl
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np
import pytest
from keyed_wire import BY_SECRET, KeyedWire
from same_host_wire import SECRET, own_secret, same_host_names, start, welcome_of
from wire import NONCE, PATIENCE_S, TRAILER, Wire, columns, hello

from certificates import Authority, Files
from llm_datadist import BlocksCacheKey, LLMRole, LLMStatusCode
from llm_datadist.core import messages as m
from llm_datadist.memory import native
from llm_datadist.testing.cluster import Node, NodeProcess, make_array
from llm_datadist.testing.faults import FaultProxy

if TYPE_CHECKING:
    from collections.abc import Callable

SHAPE = (1, 4, 4096)
KINDS = ["open", "secret", "tls"]


class Member:
    """How somebody who has the credential connects, and how a cluster is started that wants it."""

    def __init__(self, kind: str, files: Files) -> None:
        self.option = {"open": "", "secret": BY_SECRET, "tls": files.option()}[kind]
        self._kind, self._files = kind, files

    def dial(self, port: int) -> Wire:
        if self._kind == "secret":
            return KeyedWire.dial(port)
        if self._kind == "open":
            return Wire.dial(port)
        context = ssl.create_default_context(cafile=str(self._files.ca))
        context.check_hostname = False
        context.load_cert_chain(self._files.certificate, self._files.key)
        sock = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
        wire = Wire(context.wrap_socket(sock))
        wire.receive_bytes(1)  # the listener's word that it accepts the certificate
        return wire


def proof(stream: Wire, control: Wire) -> bytes:
    """That a stream is of the link of a control connection."""
    if isinstance(stream, KeyedWire) and isinstance(control, KeyedWire):
        return stream.shield.proof(control.shield)
    return b""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Authority().issue(tmp_path_factory.mktemp("files"))


@pytest.fixture(params=KINDS)
def member(request: pytest.FixtureRequest, files: Files) -> Member:
    return Member(request.param, files)


@pytest.fixture(params=KINDS[1:])
def secured(request: pytest.FixtureRequest, files: Files) -> Member:
    return Member(request.param, files)


# -- strangers -------------------------------------------------------------------------------------


def test_a_stranger_links_where_nothing_is_set(peer: NodeProcess) -> None:
    port = peer.call(start, 1)
    assert welcome_of(port).cluster_id == 1


def by_tcp(peer: NodeProcess, port: int) -> Wire:
    return Wire.dial(port)


def by_the_same_host_socket(peer: NodeProcess, port: int) -> Wire:
    """Its name is no secret: the system lists all that there are."""
    [name] = peer.call(same_host_names)
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(PATIENCE_S)
    sock.connect(name.replace("@", "\0"))
    return Wire(sock)


@pytest.mark.parametrize("way", [by_tcp, by_the_same_host_socket])
def test_a_stranger_is_not_greeted_where_a_credential_is_wanted(
    peer: NodeProcess, secured: Member, way: Callable[[NodeProcess, int], Wire]
) -> None:
    port = peer.call(start, 1, link_security=secured.option)
    for first in (hello(is_remote_accessible=True), m.AskStats(), m.Attach(NONCE, False)):
        with way(peer, port) as wire:
            wire.send(first)
            said = b"".join(iter(lambda: _some(wire), b""))
        assert len(said) <= 16, "an alert of TLS, or the kind of security, at most"


def _some(wire: Wire) -> bytes:
    try:
        return wire.socket.recv(4096)
    except ConnectionResetError:
        return b""


# -- members ---------------------------------------------------------------------------------------


def test_a_member_reads_what_is_registered_and_nothing_else(
    peer: NodeProcess, member: Member
) -> None:
    """Linked over TCP by hand: the owner checks each address."""
    port = peer.call(start, 1, link_security=member.option)
    secret_addr = peer.call(own_secret)
    with ExitStack() as stack:
        control = stack.enter_context(member.dial(port))
        control.send(hello(is_remote_accessible=True))
        welcome = control.expect(m.Welcome)
        streams = []
        for is_reverse in (True, False):
            stream = stack.enter_context(member.dial(port))
            stream.send(m.Attach(welcome.token, is_reverse, proof(stream, control)))
            stream.expect(m.Attached)
            streams.append(stream)
        control.send(m.Ready("tcp"))
        reverse, stream = streams
        reverse.serve_probe()
        while isinstance(said := control.receive(), m.DialBack):
            pass
        assert said == m.Linked("tcp")
        stream.send(m.ListCaches())
        [info] = stream.expect(m.Caches).infos
        addr = int(np.frombuffer(info.addrs, "<u8")[0])

        def ask(addr: int, nbytes: int) -> m.AnyMessage:
            pairs = columns([(addr, nbytes)])
            stream.send(m.Read(info.cache_id, info.generation, 1000, pairs))
            return stream.receive()

        assert ask(addr, 100) == m.Sending(100)
        got = stream.receive_bytes(100 + TRAILER.size)[:100]
        assert got == make_array(SHAPE, 1).tobytes()[:100]
        for outside in ((secret_addr, len(SECRET)), (addr - 1, 1), (addr, SHAPE[1] * SHAPE[2] + 1)):
            refused = ask(*outside)
            assert isinstance(refused, m.Refused)
            assert refused.status == LLMStatusCode.LLM_PARAM_INVALID


# -- this host -------------------------------------------------------------------------------------


def test_the_kernel_lets_a_process_of_the_same_user_read(peer: NodeProcess, member: Member) -> None:
    """Whatever the library does: no link is made here. Separate users are the boundary."""
    peer.call(start, 1, link_security=member.option)
    addr, landing = peer.call(own_secret), np.zeros(len(SECRET), np.uint8)
    mine, theirs = (np.array([[at, len(SECRET)]], np.uint64) for at in (landing.ctypes.data, addr))
    assert native.process_vm_readv(peer.pid, mine.ctypes.data, theirs.ctypes.data, 1) == len(SECRET)
    assert landing.tobytes() == SECRET


# -- somebody in the middle ------------------------------------------------------------------------


def test_who_is_in_between_changes_bytes_where_nothing_is_set(
    node: Node, peer: NodeProcess
) -> None:
    """With a shared secret, too: test_keyed_sessions.py. TLS is for that: test_corruption.py."""
    settings = {"enable_remote_cache_accessible": True, "transfer_path": "tcp"}
    with FaultProxy(peer.call(start, 1)) as proxy:
        node.start(LLMRole.DECODER, 2, **settings)
        assert node.link(proxy.port, 1) == LLMStatusCode.LLM_SUCCESS
        mine, blocks = node.blocks_cache(*SHAPE), list(range(SHAPE[1]))
        node.manager.pull_blocks(BlocksCacheKey(1), mine, blocks, blocks)
        proxy.corrupt(after_nbytes=200)
        node.manager.pull_blocks(BlocksCacheKey(1), mine, blocks, blocks)
        assert proxy.wait(1)
        changed = node.arrays[mine.cache_id] != make_array(SHAPE, 1)
        assert np.count_nonzero(changed) == 1
