"""Engines of `hixl`, and peers that ask for what is not theirs, or say what is not so."""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import pytest
from wire import TRAILER, Wire, columns, impostor, linked_caller, owner

from llm_datadist import LLMStatusCode
from llm_datadist import hixl as h
from llm_datadist.core import messages as m
from llm_datadist.testing.timing import takes_at_most

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wire import LinkedCaller

PEER = "127.0.0.99"
PARAM_INVALID = int(LLMStatusCode.LLM_PARAM_INVALID)
NOT_EXIST = int(LLMStatusCode.LLM_KV_CACHE_NOT_EXIST)
THEIRS = m.CacheInfo(
    cache_id=1,
    kind=0,
    num_tensors=1,
    num_rows=1,
    row_nbytes=64,
    is_remote_accessible=True,
    is_owned=False,
    generation=5,
    word_addr=0x3000,
    addrs=np.array([0x10000], dtype="<u8").tobytes(),
    keys=b"",
)


class Owner:
    """An engine with 64 bytes that peers reach, and 64 that are its own."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.hixl = h.Hixl()
        options = {"llm_datadist.Path": "tcp"}
        assert self.hixl.initialize(f"127.0.0.1:{port}", options) == h.SUCCESS
        self.shown = np.full(64, 1, dtype=np.uint8)
        self.own = np.full(64, 2, dtype=np.uint8)
        self.handles = [
            self.hixl.register_mem(h.MemDesc(array.ctypes.data, 64, is_own), h.MemType.MEM_HOST)[1]
            for array, is_own in ((self.shown, False), (self.own, True))
        ]


@contextmanager
def owned() -> Iterator[tuple[Owner, LinkedCaller]]:
    """An engine, and a peer made by hand that has linked to it as PEER."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    made = Owner(port)
    try:
        peer_id = h.cluster_id_of(PEER)
        with linked_caller(port, is_remote_accessible=True, cluster_id=peer_id) as peer:
            yield made, peer
    finally:
        made.hixl.finalize()


def refusal(wire: Wire, request: m.Message) -> int:
    wire.send(request)
    return wire.expect(m.Refused).status


@pytest.mark.shows("engine.local_only")
def test_peers_are_told_of_no_local_only_memory_and_cannot_read_it() -> None:
    with owned() as (engine, peer):
        wire = peer.attach()
        wire.send(m.ListCaches())
        (info,) = wire.expect(m.Caches).infos
        shown, own = engine.handles
        assert info.cache_id == shown
        for generation in range(info.generation - 3, info.generation + 4):
            read = m.Read(own, generation, 1000, columns([(engine.own.ctypes.data, 8)]))
            assert refusal(wire, read) in (PARAM_INVALID, NOT_EXIST)
        for addr in (engine.own.ctypes.data, engine.shown.ctypes.data - 1):
            read = m.Read(shown, info.generation, 1000, columns([(addr, 8)]))
            assert refusal(wire, read) == PARAM_INVALID
        wire.send(m.Read(shown, info.generation, 1000, columns([(engine.shown.ctypes.data, 8)])))
        assert wire.expect(m.Sending).nbytes == 8


@pytest.mark.shows("engine.local_only")
def test_of_a_write_from_local_only_memory_its_receiver_reads_that_and_no_more() -> None:
    with owned() as (engine, peer):
        addr = engine.own.ctypes.data
        rets: list[int] = []
        pieces = [h.TransferOpDesc(addr + 8, 0x10000, 8), h.TransferOpDesc(addr + 32, 0x10020, 16)]
        thread = threading.Thread(target=lambda: rets.append(write(engine, pieces)))
        thread.start()
        fetch = is_asked_to_fetch(peer)
        wire = peer.attach()

        def read(*pairs: tuple[int, int]) -> m.Read:
            return m.Read(fetch.src_cache_id, fetch.src_generation, 1000, columns(list(pairs)))

        for pair in ((addr, 8), (addr + 7, 8), (addr + 9, 8), (addr + 32, 17), (addr + 20, 4)):
            assert refusal(wire, read((addr + 8, 8), pair)) == PARAM_INVALID
        wire.send(read((addr + 8, 8), (addr + 36, 4)))
        assert wire.expect(m.Sending).nbytes == 12
        assert wire.receive_bytes(12) == bytes([2]) * 12
        wire.receive_bytes(TRAILER.size)
        peer.reverse.send(m.Done())
        thread.join(10)
        assert rets == [h.SUCCESS]
        assert refusal(wire, read((addr + 8, 8))) == NOT_EXIST


@pytest.mark.shows("engine.local_only")
def test_what_is_written_to_one_peer_is_not_read_by_another() -> None:
    """A ticket's number, and its generation, follow from those that a peer was told of before."""
    with owned() as (engine, peer), linked_caller(engine.port, is_remote_accessible=True) as other:
        addr, rets = engine.own.ctypes.data, list[int]()
        pieces = [h.TransferOpDesc(addr, 0x10000, 16)]
        thread = threading.Thread(target=lambda: rets.append(write(engine, pieces)))
        thread.start()
        fetch = is_asked_to_fetch(peer)
        theirs, its = other.attach(), peer.attach()
        what = fetch.src_cache_id, fetch.src_generation, 1000, columns([(addr, 16)])
        assert refusal(theirs, m.Read(*what)) == NOT_EXIST
        assert refusal(theirs, m.Digest(*what)) == NOT_EXIST
        its.send(m.Digest(*what))
        its.expect(m.Digested)
        its.send(m.Read(*what))
        assert its.expect(m.Sending).nbytes == 16
        assert its.receive_bytes(16) == bytes([2]) * 16
        peer.reverse.send(m.Done())
        thread.join(10)
        assert rets == [h.SUCCESS]


@pytest.mark.shows("engine.transfer_sync")
def test_who_stands_still_in_a_read_has_the_time_that_it_asked_for() -> None:
    """Longer than a cluster of LLM-DataDist waits for it, whose calls last a second by default."""
    nbytes = 32 << 20
    with owned() as (engine, peer):
        shown = np.full(nbytes, 3, dtype=np.uint8)
        desc = h.MemDesc(shown.ctypes.data, nbytes)
        assert engine.hixl.register_mem(desc, h.MemType.MEM_HOST)[0] == h.SUCCESS
        wire = peer.attach()
        wire.send(m.ListCaches())
        info = wire.expect(m.Caches).infos[-1]
        what = columns([(shown.ctypes.data, nbytes)])
        wire.send(m.Read(info.cache_id, info.generation, 20_000, what))
        assert wire.expect(m.Sending).nbytes == nbytes
        threading.Event().wait(1.5)  # it takes no more than lies in sockets
        assert wire.receive_bytes(nbytes) == shown.tobytes()


def write(engine: Owner, pieces: list[h.TransferOpDesc]) -> int:
    return engine.hixl.transfer_sync(PEER, h.TransferOp.WRITE, pieces, 10_000)


def is_asked_to_fetch(peer: LinkedCaller) -> m.Fetch:
    peer.reverse.expect(m.ListCaches)
    peer.reverse.send(m.Caches([THEIRS]))
    return peer.reverse.expect(m.Fetch)


@pytest.mark.shows("engine.send_notify")
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (m.Linked("tcp"), h.FAILED),
        (m.Refused(0, "fine"), h.FAILED),
        (m.Refused(77, "?"), h.FAILED),
        (m.Refused(PARAM_INVALID, "no"), h.PARAM_INVALID),
        (m.Notify("a", "b"), h.FAILED),
        (None, h.TIMEOUT),
    ],
    ids=["linked", "success", "unknown", "refused", "notify", "silence"],
)
def test_a_notice_that_is_answered_by_something_else_has_failed(
    answer: m.Message | None, expected: int
) -> None:
    def act(wire: Wire, request: m.AnyMessage) -> None:
        assert isinstance(request, m.Notify), request
        if answer is not None:
            wire.send(answer)

    hixl = h.Hixl()
    assert hixl.initialize("127.0.0.1", {"llm_datadist.Path": "tcp"}) == h.SUCCESS
    try:
        with impostor(owner(act)) as port:
            assert hixl.connect(f"127.0.0.1:{port}", 5000) == h.SUCCESS
            with takes_at_most(3):
                ret = hixl.send_notify(f"127.0.0.1:{port}", h.NotifyDesc("a", "b"), 500)
            assert ret == expected
    finally:
        hixl.finalize()


@pytest.mark.shows("engine.send_notify")
def test_a_flood_of_notices_is_bounded_and_long_ones_end_the_stream() -> None:
    with owned() as (engine, peer):
        wire = peer.attach()
        for _ in range(4096):
            wire.send(m.Notify("n", "m"))
            wire.expect(m.Done)
        assert refusal(wire, m.Notify("n", "m")) == int(LLMStatusCode.LLM_FAILED)
        assert len(engine.hixl.get_notifies()[1]) == 4096
        wire.send(m.Notify("n" * 1025, "m"))
        assert wire.is_ended()
        assert engine.hixl.get_notifies() == (h.SUCCESS, [])
