"""Engines for tests: in this process, and in one of their own."""

from __future__ import annotations

import json
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple

import pytest

from llm_datadist import hixl as h
from llm_datadist.testing.cluster import Bytes, free_port, make_array
from llm_datadist.testing.process import ObjectProcess
from llm_datadist.testing.timing import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np

#: nobody listens there: the port "discard"
NOBODY = "127.0.0.1:9"
#: time enough on a machine that is busy
LONG_MS = 20_000
SHAPE = (4096,)


class Range(NamedTuple):
    """Memory of an engine, by address."""

    addr: int
    nbytes: int


class Engine:
    """An engine, and the memory that it has registered, by handle."""

    def __init__(self, path: str = "auto") -> None:
        self.hixl = h.Hixl()
        self.path = path
        self.name = ""
        self.arrays: dict[int, Bytes] = {}

    def start(self, *, listens: bool = True, **options: str) -> str:
        """Options are named by the constants OPTION_*, without that; the engine's name."""
        self.name = f"127.0.0.1:{free_port()}" if listens else f"127.0.0.{free_port() % 200 + 2}"
        named = {getattr(h, f"OPTION_{name}"): text for name, text in options.items()}
        assert self.initialize(self.name, named) == h.SUCCESS
        return self.name

    def initialize(self, name: str, options: dict[str, str]) -> int:
        return self.hixl.initialize(name, {"llm_datadist.Path": self.path, **options})

    def stop(self) -> None:
        self.hixl.finalize()
        self.arrays.clear()

    def add(
        self, nbytes: int = SHAPE[0], seed: int | None = None, *, local_only: bool = False
    ) -> Range:
        """Registers an array, random or zeros."""
        array = make_array((nbytes,), seed)
        return self.register(array, local_only=local_only)

    def register(self, array: Bytes, *, local_only: bool = False) -> Range:
        range_ = range_of(array)
        desc = h.MemDesc(range_.addr, range_.nbytes, local_only)
        ret, handle = self.hixl.register_mem(desc, h.MemType.MEM_HOST)
        assert (ret, handle > 0) == (h.SUCCESS, True)
        self.arrays[handle] = array
        return range_

    def handle_of(self, range_: Range) -> int:
        return next(key for key, array in self.arrays.items() if range_of(array) == range_)

    def array_of(self, range_: Range) -> Bytes:
        return self.arrays[self.handle_of(range_)]

    def bytes_of(self, range_: Range) -> bytes:
        return self.array_of(range_).tobytes()

    def fill(self, range_: Range, value: int) -> None:
        self.array_of(range_)[:] = value

    def deregister(self, range_: Range) -> int:
        """The memory stays where it is, in `arrays`."""
        return self.hixl.deregister_mem(self.handle_of(range_))

    def connect(self, name: str) -> None:
        assert self.hixl.connect(name, LONG_MS) == h.SUCCESS

    def read(self, name: str, ours: Range, theirs: Range) -> int:
        return self.hixl.transfer_sync(name, h.TransferOp.READ, [whole(ours, theirs)], LONG_MS)

    def write(self, name: str, ours: Range, theirs: Range, timeout_ms: int = LONG_MS) -> int:
        return self.hixl.transfer_sync(name, h.TransferOp.WRITE, [whole(ours, theirs)], timeout_ms)

    def begin(self, name: str, op: h.TransferOp, ours: Range, theirs: Range, tag: int = 0) -> int:
        ret, req = self.hixl.transfer_async(name, op, [whole(ours, theirs)], h.TransferArgs(tag))
        assert ret == h.SUCCESS
        return req

    def end_of(self, req: int) -> h.TransferStatus:
        """Waits for it."""
        status = h.TransferStatus.WAITING

        def is_over() -> bool:
            nonlocal status
            ret, status = self.hixl.get_transfer_status(req)
            assert ret == h.SUCCESS
            return status is not h.TransferStatus.WAITING

        assert eventually(is_over, 30)
        return status

    def send(self, name: str, notice: h.NotifyDesc) -> int:
        return self.hixl.send_notify(name, notice, LONG_MS)

    def async_status(self, name: str) -> h.AsyncConnectStatus:
        ret, status = self.hixl.get_async_connect_status(name)
        assert ret == h.SUCCESS
        return status

    def paths(self) -> list[str]:
        return [link.path for link in self.hixl.links()]


class EngineProcess(ObjectProcess[Engine]):
    """A process with an engine that listens."""

    def __init__(self, path: str = "auto") -> None:
        super().__init__(Engine, path)

    def start(self, **options: str) -> str:
        return self.call(Engine.start, **options)


def range_of(array: Bytes) -> Range:
    return Range(array.ctypes.data, array.nbytes)


def whole(ours: Range, theirs: Range) -> h.TransferOpDesc:
    return h.TransferOpDesc(ours.addr, theirs.addr, ours.nbytes)


def resources(**values: object) -> str:
    """GlobalResourceConfig; `__` stands for a dot."""
    return json.dumps({name.replace("__", "."): value for name, value in values.items()})


@contextmanager
def engine(path: str = "auto", *, listens: bool = True, **options: str) -> Iterator[Engine]:
    """One in this process that has started."""
    made = Engine(path)
    made.start(listens=listens, **options)
    try:
        yield made
    finally:
        made.stop()


@contextmanager
def engines(count: int, path: str = "auto") -> Iterator[Sequence[Engine]]:
    """Some in this process."""
    with ExitStack() as stack:
        yield [stack.enter_context(engine(path)) for _ in range(count)]


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, EngineProcess]]:
    """One process for each path, for all tests that do not harm it."""
    processes: dict[str, EngineProcess] = {}
    yield processes
    for process in processes.values():
        process.kill()


@pytest.fixture
def server(servers: dict[str, EngineProcess], path: str) -> Iterator[EngineProcess]:
    """A process with an engine that has not started, and is stopped after the test."""
    if path not in servers:
        servers[path] = EngineProcess(path)
    process = servers[path]
    try:
        yield process
        process.call(Engine.stop)
    except BaseException:
        servers.pop(path).kill()
        raise


@pytest.fixture
def victim(path: str) -> Iterator[EngineProcess]:
    """A process of the test's own, to be killed or stopped."""
    with EngineProcess(path) as process:
        yield process


def until(is_true: Callable[[], bool], seconds: float = 30.0) -> None:
    assert eventually(is_true, seconds)


def descriptors(
    rng: np.random.Generator, ours: Range, theirs: Range, count: int, most: int
) -> list[h.TransferOpDesc]:
    """Random ones; no two touch the same byte of ours or of the peer's."""
    cells = min(ours.nbytes, theirs.nbytes) // most
    here, there = (rng.permutation(cells)[:count] for _ in range(2))
    lengths = rng.integers(0, most + 1, count)
    shifts = rng.integers(0, most - lengths + 1)
    return [
        h.TransferOpDesc(ours.addr + cell * most, theirs.addr + other * most + shift, length)
        for cell, other, shift, length in zip(
            here.tolist(), there.tolist(), shifts.tolist(), lengths.tolist(), strict=True
        )
    ]


def model(
    descs: Sequence[h.TransferOpDesc], ours: Bytes, our_base: int, theirs: Bytes, their_base: int
) -> tuple[Bytes, Bytes]:
    """What a READ makes of ours, and a WRITE of the peer's, byte by byte in Python."""
    read, written = ours.copy(), theirs.copy()
    for desc in descs:
        here, there = desc.local_addr - our_base, desc.remote_addr - their_base
        read[here : here + desc.len] = theirs[there : there + desc.len]
        written[there : there + desc.len] = ours[here : here + desc.len]
    return read, written
