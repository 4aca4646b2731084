"""What this library is measured against.

The machine's ceilings: copies of the same segments in one process, and through raw sockets. Other
libraries, where they are installed: NIXL (UCX) and Mooncake.
"""

from __future__ import annotations

import ctypes
import shutil
import socket
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_datadist.cli.bench.contestant import Job, Puller, wait_for_end
from llm_datadist.cli.bench.workload import CacheMemory
from llm_datadist.cli.failure import CommandError
from llm_datadist.core.segments import skip_bytes
from llm_datadist.memory import native

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from llm_datadist.cli.bench.workload import Blocks

#: Mooncake's queue refuses larger batches
_MOONCAKE_BATCH = 512

_SCATTER = """
#include <string.h>
#include <stddef.h>
typedef struct { void *addr; size_t nbytes; } iov;
void scatter(const iov *dst, const iov *src, size_t count) {
    for (size_t i = 0; i < count; i++) memcpy(dst[i].addr, src[i].addr, dst[i].nbytes);
}
"""


class Memcpy:
    """A loop of memcpy over the segments, in C where there is a compiler, else in numpy."""

    def __init__(self, job: Job) -> None:
        workload = job.workload
        self._source, self._memory = CacheMemory(workload), CacheMemory(workload)
        self._source.fill()
        self._threads = job.threads
        src, dst = workload.blocks()
        vectors = (
            workload.vectors(self._memory.addr, dst), workload.vectors(self._source.addr, src)
        )  # fmt: skip
        if workload.is_contiguous:  # the ceiling for runs is one copy a tensor
            vectors = tuple(merged(each, workload.num_moved) for each in vectors)  # type: ignore[assignment]
        self._dst, self._src = vectors
        self._copy, language = _scatter_loop()
        self.detail = f"loop in {language}"

    def move(self) -> None:
        in_threads(self._threads, len(self._dst), self._move_part)

    def poison(self) -> None:
        self._memory.poison()

    def has_arrived(self) -> bool:
        return self._memory.has_arrived()

    def pids(self) -> list[int]:
        return []

    def close(self) -> None:
        pass

    def _move_part(self, _: int, start: int, stop: int) -> None:
        self._copy(self._dst[start:stop], self._src[start:stop])


class RawReads(Puller):
    """The same segments by process_vm_readv, and nothing around it."""

    def __init__(self, job: Job) -> None:
        super().__init__(job, _own_memory)
        src, dst = job.workload.blocks()
        self._dst = job.workload.vectors(self.memory.addr, dst)
        self._src = job.workload.vectors(self.owner.greeting, src)
        self.detail = "process_vm_readv"

    def move(self) -> None:
        in_threads(self.job.threads, len(self._dst), self._move_part)

    def _move_part(self, _: int, start: int, stop: int) -> None:
        for first in range(start, stop, native.IOV_MAX):
            local = self._dst[first : min(stop, first + native.IOV_MAX)]
            remote = self._src[first : first + len(local)]
            moved = native.process_vm_readv(
                self.owner.pid, local.ctypes.data, remote.ctypes.data, len(local)
            )
            if moved != int(local[:, 1].sum()):
                raise CommandError("process_vm_readv stopped short")


class RawSockets(Puller):
    """The same segments over bare TCP connections, sent and received where they lie."""

    def __init__(self, job: Job) -> None:
        super().__init__(job, _own_sockets)
        port, base = self.owner.greeting
        src, dst = job.workload.blocks()
        self._dst = job.workload.vectors(self.memory.addr, dst)
        self._src = job.workload.vectors(base, src)
        self._sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(job.threads)]
        for sock in self._sockets:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.detail = f"{job.threads} streams"

    def move(self) -> None:
        in_threads(len(self._sockets), len(self._dst), self._move_part)

    def _move_part(self, index: int, start: int, stop: int) -> None:
        ask(self._sockets[index], self._src[start:stop], self._dst[start:stop])


class Nixl(Puller):
    """NIXL reads: prepare, post, wait. UCX_TLS says by which transport."""

    def __init__(self, job: Job) -> None:
        super().__init__(job, _own_nixl)
        metadata, base = self.owner.greeting
        self._agent = _nixl_agent("reader", self.memory, job.threads)
        self._peer = self._agent.add_remote_agent(metadata)
        src, dst = job.workload.blocks()
        self._local = job.workload.vectors(self.memory.addr, dst)
        self._remote = job.workload.vectors(base, src)
        self.detail = "UCX"

    def move(self) -> None:
        agent = self._agent
        local = agent.get_xfer_descs(_descriptors(self._local), "DRAM")
        remote = agent.get_xfer_descs(_descriptors(self._remote), "DRAM")
        handle = agent.initialize_xfer("READ", local, remote, self._peer)
        state = agent.transfer(handle)
        while state not in ("DONE", "ERR"):
            state = agent.check_xfer_state(handle)
        if state != "DONE":
            raise CommandError("NIXL's transfer failed")
        agent.release_xfer_handle(handle)


class Mooncake(Puller):
    """Mooncake's transfer engine over TCP."""

    def __init__(self, job: Job) -> None:
        super().__init__(job, _own_mooncake)
        self._session, base = self.owner.greeting
        self._engine = _mooncake_engine(self.memory)
        src, dst = job.workload.blocks()
        self._local = job.workload.vectors(self.memory.addr, dst)
        self._remote = job.workload.vectors(base, src)
        self.detail = "tcp"

    def move(self) -> None:
        local, nbytes = self._local.T.tolist()
        remote = self._remote[:, 0].tolist()
        for start in range(0, len(local), _MOONCAKE_BATCH):
            batch = slice(start, start + _MOONCAKE_BATCH)
            if self._engine.batch_transfer_sync_read(
                self._session, local[batch], remote[batch], nbytes[batch]
            ):
                raise CommandError("Mooncake's transfer failed")


def ask(sock: socket.socket, src: Blocks, dst: Blocks) -> None:
    """Has whoever answers at the other end send its `src`, to lie at `dst`."""
    sock.sendall(len(src).to_bytes(8, "little") + src.tobytes())
    vectors = dst.copy()
    while len(vectors):
        got = native.recvmsg(sock.fileno(), vectors, native.MSG_WAITALL)
        if not got:
            raise CommandError("the owner of the source hung up")
        vectors = skip_bytes(vectors, got, native.IOV_MAX)


def answer(server: socket.socket) -> None:
    """Answers the next connection, in a thread of its own, until it is closed."""
    sock, _address = server.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    threading.Thread(target=_answer, args=(sock,), daemon=True).start()


def merged(vectors: Blocks, count: int) -> Blocks:
    """Each `count` neighbours as one."""
    firsts = vectors[::count].copy()
    firsts[:, 1] *= np.uint64(count)
    return firsts


def in_threads(threads: int, count: int, move: Callable[[int, int, int], None]) -> None:
    """Calls `move(index, start, stop)` on equal parts, side by side, none of them empty."""
    threads = min(threads, count)
    bounds = [count * index // threads for index in range(threads + 1)]
    parts = [
        threading.Thread(target=move, args=(index, bounds[index], bounds[index + 1]))
        for index in range(1, threads)
    ]
    for part in parts:
        part.start()
    move(0, bounds[0], bounds[1])
    for part in parts:
        part.join()


def _scatter_loop() -> tuple[Callable[[Blocks, Blocks], None], str]:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return _scatter_by_memmove, "Python"
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "scatter.c"), Path(folder, "scatter.so")
        source.write_text(_SCATTER)
        command = [compiler, "-O3", "-shared", "-fPIC", str(source), "-o", str(library)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return _scatter_by_memmove, "Python"  # a compiler without a C library
        scatter = ctypes.CDLL(str(library)).scatter
    scatter.argtypes, scatter.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t], None
    return lambda dst, src: scatter(dst.ctypes.data, src.ctypes.data, len(dst)), "C"


def _scatter_by_memmove(dst: Blocks, src: Blocks) -> None:
    for (to, nbytes), (origin, _) in zip(dst.tolist(), src.tolist(), strict=True):
        ctypes.memmove(to, origin, nbytes)


def _own_memory(pipe: Connection, job: Job) -> None:
    memory = CacheMemory(job.workload)
    memory.fill()
    pipe.send(memory.addr)
    wait_for_end(pipe)


def _own_sockets(pipe: Connection, job: Job) -> None:
    memory = CacheMemory(job.workload)
    memory.fill()
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        pipe.send((server.getsockname()[1], memory.addr))
        for _ in range(job.threads):
            answer(server)
        wait_for_end(pipe)


def _answer(sock: socket.socket) -> None:
    while True:
        header = sock.recv(8, socket.MSG_WAITALL)
        if len(header) < 8:
            return
        wanted = bytearray(16 * int.from_bytes(header, "little"))
        sock.recv_into(wanted, len(wanted), socket.MSG_WAITALL)
        vectors = np.frombuffer(wanted, dtype=np.uint64).reshape(-1, 2)
        while len(vectors):
            vectors = skip_bytes(vectors, native.sendmsg(sock.fileno(), vectors), native.IOV_MAX)


def _descriptors(vectors: Blocks) -> Blocks:
    descriptors = np.zeros((len(vectors), 3), dtype=np.uint64)
    descriptors[:, :2] = vectors
    return descriptors


def _nixl_agent(name: str, memory: CacheMemory, threads: int) -> Any:  # noqa: ANN401  # NIXL has no types
    from nixl_cu12._api import nixl_agent, nixl_agent_config

    agent = nixl_agent(
        name, nixl_agent_config(True, False, 0, backends=["UCX"], num_threads=threads)
    )
    agent.register_memory([(memory.addr, memory.nbytes, 0, "")], "DRAM")
    return agent


def _own_nixl(pipe: Connection, job: Job) -> None:
    memory = CacheMemory(job.workload)
    memory.fill()
    agent = _nixl_agent("owner", memory, job.threads)
    pipe.send((agent.get_agent_metadata(), memory.addr))
    wait_for_end(pipe)


def _mooncake_engine(memory: CacheMemory) -> Any:  # noqa: ANN401  # Mooncake has no types
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    if engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""):
        raise CommandError("Mooncake could not be initialised")
    if engine.register_memory(memory.addr, memory.nbytes):
        raise CommandError("Mooncake could not register the memory")
    return engine


def _own_mooncake(pipe: Connection, job: Job) -> None:
    memory = CacheMemory(job.workload)
    memory.fill()
    engine = _mooncake_engine(memory)
    pipe.send((f"127.0.0.1:{engine.get_rpc_port()}", memory.addr))
    wait_for_end(pipe)
