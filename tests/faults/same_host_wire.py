"""Peers made by hand on the same-host socket, and what is asked of a cluster by way of them."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
from wire import NONCE, PATIENCE_S, PROBE, TRAILER, Wire, columns, hello

from llm_datadist import BlocksCacheKey, LLMRole
from llm_datadist.core import messages as m
from llm_datadist.testing.cluster import Node, NodeProcess
from llm_datadist.transport.same_host import SameHost
from programs import environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SECRET = b"a private key that was never registered".ljust(64, b".")
SHAPE = (1, 4, 4096)


# -- run by the processes that are attacked --------------------------------------------------------


def start(node: Node, cluster_id: int, **settings: object) -> int:
    """A cluster with a cache that peers may read, and private memory; its port."""
    port = node.start(
        LLMRole.PROMPT, cluster_id, listen_ip_info="127.0.0.1:0",
        **{"enable_remote_cache_accessible": True, **settings},
    )  # fmt: skip
    node.blocks_cache(*SHAPE, seed=cluster_id, key=BlocksCacheKey(cluster_id))
    return port


def own_secret(node: Node) -> int:
    """The address of memory that is nobody else's."""
    node.arrays[-1] = secret = np.frombuffer(SECRET, np.uint8).copy()
    return int(secret.ctypes.data)


def linked_ids(node: Node) -> list[int]:
    return [link.cluster_id for link in node.datadist.links()]


def same_host_names(_: Node) -> list[str]:
    """The same-host sockets on which this process listens."""
    mine = set()
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the one that lists them
            mine.add(os.readlink(f"/proc/self/fd/{fd}"))
    with open("/proc/net/unix") as table:
        rows = [line.split() for line in table]
    ours = [row for row in rows if len(row) > 7 and f"socket:[{row[6]}]" in mine]
    return sorted({row[7] for row in ours if row[7].startswith("@llm-datadist-")})


def kernels_names() -> set[str]:
    """Of same-host sockets that asked the kernel for any name, as every process sees them."""
    return set(re.findall(r"@([0-9a-f]{5})$", Path("/proc/net/unix").read_text(), re.MULTILINE))


def try_to_connect(_: Node, offer: bytes) -> str:
    """What becomes of a connection to the socket of an offer."""
    try:
        meet(offer).socket.close()
    except OSError as error:
        return type(error).__name__
    return "connected"


def attach_to(_: Node, offer: bytes, token: bytes) -> m.AnyMessage:
    """What a process is told that knows somebody else's token."""
    with meet(offer) as wire:
        wire.send(m.Attach(token, False))
        return wire.receive()


def link_honestly(_: Node, offer: bytes) -> m.AnyMessage:
    """What a process is told that says of itself what is true."""
    mine = Memory()
    with meet(offer) as control:
        return try_to_link(control, greeting(b"", mine.probe))[1]


# -- made by hand, in this process -----------------------------------------------------------------


class Memory:
    """A nonce that can be read here, as a peer's hand-shake names it."""

    def __init__(self) -> None:
        self._nonce = np.frombuffer(NONCE, np.uint8).copy()
        self._word = np.array([PROBE.generation], dtype=np.uint64)
        self.probe = m.ProbeTarget(
            int(self._nonce.ctypes.data), NONCE, int(self._word.ctypes.data), PROBE.generation
        )


def meet(offer: bytes, own: str | bytes | None = None) -> Wire:
    """A connection to the socket of an offer, its own end named so: by a file, or abstractly.

    Raises OSError.
    """
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(PATIENCE_S)
        if own is not None:
            sock.bind(own)
        sock.connect(SameHost.offered(offer)[0].sockaddr)
    except BaseException:
        sock.close()
        raise
    return Wire(sock)


def welcome_of(port: int) -> m.Welcome:
    """What a cluster tells whoever says Hello to it over TCP."""
    with Wire.dial(port) as wire:
        wire.send(hello(is_remote_accessible=True))
        return wire.expect(m.Welcome)


def greeting(offer: bytes, probe: m.ProbeTarget, **said: object) -> m.Hello:
    """A Hello of somebody who offers the same-host path."""
    first = hello(is_remote_accessible=True, probe=probe, **said)  # type: ignore[arg-type]
    first.offers["cma"] = offer
    return first


def try_to_link(wire: Wire, first: m.Hello) -> tuple[m.Welcome, m.AnyMessage]:
    """The hand-shake up to what is said to the same-host path."""
    wire.send(first)
    welcome = wire.expect(m.Welcome)
    wire.send(m.Ready("cma"))
    return welcome, wire.receive()


def fetched(stream: Wire, addr: int, probe: m.ProbeTarget) -> bytes:
    """What a cluster has in its cache after it was asked to fetch that memory of its peer's.

    All zeros when it refused.
    """
    stream.send(m.ListCaches())
    if not isinstance(listed := stream.receive(), m.Caches):
        return bytes(len(SECRET))
    info = listed.infos[0]
    to = int(np.frombuffer(info.addrs, "<u8")[0])
    fetch = np.array([addr, to, len(SECRET)], dtype="<u8").tobytes()
    far = 1e9
    stream.send(
        m.Fetch(
            info.cache_id, info.generation, 1, probe.generation, probe.word_addr, 2000, far, fetch
        )
    )
    if not isinstance(stream.receive(), m.Done):
        return bytes(len(SECRET))
    stream.send(m.Read(info.cache_id, info.generation, 2000, columns([(to, len(SECRET))])))
    stream.expect(m.Sending)
    return stream.receive_bytes(len(SECRET) + TRAILER.size)[: len(SECRET)]


# -- processes that are gone -----------------------------------------------------------------------


class Orphan(NamedTuple):
    """The connections of a process that has ended, and its number."""

    control: Wire
    stream: Wire
    number: int


def connection_of_a_dead_process(offer: bytes) -> tuple[Wire, int]:
    """A connection that the process made which had that number."""
    with _dying(_CONNECT, offer) as (fds, process):
        pass
    return _wire(fds[0]), process.pid


def linked_process(offer: bytes) -> Orphan:
    """The connections of a process that was linked over the socket, and ended."""
    with _dying(_LINK, offer) as (fds, process):
        pass
    return Orphan(_wire(fds[0]), _wire(fds[1]), process.pid)


@contextmanager
def process_with_number(number: int) -> Iterator[NodeProcess]:
    """A process with that number, which nobody has just now. Skips where that cannot be had."""
    for _ in range(20):
        try:
            Path("/proc/sys/kernel/ns_last_pid").write_text(str(number - 1))
        except OSError as error:
            pytest.skip(f"processes with a number of our choice need root: {error}")
        with NodeProcess() as process:
            if process.pid == number:
                yield process
                return
    pytest.skip(f"others took the number {number}, twenty times")


@contextmanager
def _dying(script: str, offer: bytes) -> Iterator[tuple[list[int], subprocess.Popen[bytes]]]:
    """What a process gives to this one, before it ends."""
    ours, theirs = socket.socketpair()
    name = SameHost.offered(offer)[0].id.hex()
    with ours, theirs:
        command = [sys.executable, "-c", script, str(theirs.fileno()), name]
        process = subprocess.Popen(command, env=environment(), pass_fds=[theirs.fileno()])
        theirs.close()
        try:
            _, fds, _, _ = socket.recv_fds(ours, 1, 2)
            yield fds, process
        finally:
            process.wait(PATIENCE_S)


def _wire(fd: int) -> Wire:
    return Wire(socket.socket(fileno=fd))


_GIVE = """
import socket, sys
from same_host_wire import *
offer = SameHost(bytes.fromhex(sys.argv[2])).offer()
def give(*wires):
    with socket.socket(fileno=int(sys.argv[1])) as theirs:
        socket.send_fds(theirs, [b"!"], [wire.socket.fileno() for wire in wires])
"""
_CONNECT = _GIVE + "give(meet(offer))"
_LINK = (
    _GIVE
    + """
control, stream, mine = meet(offer), meet(offer), Memory()
welcome, answer = try_to_link(control, greeting(b"", mine.probe))
assert isinstance(answer, m.Linked), answer
stream.send(m.Attach(welcome.token, False))
stream.expect(m.Attached)
give(control, stream)
"""
)


@contextmanager
def listening(
    serve: Callable[[Wire], None], at: SameHost | None = None
) -> Iterator[tuple[SameHost, socket.socket]]:
    """A same-host socket where `serve` treats each connection, one after the other."""
    at = at or SameHost.new()
    sock = at.listen()
    sock.setblocking(True)
    failures: list[Exception] = []

    def accept() -> None:
        try:
            with suppress(OSError):  # it was shut down
                while True:
                    with Wire(sock.accept()[0]) as wire, suppress(EOFError, ConnectionError):
                        serve(wire)
        except Exception as error:  # raised again below, in the test's thread
            failures.append(error)

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield at, sock
    finally:
        with suppress(OSError):  # the test has closed it
            sock.shutdown(socket.SHUT_RDWR)
        thread.join()
        sock.close()
    if failures:
        raise failures[0]
