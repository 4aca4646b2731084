"""The proxy that tests of faults stand on: each fault, seen from a caller of an echo."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from llm_datadist.testing.faults import FaultProxy
from llm_datadist.testing.timing import eventually, takes_at_most

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE_S = 5.0
LARGE = 3_000_000


@pytest.fixture
def echo_port() -> Iterator[int]:
    """Says back what callers say, to several of them."""
    server = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []

    def answer(sock: socket.socket) -> None:
        with sock, suppress(ConnectionError):
            while data := sock.recv(65536):
                sock.sendall(data)

    def accept() -> None:
        with suppress(OSError):  # it was shut down
            while True:
                threads.append(threading.Thread(target=answer, args=(server.accept()[0],)))
                threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    yield server.getsockname()[1]
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    for thread in (accepting, *threads):
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


@pytest.fixture
def proxy(echo_port: int) -> Iterator[FaultProxy]:
    with FaultProxy(echo_port) as proxy:
        yield proxy
    proxy.close()
    assert "fault-proxy" not in {thread.name for thread in threading.enumerate()}


@pytest.fixture
def dial(proxy: FaultProxy) -> Iterator[Callable[[], socket.socket]]:
    sockets: list[socket.socket] = []

    def dial() -> socket.socket:
        sockets.append(socket.create_connection(("127.0.0.1", proxy.port), PATIENCE_S))
        return sockets[-1]

    yield dial
    for sock in sockets:
        sock.close()


def said_back(sock: socket.socket, data: bytes) -> bytes:
    """What comes until all of it is there, or until the connection ends."""
    sending = threading.Thread(target=send_all, args=(sock, data))
    sending.start()
    came = bytearray()
    with suppress(ConnectionResetError):
        while len(came) < len(data) and (more := sock.recv(65536)):
            came += more
    sending.join(PATIENCE_S)
    return bytes(came)


def send_all(sock: socket.socket, data: bytes) -> None:
    with suppress(ConnectionError):
        sock.sendall(data)


def is_reset_at_once(proxy: FaultProxy) -> bool:
    """Whether a new caller hears nothing; its very `connect` may fail, when the reset is fast."""
    try:
        with socket.create_connection(("127.0.0.1", proxy.port), PATIENCE_S) as sock:
            return said_back(sock, b"hello") == b""
    except ConnectionResetError:
        return True


def test_without_a_fault_all_bytes_pass(
    proxy: FaultProxy, dial: Callable[[], socket.socket]
) -> None:
    data = bytes(range(256)) * (LARGE // 256)
    socks = [dial() for _ in range(3)]
    for sock in socks:
        assert said_back(sock, data) == data
    assert proxy.nbytes_passed() == proxy.nbytes_passed(to_caller=False) == 3 * len(data)
    assert proxy.num_connections == 3
    socks[0].shutdown(socket.SHUT_WR)
    assert socks[0].recv(1) == b""
    assert eventually(lambda: proxy.num_connections == 2)


@pytest.mark.parametrize("to_caller", [True, False])
def test_cut(proxy: FaultProxy, dial: Callable[[], socket.socket], to_caller: bool) -> None:
    sock, other = dial(), dial()
    assert said_back(other, b"hello") == b"hello"
    before = proxy.nbytes_passed(to_caller=to_caller)
    proxy.cut(1_000_001, to_caller=to_caller)
    assert said_back(sock, b"hello") == b"hello"
    assert not proxy.wait()
    assert len(said_back(sock, bytes(LARGE))) <= 1_000_001
    assert proxy.wait(PATIENCE_S)
    assert proxy.nbytes_passed(to_caller=to_caller) == before + 1_000_001
    with pytest.raises(ConnectionResetError):
        other.recv(1)
    assert is_reset_at_once(proxy)
    proxy.restore()
    assert said_back(dial(), b"hello") == b"hello"


def test_stall(proxy: FaultProxy, dial: Callable[[], socket.socket]) -> None:
    sock = dial()
    assert said_back(sock, b"hello") == b"hello"
    proxy.stall()
    for each in (sock, dial()):
        each.sendall(b"later")
        each.settimeout(0.1)
        with pytest.raises(TimeoutError):
            each.recv(5)
        each.settimeout(PATIENCE_S)
    proxy.restore()
    assert sock.recv(5) == each.recv(5) == b"later"


@pytest.mark.parametrize("to_caller", [True, False])
def test_half_close(proxy: FaultProxy, dial: Callable[[], socket.socket], to_caller: bool) -> None:
    sock = dial()
    assert said_back(sock, b"hello") == b"hello"
    proxy.half_close(to_caller=to_caller)
    for each in (sock, dial()):
        assert said_back(each, b"hello") == b"", "the echo ends as well when it hears no more"
        each.close()
    assert eventually(lambda: proxy.num_connections == 0)
    proxy.restore()
    assert said_back(dial(), b"hello") == b"hello"


def test_slow(proxy: FaultProxy, dial: Callable[[], socket.socket]) -> None:
    sock = dial()
    proxy.slow(100_000)
    with takes_at_most(PATIENCE_S), pytest.raises(AssertionError), takes_at_most(0.3):
        assert len(said_back(sock, bytes(20_000))) == 20_000  # there and back: 0.4 s
    proxy.restore()
    with takes_at_most(PATIENCE_S):
        assert len(said_back(sock, bytes(LARGE))) == LARGE
    with pytest.raises(ValueError, match="greater than 0"):
        proxy.slow(0)


@pytest.mark.parametrize("to_caller", [True, False])
@pytest.mark.parametrize("at", [0, 1_000_001, LARGE - 1])
def test_corrupt(
    proxy: FaultProxy, dial: Callable[[], socket.socket], at: int, to_caller: bool
) -> None:
    proxy.corrupt(at, to_caller=to_caller)
    came = said_back(dial(), bytes(LARGE))
    assert proxy.wait()
    assert [(n, byte) for n, byte in enumerate(came) if byte] == [(at, 1)]
    assert said_back(dial(), bytes(LARGE)) == bytes(LARGE), "once"


def test_a_listener_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with FaultProxy(port) as proxy_to_nobody:
        assert is_reset_at_once(proxy_to_nobody)
        assert eventually(lambda: proxy_to_nobody.num_connections == 0)
