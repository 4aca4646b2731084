"""What unequal layouts cost: planning, and moving, against the same bytes between equal ones.

    python tests/bench/layouts.py plan
    python tests/bench/layouts.py move --path cma --rounds 9
    python tests/bench/layouts.py move --path cma --rounds 9 --push

The cache is that of Llama-3-70B (80 layers, 8 KV heads of 128), of which TP8 has a head and TP4 two
in each rank; blocks of 16 tokens become blocks of 64. Ratios are medians over the rounds, in which
all take turns. Every byte that is moved is verified at first.
"""

from __future__ import annotations

import mmap
import statistics
import sys
import time
import tracemalloc
from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console
from rich.table import Table

from llm_datadist import BlocksCacheKey, CacheDesc, DataType, KVHeads, KVLayout, LLMRole
from llm_datadist.core.pattern import Windows
from llm_datadist.core.reshard import planned, reshard
from llm_datadist.testing.cluster import Node, NodeProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llm_datadist import Cache

LAYERS, HEADS, HEAD_SIZE = 80, 8, 128
PLANNED_TOKENS, MOVED_TOKENS = 131072, 2048
RNG = np.random.default_rng(7)
app = typer.Typer(pretty_exceptions_enable=False)


class Kind(NamedTuple):
    """What a tensor-parallel rank of so many holds."""

    order: str
    block_tokens: int
    rank: int
    ranks: int

    def desc(self, tokens: int) -> CacheDesc:
        sizes = {"B": tokens // self.block_tokens * 5 // 4, "H": self.heads.count}
        sizes |= {"N": self.block_tokens, "D": HEAD_SIZE}
        shape = [sizes[axis] for axis in self.order]
        return CacheDesc(2 * LAYERS, shape, DataType.DT_BF16)

    def layout(self, tokens: int) -> KVLayout:
        return KVLayout.of(self.desc(tokens), self.order, heads=self.heads)

    @property
    def heads(self) -> KVHeads:
        return KVHeads.share(HEADS, self.rank, self.ranks)

    def blocks(self, tokens: int) -> list[int]:
        count = tokens // self.block_tokens
        scattered: list[int] = RNG.permutation(count * 5 // 4)[:count].tolist()
        return scattered


class Job(NamedTuple):
    """Who is read, and who reads."""

    sources: Sequence[Kind]
    destination: Kind

    @property
    def nbytes(self) -> int:
        return 2 * LAYERS * self.destination.heads.count * MOVED_TOKENS * HEAD_SIZE * 2


def both(order: str) -> list[Kind]:
    return [Kind(order, 16, rank, 8) for rank in (0, 1)]


EQUAL = "equal, blocks of 4 KiB"
JOBS = {
    EQUAL: Job([Kind("BHND", 16, 0, 8)], Kind("BHND", 16, 0, 8)),
    "HND, TP8 to TP4": Job(both("BHND"), Kind("BHND", 64, 0, 4)),
    "NHD, TP8 to TP4": Job(both("BNHD"), Kind("BNHD", 64, 0, 4)),
    "NHD, TP4 to TP8": Job([Kind("BNHD", 16, 0, 4)], Kind("BNHD", 64, 0, 8)),
    "NHD, TP1 to TP8": Job([Kind("BNHD", 16, 0, 1)], Kind("BNHD", 64, 0, 8)),
    "NHD to HND, TP4": Job([Kind("BNHD", 16, 0, 4)], Kind("BHND", 64, 0, 4)),
    "HND to NHD, TP4": Job([Kind("BHND", 16, 0, 4)], Kind("BNHD", 64, 0, 4)),
}


@app.command()
def plan(rounds: int = 5) -> None:
    """Plans 128 k tokens, window by window."""
    addrs = np.arange(2 * LAYERS, dtype=np.uint64) << np.uint64(33)
    table = Table("", "pieces", "ns a piece", "against equal", "most memory, MiB")
    took: dict[str, list[float]] = {name: [] for name in JOBS}
    counts, peaks = {}, {}
    for number in range(rounds + 1):
        for name, job in JOBS.items():
            blocks = [kind.blocks(PLANNED_TOKENS) for kind in (*job.sources, job.destination)]
            if number == 0:
                tracemalloc.start()
            begun = time.perf_counter()
            counts[name] = _plan(job, blocks, addrs)
            took[name].append((time.perf_counter() - begun) / counts[name] * 1e9)
            if number == 0:
                peaks[name] = tracemalloc.get_traced_memory()[1] / 2**20
                tracemalloc.stop()
                took[name].clear()
    for name, each in took.items():
        ratio = statistics.median(a / b for a, b in zip(each, took[EQUAL], strict=True))
        median = statistics.median(each)
        table.add_row(
            name, f"{counts[name]:,}", f"{median:.2f}", f"{ratio:.2f}", f"{peaks[name]:.1f}"
        )
    Console().print(table)
    ends = [kind.layout(1024) for kind in both("BHND")], Kind("BHND", 64, 0, 4).layout(1024)
    seconds = []
    for _ in range(2):
        begun = time.perf_counter()
        reshard(*ends)
        seconds.append(time.perf_counter() - begun)
    first, again = (f"{each * 1e6:.1f} µs" for each in seconds)
    Console().print(f"to compare the layouts took {first}, and then {again}")


def _plan(job: Job, blocks: list[list[int]], addrs: npt.NDArray[np.uint64]) -> int:
    """How many pieces; they are all made, one window after the other."""
    patterns = reshard(
        [kind.layout(PLANNED_TOKENS) for kind in job.sources],
        job.destination.layout(PLANNED_TOKENS),
    )
    count = 0
    for index in range(len(job.sources)):
        mine = [pattern for pattern in patterns if pattern.source == index]
        windows = planned(mine, addrs, blocks[index], addrs, blocks[-1], PLANNED_TOKENS)
        assert isinstance(windows, Windows)
        count += sum(len(window) for window in windows)
    return count


class Held:
    """A cache of a rank, and its memory."""

    def __init__(
        self, node: Node, kind: Kind, blocks: list[int], key: BlocksCacheKey | None = None
    ) -> None:
        self.kind, self.blocks, desc = kind, blocks, kind.desc(MOVED_TOKENS)
        nbytes = int(np.prod(desc.shape)) * 2
        self.tensors = [
            np.frombuffer(mmap.mmap(-1, nbytes), dtype=np.uint16).reshape(desc.shape)
            for _ in range(desc.num_tensors)
        ]
        for tensor in self.tensors:
            tensor[...] = 0
        addrs = [tensor.ctypes.data for tensor in self.tensors]
        layout = kind.layout(MOVED_TOKENS)
        self.cache: Cache = node.manager.register_blocks_cache(desc, addrs, key, layout=layout)

    def fill(self) -> None:
        for index in range(2 * LAYERS):
            tensor, wanted = self.parts(index)
            tensor[self.blocks] = wanted

    def check(self) -> None:
        """Ends the process if a byte is wrong."""
        for index in range(2 * LAYERS):
            tensor, wanted = self.parts(index)
            if not np.array_equal(tensor[self.blocks], wanted):
                sys.exit("a byte is wrong")

    def parts(self, index: int) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint16]]:
        """What the tokens' blocks of a tensor have, and what the model has: [block, H, N, D]."""
        heads = self.kind.heads
        of_token = np.arange(MOVED_TOKENS)[:, None] * 131 + np.arange(HEAD_SIZE)
        of_head = index * 7919 + np.arange(heads.first, heads.stop)[:, None, None] * 104729
        kv: npt.NDArray[np.uint16] = (of_head + of_token).astype(np.uint16)
        by_block = kv.reshape(heads.count, -1, self.kind.block_tokens, HEAD_SIZE)
        axes = ["HBND".index(axis) for axis in self.kind.order]
        return self.tensors[index], by_block.transpose(axes)


#: those of the other process
_held: list[Held] = []


def hold(node: Node, kind: Kind, blocks: list[int], key: BlocksCacheKey) -> None:
    """A source, or a destination."""
    _held.append(Held(node, kind, blocks, key))


def fill(_: Node) -> None:
    """What was held last."""
    _held[-1].fill()


def check(_: Node) -> None:
    """What was held last."""
    _held[-1].check()


@app.command()
def move(
    path: Annotated[str, typer.Option()] = "cma",
    rounds: int = 9,
    threads: int = 2,
    *,
    push: bool = False,
) -> None:
    """Pulls 2,048 tokens from a process that has all sources, or pushes them to a destination."""
    settings: dict[str, object] = {
        "transfer_path": path, "sync_kv_timeout": 60_000, "transfer_threads": threads,
        "enable_remote_cache_accessible": push,
    }  # fmt: skip
    way = _push if push else _pull
    node = Node()
    with NodeProcess() as owner:
        port = owner.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **settings)
        node.start(LLMRole.DECODER, 2, **settings)
        node.link(port, 1)
        pulls = {
            name: way(node, owner, job, 10 * at) for at, (name, job) in enumerate(JOBS.items())
        }
        took: dict[str, list[float]] = {name: [] for name in pulls}
        for _ in range(rounds):
            for name, pull in pulls.items():
                begun = time.perf_counter()
                nbytes = pull()
                took[name].append((time.perf_counter() - begun) / nbytes)
        node.stop()
    table = Table("", "GB/s", "times as long as equal")
    for name, each in took.items():
        ratio = statistics.median(a / b for a, b in zip(each, took[EQUAL], strict=True))
        table.add_row(name, f"{1e-9 / statistics.median(each):.2f}", f"{ratio:.2f}")
    Console().print(table)


def _pull(node: Node, owner: NodeProcess, job: Job, model_id: int) -> Callable[[], int]:
    """Pulls; the bytes. Once it has been done, and verified."""
    sources = {}
    for number, kind in enumerate(job.sources):
        key, blocks = BlocksCacheKey(1, model_id + number), kind.blocks(MOVED_TOKENS)
        owner.call(hold, kind, blocks, key)
        owner.call(fill)
        sources[key] = blocks
    ours = Held(node, job.destination, job.destination.blocks(MOVED_TOKENS))
    nbytes = job.nbytes

    def pull() -> int:
        node.manager.pull_shards(sources, ours.cache, ours.blocks, tokens=MOVED_TOKENS)
        return nbytes

    pull()
    ours.check()
    return pull


def _push(node: Node, owner: NodeProcess, job: Job, model_id: int) -> Callable[[], int]:
    """Pushes, one source after the other; the bytes. Once it has been done, and verified."""
    key, blocks = BlocksCacheKey(1, model_id), job.destination.blocks(MOVED_TOKENS)
    owner.call(hold, job.destination, blocks, key)
    sources = [Held(node, kind, kind.blocks(MOVED_TOKENS)) for kind in job.sources]
    for source in sources:
        source.fill()
    nbytes = job.nbytes

    def push() -> int:
        for source in sources:
            node.manager.push_blocks(key, source.cache, source.blocks, blocks, tokens=MOVED_TOKENS)
        return nbytes

    push()
    owner.call(check)
    return push


if __name__ == "__main__":
    app()
