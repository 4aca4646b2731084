"""Where the kernel takes a connection over from TLS's hand-shake, and what it does behind it."""

from __future__ import annotations

import secrets
import select
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from llm_datadist import LLMException, LLMStatusCode
from llm_datadist.core import messages as m
from llm_datadist.endpoint import Endpoint
from llm_datadist.link_security import LinkSecurity
from llm_datadist.peer.asking import ask_stats
from llm_datadist.running.deadline import Deadline
from llm_datadist.testing.cluster import Node
from llm_datadist.testing.timing import takes_at_most
from llm_datadist.transport import ktls
from llm_datadist.transport.records import PART_NBYTES
from llm_datadist.transport.shield import Open
from llm_datadist.transport.shields import Shields
from llm_datadist.transport.stream import Stream
from llm_datadist.types import LLMRole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from llm_datadist.transport.shield import KernelKeys, Shield

LINK_TIMEOUT_MS = 50_000
TIME_S = 20.0
QUESTION = m.encode(m.AskStats())
#: every frame begins with it
MAGIC = QUESTION[:4]
RECORD = b"\x17\x03\x03\x00\x20" + bytes(32)
ALERT = b"\x15\x03\x03\x00\x02\x01\x00"
#: the listener is patient with who says nothing
SOON_S = 8.0


@pytest.fixture
def node() -> Iterator[Node]:
    here = Node()
    yield here
    here.stop()


@pytest.fixture
def port(node: Node, security: str) -> int:
    """Of a cluster that listens."""
    return node.start(LLMRole.MIX, 1, listen_ip_info="127.0.0.1:0", link_security=security)


class Met(NamedTuple):
    """An end by hand, behind the hand-shake."""

    sock: socket.socket
    keys: KernelKeys | None


@contextmanager
def met(sock: socket.socket, shield: Shield, behind: bytes = b"") -> Iterator[Met]:
    """`behind` comes with this end's last word in TLS."""
    with sock:
        sock.settimeout(TIME_S)
        sock.sendall(first := shield.start())
        while not shield.is_done and (came := sock.recv(65536)):
            answer = shield.answer(came)
            is_last = answer and (first or shield.is_done)
            sock.sendall(answer + behind if is_last else answer)
        yield Met(sock, shield.kernels)


def caller(port: int, security: str) -> tuple[socket.socket, Shield]:
    shield = Shields(LinkSecurity.parse(security)).make(is_caller=True, over_tcp=True)
    return socket.create_connection(("127.0.0.1", port), TIME_S), shield


def all_that_comes(sock: socket.socket) -> bytes:
    """Until the other end has closed it."""
    said = b""
    with suppress(ConnectionResetError):
        while came := sock.recv(65536):
            said += came
    return said


def is_asked(port: int, security: str) -> bool:
    """Whether the cluster still answers to those that keep to the protocol."""
    stats = ask_stats(Endpoint("127.0.0.1", port), LinkSecurity.parse(security), TIME_S)
    return stats.cluster_id == 1


# -- the border of the hand-shake ------------------------------------------------------------------


@pytest.mark.parametrize(
    "behind",
    [RECORD, RECORD[:1], RECORD[:-1], QUESTION, ALERT],
    ids=["record", "byte", "part of a record", "frame", "alert"],
)
def test_who_speaks_with_its_last_word_of_tls_is_refused(
    port: int, security: str, behind: bytes
) -> None:
    with met(*caller(port, security), behind) as (sock, _), takes_at_most(SOON_S):
        assert MAGIC not in all_that_comes(sock)
    assert is_asked(port, security)


@pytest.mark.parametrize(
    "said", [QUESTION, RECORD, ALERT, bytes(100)], ids=["frame", "record", "alert", "zeros"]
)
def test_who_speaks_otherwise_than_by_the_keys_is_not_heard(
    port: int, security: str, said: bytes
) -> None:
    with met(*caller(port, security)) as (sock, _):
        sock.sendall(said)
        with takes_at_most(SOON_S):
            assert all_that_comes(sock) == b""
    assert is_asked(port, security)


def test_who_speaks_as_soon_as_it_can_is_heard(port: int, security: str) -> None:
    """The listener may still be at its last word; what comes meanwhile waits in the kernel."""
    for _ in range(20):
        with met(*caller(port, security)) as (sock, keys):
            assert keys is not None
            ktls.hand_over(sock, keys)
            sock.sendall(QUESTION)
            assert sock.recv(len(MAGIC)) == MAGIC


def test_who_answers_waits_until_the_other_end_has_left(port: int, security: str) -> None:
    """A close would drop what the kernel has taken and not sent."""
    with met(*caller(port, security)) as (sock, keys):
        assert keys is not None
        ktls.hand_over(sock, keys)
        sock.sendall(QUESTION)
        head = sock.recv(m.HEADER.size, socket.MSG_WAITALL)
        assert len(sock.recv(m.body_nbytes(head, m.MAX_STATS_NBYTES), socket.MSG_WAITALL)) > 0
        assert not select.select([sock], [], [], 1.0)[0]
    assert is_asked(port, security)


def test_what_the_kernel_gives_no_bytes_of_takes_no_cpu(port: int, security: str) -> None:
    """It says of a part of a record, again and again, that something has come."""
    with met(*caller(port, security)) as (sock, _):
        sock.sendall(b"\x17\x03\x03\x10\x00" + bytes(100))
        begun = time.process_time()
        assert not select.select([sock], [], [], 4.0)[0]
        assert time.process_time() - begun < 1.0


@pytest.mark.parametrize("behind", [RECORD, RECORD[:1], QUESTION], ids=["record", "byte", "frame"])
def test_a_listener_that_speaks_before_it_is_asked_is_left(
    node: Node, security: str, behind: bytes
) -> None:
    """With its last word of TLS."""
    node.start(LLMRole.MIX, 2, link_security=security, transfer_path="tcp")
    shield = Shields(LinkSecurity.parse(security)).make(is_caller=False)
    heard: list[bytes] = []

    def listen() -> None:
        with met(server.accept()[0], shield, behind) as (sock, _):
            heard.append(all_that_comes(sock))

    with socket.create_server(("127.0.0.1", 0)) as server:
        listening = threading.Thread(target=listen)
        listening.start()
        status = node.link(server.getsockname()[1], 1, LINK_TIMEOUT_MS)
        listening.join()
    assert status == LLMStatusCode.LLM_LINK_FAILED
    assert heard == [b""], "nothing was said to it"


def test_a_stranger_without_the_kernel_is_told_nothing_else(port: int) -> None:
    with pytest.raises(LLMException):
        ask_stats(Endpoint("127.0.0.1", port), None, TIME_S)


# -- what the kernel does --------------------------------------------------------------------------


@contextmanager
def connection() -> Iterator[tuple[socket.socket, socket.socket, KernelKeys]]:
    """One end, the other one, which is the kernel's, and keys for the first."""
    parts = secrets.token_bytes(PART_NBYTES), secrets.token_bytes(PART_NBYTES)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8_000)
        near = socket.create_connection(server.getsockname(), TIME_S)
        far, _ = server.accept()
    with near, far:
        far.settimeout(TIME_S)
        ktls.hand_over(far, ktls.keys_of(*parts, is_caller=False))
        yield near, far, ktls.keys_of(*parts, is_caller=True)


def record(keys: KernelKeys, number: int, plain: bytes, kind: bytes = b"\x17") -> bytes:
    """By hand."""
    iv, key, salt = keys.sent[4:12], keys.sent[12:28], keys.sent[28:32]
    nonce = (int.from_bytes(salt + iv, "big") ^ number).to_bytes(12, "big")
    head = b"\x17\x03\x03" + (len(plain) + 1 + 16).to_bytes(2, "big")
    return head + AESGCM(key).encrypt(nonce, plain + kind, head)


def test_its_records_are_those_of_rfc_8446() -> None:
    """The first byte of a head is the only one that it does not look at."""
    with connection() as (near, far, keys):
        for number, first in enumerate((b"\x17", b"\x16", b"\x00", b"\x17")):
            near.sendall(first + record(keys, number, b"plain")[1:])
            assert far.recv(100) == b"plain"


def test_what_is_empty_is_passed_over_and_is_no_end() -> None:
    with connection() as (near, far, keys):
        for number, plain in enumerate((b"", b"", b"plain")):
            near.sendall(record(keys, number, plain))
        assert far.recv(100) == b"plain"


def test_what_is_sealed_and_no_data_is_an_error() -> None:
    with connection() as (near, far, keys):
        near.sendall(record(keys, 0, b"\x01\x00", kind=b"\x15") + record(keys, 1, b"plain"))
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output error"):
                far.recv(100)


def stream_on(sock: socket.socket, keys: KernelKeys) -> Stream:
    """That of a connection which the kernel has taken over."""
    shield = Open()
    shield.kernels = keys
    return Stream(sock, shield)


def status_of(call: Callable[[], object], steps: Iterable[Callable[[], object]]) -> LLMStatusCode:
    """How a call of a second ends in time, while the peer takes a step now and then."""
    ended = threading.Event()
    with ThreadPoolExecutor(1) as pool, takes_at_most(3.0):
        calling = pool.submit(call)
        calling.add_done_callback(lambda _: ended.set())
        for step in steps:
            step()
            if ended.wait(0.4):
                break
        with pytest.raises(LLMException) as error:
            calling.result()
    return error.value.status_code


@pytest.mark.parametrize("is_empty", [False, True], ids=["bytes", "nothing"])
@pytest.mark.parametrize("is_whole", [True, False], ids=["one call", "in calls"])
def test_a_peer_that_trickles_records_is_timed_out(is_whole: bool, is_empty: bool) -> None:
    """The kernel would give each of them the whole time."""
    room = np.zeros(1000, np.uint8)
    with connection() as (near, far, keys):
        stream = stream_on(far, keys)

        def receive() -> None:
            if is_whole:
                vectors = np.array([[room.ctypes.data, len(room)]], np.uint64)
                stream.receive_into(vectors, len(room), Deadline.after(1.0))
            else:
                stream.receive(Deadline.after(1.0))

        sealed = [
            record(keys, number, b"" if is_empty else bytes([byte]))
            for number, byte in enumerate(QUESTION)
        ]
        steps = [partial(near.sendall, each) for each in sealed]
        assert status_of(receive, steps) == LLMStatusCode.LLM_TIMEOUT


def test_a_record_that_comes_in_parts_is_waited_for_and_takes_no_cpu() -> None:
    with connection() as (near, far, keys), ThreadPoolExecutor(1) as pool:
        sealed = record(keys, 0, QUESTION)
        receiving = pool.submit(stream_on(far, keys).receive, Deadline.after(TIME_S))
        begun = time.process_time()
        for at in range(0, len(sealed), 8):
            near.sendall(sealed[at : at + 8])
            assert not select.select([near], [], [], 0.3)[0]
        assert isinstance(receiving.result(), m.AskStats)
        assert time.process_time() - begun < 0.5


def test_a_peer_that_takes_little_is_timed_out() -> None:
    with connection() as (near, far, keys):
        far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8_000)
        stream, question = stream_on(far, keys), m.Read(1, 1, 1000, bytes(1 << 20))
        steps = [partial(near.recv, 16_406)] * 20
        assert (
            status_of(lambda: stream.tell(question, Deadline.after(1.0)), steps)
            == LLMStatusCode.LLM_TIMEOUT
        )


def test_a_close_drops_what_is_not_sent() -> None:
    """For which the library waits until the other end has left."""
    with connection() as (near, far, keys):
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8_000)
        ktls.hand_over(near, keys)
        near.setblocking(False)
        taken = 0
        with suppress(BlockingIOError):
            while True:
                taken += near.send(bytes(1 << 20))
        near.close()
        assert 0 < len(all_that_comes(far)) < taken
