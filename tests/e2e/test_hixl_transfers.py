"""`hixl`: READ and WRITE between two processes. Spec H.2."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import hixl_engine
import numpy as np
import pytest
from hixl_engine import LONG_MS, NOBODY, Engine, Range, descriptors, engine, model, whole

from llm_datadist import hixl as h
from llm_datadist.testing.cluster import make_array
from llm_datadist.testing.timing import takes_at_most

if TYPE_CHECKING:
    from hixl_engine import EngineProcess

READ, WRITE = h.TransferOp.READ, h.TransferOp.WRITE
server, servers = hixl_engine.server, hixl_engine.servers


@pytest.mark.shows("engine.transfer_sync")
def test_a_read_brings_the_peers_bytes(server: EngineProcess, path: str) -> None:
    name, theirs = server.start(), server.call(Engine.add, seed=1)
    with engine(path, listens=False) as client:
        ours = client.add()
        client.connect(name)
        assert client.paths() == [path]
        assert client.read(name, ours, theirs) == h.SUCCESS
        assert client.bytes_of(ours) == make_array((4096,), 1).tobytes()


@pytest.mark.shows("engine.transfer_sync")
def test_a_write_takes_ours_there(server: EngineProcess, path: str) -> None:
    name, theirs = server.start(), server.call(Engine.add)
    with engine(path, listens=False) as client:
        ours = client.add(seed=2)
        client.connect(name)
        assert client.write(name, ours, theirs) == h.SUCCESS
        assert server.call(Engine.bytes_of, theirs) == client.bytes_of(ours)


@pytest.mark.shows("engine.columns")
@pytest.mark.parametrize("op", READ.__class__)
def test_ten_thousand_descriptors_do_what_a_model_does(
    server: EngineProcess, path: str, op: h.TransferOp
) -> None:
    """From memory in several ranges, into memory in several ranges."""
    most, count, seed = 64, 10_000, 20261129
    nbytes = count * most * 2
    name = server.start()
    theirs = server.call(add_in_parts, nbytes, 5, 3)
    with engine(path, listens=False) as client:
        ours = add_in_parts(client, nbytes, 4, 7)
        client.connect(name)
        rng = np.random.default_rng(seed)
        descs = [
            desc
            for desc in descriptors(rng, ours, theirs, count + 200, most)
            if not crosses(desc.local_addr - ours.addr, desc.len, nbytes // 7)
            and not crosses(desc.remote_addr - theirs.addr, desc.len, nbytes // 3)
        ][:count]
        assert len(descs) == count
        before, remote = make_array((nbytes,), 4), make_array((nbytes,), 5)
        read, written = model(descs, before, ours.addr, remote, theirs.addr)
        assert client.hixl.transfer_sync(name, op, descs, LONG_MS) == h.SUCCESS
        after = np.concatenate(list(client.arrays.values()))
        there = server.call(all_bytes)
        if op is READ:
            assert np.array_equal(after, read)
            assert there == remote.tobytes()
        else:
            assert np.array_equal(after, before)
            assert there == written.tobytes()


def add_in_parts(engine: Engine, nbytes: int, seed: int, parts: int) -> Range:
    """One array, registered in parts that touch."""
    array = make_array((nbytes,), seed)
    size = nbytes // parts
    bounds = [index * size for index in range(parts)] + [nbytes]
    for start, stop in pairwise(bounds):
        engine.register(array[start:stop])
    return Range(array.ctypes.data, nbytes)


def crosses(offset: int, nbytes: int, part_nbytes: int) -> bool:
    return offset // part_nbytes != max(offset, offset + nbytes - 1) // part_nbytes


def all_bytes(engine: Engine) -> bytes:
    return b"".join(array.tobytes() for array in engine.arrays.values())


@pytest.mark.shows("engine.transfer_sync")
def test_pieces_may_name_the_same_bytes_more_than_once(server: EngineProcess, path: str) -> None:
    """Together more than the memory has; whichever comes last, it is the same bytes here."""
    name, theirs = server.start(), server.call(Engine.add, seed=1)
    with engine(path, listens=False) as client:
        ours = client.add(seed=2)
        client.connect(name)
        bytes_each = [h.TransferOpDesc(ours.addr + at, theirs.addr + at, 1) for at in range(99)]
        for descs in (
            [whole(ours, theirs)] * 3,
            [whole(ours, theirs), h.TransferOpDesc(ours.addr, theirs.addr, 16)],
            [*bytes_each, whole(ours, theirs), *bytes_each],
        ):
            server.call(Engine.fill, theirs, 0)
            assert client.hixl.transfer_sync(name, WRITE, descs, LONG_MS) == h.SUCCESS
            assert server.call(Engine.bytes_of, theirs) == client.bytes_of(ours)
            before = client.bytes_of(ours)
            client.fill(ours, 0)
            assert client.hixl.transfer_sync(name, READ, descs, LONG_MS) == h.SUCCESS
            assert client.bytes_of(ours) == before


@pytest.mark.shows("engine.transfer_sync")
def test_memory_that_is_not_registered_is_refused_at_both_ends(
    server: EngineProcess, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    name, theirs = server.start(), server.call(Engine.add, seed=1)
    with engine(path, listens=False) as client:
        ours = client.add(seed=2)
        before = client.bytes_of(ours)
        client.connect(name)
        for desc in (
            h.TransferOpDesc(ours.addr + 1, theirs.addr, ours.nbytes),
            h.TransferOpDesc(ours.addr, theirs.addr + 1, ours.nbytes),
            h.TransferOpDesc(ours.addr - 1, theirs.addr, 1),
            h.TransferOpDesc(ours.addr, theirs.addr + theirs.nbytes, 1),
            h.TransferOpDesc(ours.addr, 2**64 - 1, 1),
            h.TransferOpDesc(ours.addr, -1, 1),
            h.TransferOpDesc(ours.addr, theirs.addr, 2**64),
            h.TransferOpDesc(ours.addr, theirs.addr, 2**64 - 1),
        ):
            for op in (READ, WRITE):
                ret = client.hixl.transfer_sync(name, op, [whole(ours, theirs), desc], LONG_MS)
                assert ret == h.PARAM_INVALID
        assert client.bytes_of(ours) == before
        assert server.call(Engine.bytes_of, theirs) == make_array((4096,), 1).tobytes()
        assert f"{theirs.addr + theirs.nbytes:#x}" in caplog.text


@pytest.mark.shows("engine.local_only")
def test_local_only_memory_is_not_reached_by_peers(server: EngineProcess, path: str) -> None:
    name = server.start()
    theirs = server.call(Engine.add, seed=1, local_only=True)
    with engine(path, listens=False) as client:
        ours = client.add(seed=2)
        client.connect(name)
        assert client.read(name, ours, theirs) == h.PARAM_INVALID
        assert client.write(name, ours, theirs) == h.PARAM_INVALID
        assert client.bytes_of(ours) == make_array((4096,), 2).tobytes()
        assert server.call(Engine.bytes_of, theirs) == make_array((4096,), 1).tobytes()


@pytest.mark.shows("engine.local_only")
def test_local_only_memory_is_our_end_of_a_transfer(server: EngineProcess, path: str) -> None:
    name, theirs = server.start(), server.call(Engine.add, seed=1)
    with engine(path, listens=False) as client:
        ours = client.add(local_only=True)
        client.connect(name)
        assert client.read(name, ours, theirs) == h.SUCCESS
        assert client.bytes_of(ours) == make_array((4096,), 1).tobytes()
        client.fill(ours, 9)
        assert client.write(name, ours, theirs) == h.SUCCESS
        assert server.call(Engine.bytes_of, theirs) == bytes([9]) * 4096


@pytest.mark.shows("engine.register_mem")
def test_what_is_registered_behind_a_connect_is_reached(server: EngineProcess, path: str) -> None:
    name = server.start()
    with engine(path, listens=False) as client:
        client.connect(name)
        ours = client.add()
        for seed in (1, 2):
            theirs = server.call(Engine.add, seed=seed)
            assert client.read(name, ours, theirs) == h.SUCCESS
            assert client.bytes_of(ours) == make_array((4096,), seed).tobytes()


@pytest.mark.shows("engine.deregister_mem")
def test_what_is_deregistered_is_not_reached_any_more(server: EngineProcess, path: str) -> None:
    name, theirs = server.start(), server.call(Engine.add, seed=1)
    with engine(path, listens=False) as client:
        ours = client.add()
        client.connect(name)
        assert client.read(name, ours, theirs) == h.SUCCESS
        assert server.call(Engine.deregister, theirs) == h.SUCCESS
        client.fill(ours, 7)
        assert client.write(name, ours, theirs) == h.PARAM_INVALID
        assert client.read(name, ours, theirs) == h.PARAM_INVALID
        assert client.bytes_of(ours) == bytes([7]) * 4096
        assert server.call(Engine.bytes_of, theirs) == make_array((4096,), 1).tobytes()
        assert client.deregister(ours) == h.SUCCESS
        assert client.read(name, ours, theirs) == h.PARAM_INVALID


@pytest.mark.shows("engine.deregister_mem")
def test_memory_that_is_registered_anew_is_found_anew(server: EngineProcess, path: str) -> None:
    """What was known of the peer's memory is of an older generation."""
    name, theirs = server.start(), server.call(Engine.add, seed=1)
    with engine(path, listens=False) as client:
        ours = client.add(seed=3)
        client.connect(name)
        assert client.read(name, ours, theirs) == h.SUCCESS
        server.call(register_again, theirs)
        assert client.read(name, ours, theirs) == h.SUCCESS
        assert client.bytes_of(ours) == bytes([5]) * 4096
        server.call(register_again, theirs)
        client.fill(ours, 6)
        assert client.write(name, ours, theirs) == h.SUCCESS
        assert server.call(Engine.bytes_of, theirs) == bytes([6]) * 4096


def register_again(engine: Engine, range_: Range) -> None:
    array = engine.array_of(range_)
    assert engine.deregister(range_) == h.SUCCESS
    engine.arrays.clear()
    array[:] = 5
    engine.register(array)


@pytest.mark.shows("engine.transfer_sync")
def test_nothing_is_moved_for_no_descriptors_and_for_none_of_length(
    server: EngineProcess, path: str
) -> None:
    name, theirs = server.start(), server.call(Engine.add, seed=1)
    with engine(path, listens=False) as client:
        ours = client.add()
        client.connect(name)
        for op in (READ, WRITE):
            assert client.hixl.transfer_sync(name, op, [], LONG_MS) == h.SUCCESS
            empty = h.TransferOpDesc(ours.addr, theirs.addr, 0)
            assert client.hixl.transfer_sync(name, op, [empty], LONG_MS) == h.SUCCESS
        assert client.bytes_of(ours) == bytes(4096)


@pytest.mark.shows("engine.transfer_sync")
def test_a_transfer_that_takes_too_long_is_a_timeout(server: EngineProcess, path: str) -> None:
    """And nothing of it comes later, when the peer goes on."""
    name, theirs = server.start(), server.call(Engine.add, seed=1)
    with engine(path, listens=False) as client:
        ours = client.add(seed=2)
        client.connect(name)
        assert client.write(name, ours, theirs) == h.SUCCESS
        client.fill(ours, 8)
        server.pause()
        with takes_at_most(5):
            assert client.write(name, ours, theirs, timeout_ms=300) == h.TIMEOUT
        server.resume()
        assert server.call(Engine.bytes_of, theirs) == make_array((4096,), 2).tobytes()
        assert client.write(name, ours, theirs) == h.SUCCESS
        assert server.call(Engine.bytes_of, theirs) == bytes([8]) * 4096


@pytest.mark.shows("engine.transfer_sync")
def test_without_a_connection_nothing_is_moved(path: str) -> None:
    with engine(path) as client:
        ours = client.add()
        for op in (READ, WRITE):
            ret = client.hixl.transfer_sync(NOBODY, op, [whole(ours, ours)])
            assert ret == h.NOT_CONNECTED
            assert client.hixl.transfer_async(NOBODY, op, [whole(ours, ours)]) == (
                h.NOT_CONNECTED, 0,
            )  # fmt: skip


@pytest.mark.shows("engine.transfer_sync", "engine.types")
def test_wrong_types_raise_and_wrong_values_do_not() -> None:
    with engine() as client:
        ours = client.add()
        good, name, hixl = whole(ours, ours), client.name, client.hixl
        client.connect(name)
        for arguments in (
            (1, READ, [good]), (name, 0, [good]), (name, READ, good), (name, READ, (good,)),
            (name, READ, [(1, 2, 3)]), (name, READ, [None]), (name, READ, [good], "1"),
            (name, READ, [good], 1.5), (name, READ, [good], None), (None, READ, [good]),
            (name, READ, None), (name, READ, [good], True),
        ):  # fmt: skip
            with pytest.raises(TypeError):
                hixl.transfer_sync(*arguments)
        changed = whole(ours, ours)
        changed.len = 1.5  # type: ignore[assignment]
        with pytest.raises(TypeError):
            hixl.transfer_sync(name, READ, [good, changed])
        for timeout in (0, -1, 2**31):
            assert hixl.transfer_sync(name, READ, [good], timeout) == h.PARAM_INVALID
        for wrong in ("", "here", "1.2.3", "[1.2.3.4]:5", "::1", "1.2.3.4:70000", "1.2.3.4:x"):
            assert hixl.transfer_sync(wrong, READ, [good]) == h.PARAM_INVALID
        numbers: list[Any] = [np.int64(ours.addr), np.uint64(ours.addr), np.int32(8)]
        numpys = h.TransferOpDesc(*numbers)
        assert hixl.transfer_sync(name, READ, [numpys]) == h.SUCCESS


@pytest.mark.shows("engine.both_ways")
def test_the_engine_that_was_called_uses_the_same_connection(
    server: EngineProcess, path: str
) -> None:
    name, theirs = server.start(), server.call(Engine.add, seed=1)
    with engine(path, listens=False) as client:
        ours = client.add(seed=2)
        client.connect(name)
        assert server.call(Engine.read, client.name, theirs, ours) == h.SUCCESS
        assert server.call(Engine.bytes_of, theirs) == client.bytes_of(ours)
        server.call(Engine.fill, theirs, 4)
        assert server.call(Engine.write, client.name, theirs, ours) == h.SUCCESS
        assert client.bytes_of(ours) == bytes([4]) * 4096


@pytest.mark.shows("engine.both_ways")
def test_an_engine_may_connect_to_itself(path: str) -> None:
    with engine(path) as one:
        ours, others = one.add(seed=1), one.add()
        one.connect(one.name)
        assert one.read(one.name, others, ours) == h.SUCCESS
        assert one.bytes_of(others) == one.bytes_of(ours)
        one.fill(others, 3)
        assert one.write(one.name, others, ours) == h.SUCCESS
        assert one.bytes_of(ours) == bytes([3]) * 4096
