"""Ways to move pieces of 256 bytes from one process to another, as bare system calls.

    python tests/bench/small_pieces.py --rounds 9

64 MiB in scattered blocks of 16 tokens; a token has 256 bytes at either end, beside those of other
heads or not. Ratios are medians over the rounds, in which all take turns, to blocks of 4 KiB. What
came out of it decided how `core/calls.py` reads.
"""

from __future__ import annotations

import mmap
import os
import socket
import statistics
import time
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console
from rich.table import Table

from llm_datadist.core.segments import U64, iovecs, skip_bytes
from llm_datadist.memory import native

if TYPE_CHECKING:
    from collections.abc import Callable

NBYTES, TOKENS, PIECE = 64 * 2**20, 16, 256
BLOCKS = NBYTES // (TOKENS * PIECE)
RNG = np.random.default_rng(7)
BASE = "blocks of 4 KiB"


def region(nbytes: int) -> npt.NDArray[np.uint8]:
    memory = np.frombuffer(mmap.mmap(-1, nbytes), dtype=np.uint8)
    memory[:] = 1
    return memory


SOURCE, DESTINATION, WASTE = region(2 * NBYTES), region(2 * NBYTES), region(4096)


class End(NamedTuple):
    """One end: scattered blocks in which a token has so many heads, of which one is wanted."""

    memory: npt.NDArray[np.uint8]
    heads: int

    def vectors(self, nbytes: int) -> U64:
        """Of pieces; or of whole blocks, with `nbytes` of one."""
        size = TOKENS * PIECE * self.heads
        order = np.resize(RNG.permutation(self.memory.nbytes // size), BLOCKS) * size
        at = np.arange(TOKENS if nbytes == PIECE else 1) * PIECE * self.heads
        addrs = np.add.outer(order, at).ravel() + self.memory.ctypes.data
        return iovecs(addrs.astype(np.uint64), np.full(len(addrs), nbytes, np.uint64))


def with_gaps(pieces: U64, heads: int) -> U64:
    """A vector of waste behind each piece."""
    gap = [WASTE.ctypes.data, PIECE * (heads - 1)]
    return np.stack((pieces, np.full_like(pieces, gap)), axis=1).reshape(-1, 2)


def read(pid: int, ours: U64, theirs: U64) -> None:
    """As many vectors at a time as a call takes, of whole blocks."""
    blocks = native.IOV_MAX * BLOCKS // max(len(ours), len(theirs))
    for start in range(0, BLOCKS, blocks):
        local, remote = (
            end[start * each : (start + blocks) * each]
            for end in (ours, theirs)
            if (each := len(end) // BLOCKS)
        )
        moved = native.process_vm_readv(
            pid, local.ctypes.data, remote.ctypes.data, len(local), len(remote)
        )
        assert moved == int(local[:, 1].sum())


def stream(call: Callable[..., int], sock: socket.socket, vectors: U64, **flags: int) -> None:
    left = NBYTES
    while left:
        moved = call(sock.fileno(), vectors, **flags)
        left -= moved
        if left:
            vectors = skip_bytes(vectors, moved, native.IOV_MAX)


def gather(asks: socket.socket, answers: dict[bytes, U64]) -> None:
    """The owner's part: sends the vectors of the name that comes."""
    while name := asks.recv(1):
        stream(native.sendmsg, asks, answers[name])
    os._exit(0)


def ask(sock: socket.socket, name: bytes, ours: U64) -> None:
    sock.send(name)
    stream(native.recvmsg, sock, ours, flags=native.MSG_WAITALL)


def main(rounds: int = 9) -> None:
    """All ways in turn."""
    one, two, four, eight = (End(SOURCE, heads) for heads in (1, 2, 4, 8))
    whole, split = End(DESTINATION, 1), End(DESTINATION, 2)
    answers = {b"2": two.vectors(PIECE), b"8": eight.vectors(PIECE)}
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        gather(theirs, answers)
    theirs.close()
    pieces, blocks = split.vectors(PIECE), whole.vectors(TOKENS * PIECE)
    by_piece = whole.vectors(PIECE)
    ways: dict[str, Callable[[], Any]] = {
        BASE: partial(read, pid, blocks, one.vectors(TOKENS * PIECE)),
        "scattered; a vector a piece at both ends": partial(read, pid, pieces, one.vectors(PIECE)),
        "… a vector a block at the source": partial(read, pid, pieces, one.vectors(TOKENS * PIECE)),
        "gathered, 1 head of 2; a vector a piece": partial(read, pid, by_piece, answers[b"2"]),
        "… of 8": partial(read, pid, by_piece, answers[b"8"]),
    }
    for heads, end in ((2, two), (4, four), (8, eight)):
        block = end.vectors(TOKENS * PIECE * heads)
        ways[f"… what is between them read along, of {heads}"] = partial(
            read, pid, with_gaps(by_piece, heads), block
        )
    for of in answers:
        ways[f"… by the owner, through a socket, of {of.decode()}"] = partial(ask, ours, of, blocks)
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            begun = time.perf_counter()
            way()
            took[name].append(time.perf_counter() - begun)
    ours.close()
    os.waitpid(pid, 0)
    table = Table("", "GB/s", f"times as long as {BASE}")
    for name, each in took.items():
        ratio = statistics.median(a / b for a, b in zip(each, took[BASE], strict=True))
        table.add_row(name, f"{1e-9 * NBYTES / statistics.median(each):.2f}", f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
