"""The vLLM connector between engines that differ: in tensor-parallel size, stages and blocks."""

from __future__ import annotations

import socket
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

torch = pytest.importorskip("torch")

from kv_processes import OURS, PROMPT, THEIRS  # noqa: E402
from kv_shards import LAYERS, Shard, kinds  # noqa: E402

from llm_datadist import KVHeads, LLMException  # noqa: E402
from llm_datadist.integrations.vllm.ranks import partners  # noqa: E402
from llm_datadist.integrations.vllm.shapes import (  # noqa: E402
    GroupShape,
    RegionShape,
    Shape,
    misfits,
    shape_of,
)
from llm_datadist.testing.cluster import free_port  # noqa: E402
from llm_datadist.testing.process import ObjectProcess  # noqa: E402
from llm_datadist.testing.timing import eventually  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@pytest.mark.parametrize("of", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("their_size", range(1, 9))
def test_partners_have_all_heads_and_everybody_is_somebodys(
    of: int, size: int, their_size: int
) -> None:
    every = [partners(rank, size, their_size) for rank in range(size)]
    assert {rank for ranks in every for rank in ranks} == set(range(their_size))
    if size == their_size:
        assert every == [[rank] for rank in range(size)]
    try:
        shares = [KVHeads.share(of, rank, size) for rank in range(size)]
        theirs = [KVHeads.share(of, rank, their_size) for rank in range(their_size)]
    except LLMException:
        return  # vLLM does not start with these
    for rank, ours in enumerate(shares):
        had = {
            head for them in every[rank] for head in range(theirs[them].first, theirs[them].stop)
        }
        assert had >= set(range(ours.first, ours.stop))


class Engines:
    """Processes for workers, started once; each test opens and closes what it needs of them."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._idle: list[ObjectProcess[Shard]] = []
        self._open: list[ObjectProcess[Shard]] = []

    def start(
        self,
        role: str,
        size: int,
        block_tokens: int,
        kind: str,
        stages: int = 1,
        *,
        overlap: bool = False,
    ) -> list[ObjectProcess[Shard]]:
        """One for each worker, at ports that follow each other."""
        count, port = stages * size, free_ports(stages * size)
        while len(self._idle) < count:
            self._idle.append(self._stack.enter_context(ObjectProcess(Shard)))
        workers = [self._idle.pop() for _ in range(count)]
        for number, worker in enumerate(workers):
            args = role, port, number, size, stages, block_tokens, kind, overlap
            worker.call(Shard.open, *args)
            self._open.append(worker)
        return workers

    def close(self) -> None:
        for worker in self._open:
            worker.call(Shard.close)
        self._idle += self._open
        self._open.clear()


def free_ports(count: int) -> int:
    """The first of so many that follow each other."""
    for _ in range(100):
        first = free_port()
        with ExitStack() as stack, suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return first
    raise AssertionError("no ports are free")


@pytest.fixture(scope="module")
def all_engines() -> Iterator[Engines]:
    with ExitStack() as stack:
        yield Engines(stack)


@pytest.fixture
def engines(all_engines: Engines) -> Iterator[Engines]:
    yield all_engines
    all_engines.close()


def blocks_for(blocks: Sequence[int], block_tokens: int) -> list[int]:
    return list(blocks[: -(-len(PROMPT) // block_tokens)])


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        ((2, 4), (1, 4)),
        ((1, 4), (2, 4)),
        ((1, 8), (1, 4)),
        ((1, 4), (1, 8)),
        ((2, 8), (1, 4)),
        ((1, 4), (2, 16)),
        ((4, 4), (1, 4)),  # heads are replicated
        ((1, 4), (4, 4)),
    ],
    ids=str,
)
def test_each_worker_has_its_part_of_the_prompt(
    engines: Engines, kind: str, prefill: tuple[int, int], decode: tuple[int, int]
) -> None:
    there = engines.start("kv_producer", *prefill, kind)
    here = engines.start("kv_consumer", *decode, kind)
    ours = blocks_for(OURS, decode[1])
    params = handed_over(there, prefill[1])
    for worker in here:
        assert worker.call(Shard.read, "d", PROMPT, params, ours) == "right"
        assert worker.call(Shard.touched_blocks) == set(ours)
    for worker in there:
        assert worker.call(Shard.is_kept)
    for worker in here:
        worker.call(Shard.done)
    for worker in there:
        assert worker.call(Shard.is_sent)


def handed_over(workers: list[ObjectProcess[Shard]], block_tokens: int) -> Any:
    blocks = blocks_for(THEIRS, block_tokens)
    lease = workers[0].call(Shard.new_lease)
    for worker in workers:
        worker.call(Shard.prefill, PROMPT, blocks, lease)
    return workers[0].call(Shard.handed_over, PROMPT, blocks, lease)


@pytest.mark.parametrize("kind", kinds())
def test_stages_are_matched_by_their_layers(engines: Engines, kind: str) -> None:
    there = engines.start("kv_producer", 2, 4, kind, stages=2)
    (here,) = engines.start("kv_consumer", 1, 8, kind)
    params = handed_over(there, 4)
    assert here.call(Shard.read, "d", PROMPT, params, blocks_for(OURS, 8)) == "right"
    here.call(Shard.done)
    for worker in there:
        assert worker.call(Shard.is_sent)


@pytest.mark.parametrize("kind", kinds())
def test_layers_are_read_while_they_are_computed(engines: Engines, kind: str) -> None:
    """Of two stages of two ranks each, by one worker with other blocks."""
    there = engines.start("kv_producer", 2, 4, kind, stages=2, overlap=True)
    (here,) = engines.start("kv_consumer", 1, 8, kind, overlap=True)
    ours, theirs = blocks_for(OURS, 8), blocks_for(THEIRS, 4)
    grant = there[0].call(Shard.new_lease)
    answer = there[0].call(Shard.handed_over, PROMPT, theirs, grant)
    del answer["remote_lease"]
    here.call(Shard.load, "d", PROMPT, {**answer, "transfer_id": "t"}, ours)
    for worker in there:
        worker.call(Shard.announce, PROMPT, theirs, grant, "t")
    for layer in range(LAYERS):
        name = f"layers.{layer}"
        assert not here.call(Shard.has, PROMPT, ours, name)
        for worker in there:
            worker.call(Shard.compute_layer, name)
        assert eventually(lambda name=name: here.call(Shard.has, PROMPT, ours, name))  # type: ignore[misc]
    assert here.call(Shard.outcome, "d", PROMPT, ours) == "right"


@pytest.mark.parametrize("change", [{"tp_size": 65}, {"pp_size": 4096}, {"tp_size": 2}], ids=str)
def test_a_hand_over_with_other_workers_is_a_failed_load(
    engines: Engines, change: dict[str, int]
) -> None:
    (there,) = engines.start("kv_producer", 1, 4, "heads")
    (here,) = engines.start("kv_consumer", 1, 4, "heads")
    params = handed_over([there], 4)
    assert here.call(Shard.read, "forged", PROMPT, {**params, **change}, OURS) == "failed"
    assert here.call(Shard.touched_blocks) == set()
    assert here.call(Shard.read, "d", PROMPT, params, OURS) == "right"


def test_a_worker_that_is_gone_is_a_failed_load_of_all(engines: Engines) -> None:
    there = engines.start("kv_producer", 2, 4, "heads")
    (here,) = engines.start("kv_consumer", 1, 4, "heads")
    params = handed_over(there, 4)
    there[1].call(Shard.end_lease)
    assert here.call(Shard.read, "d", PROMPT, params, OURS) == "failed"
    assert here.call(Shard.touched_blocks) == set()


REGION = RegionShape(0, ["a", "b"], "CPU_ATTN", 64, splits=True, whole=2, planes={"K": 3, "V": 4})
SHAPE = Shape(1, [GroupShape("all", 0, 4)], [REGION])


def changed(region: dict[str, object], group: dict[str, object], tp_size: int = 1) -> Shape:
    return Shape(
        tp_size,
        [msgspec.structs.replace(SHAPE.groups[0], **group)],
        [msgspec.structs.replace(REGION, **region)],
    )


def test_memories_that_are_alike_fit() -> None:
    assert misfits(SHAPE, SHAPE) == []
    assert misfits(SHAPE, changed({"piece_nbytes": 128}, {"block_tokens": 8})) == []
    assert misfits(SHAPE, changed({}, {}, tp_size=2)) == []
    assert misfits(SHAPE, changed({"layers": ["c"], "form": "another's"}, {})) == []


@pytest.mark.parametrize(
    ("region", "group", "tp_size", "said"),
    [
        ({}, {"kept": "window", "span_tokens": 8}, 1, "KV cache groups: [['window', 8]] there, "),
        ({"form": "CPU_ATTN amx"}, {}, 1, "form of KV blocks: CPU_ATTN amx there, CPU_ATTN here"),
        ({"splits": False}, {}, 2, "tensor parallel size (a is not split): 2 there, 1 here"),
        ({"piece_nbytes": 128}, {}, 1, "bytes of a KV block: 128 there, 64 here"),
        (
            {"piece_nbytes": 128, "planes": {}},
            {"block_tokens": 8},
            1,
            "block size (tokens are not told apart): 8 there, 4 here",
        ),
    ],
)
def test_what_does_not_fit_is_said_by_its_field(
    region: dict[str, object], group: dict[str, object], tp_size: int, said: str
) -> None:
    (found,) = misfits(SHAPE, changed(region, group, tp_size))
    assert said in found


def test_of_a_window_only_larger_blocks_fit_into_smaller_ones() -> None:
    window = {"kept": "window", "span_tokens": 6}
    small, large = (
        changed({}, window),
        changed({"piece_nbytes": 128}, {**window, "block_tokens": 8}),
    )
    assert misfits(small, large) == []
    (found,) = misfits(large, small)
    assert found == "block size (of a window, theirs must be a multiple): 4 there, 8 here"


@pytest.mark.parametrize("said", [None, 7, [], {}, {"tp_size": 0}, {"groups": [1]}, [SHAPE]])
def test_what_says_nothing_of_its_memory_is_refused(said: object) -> None:
    with pytest.raises(ValueError, match="does not say what its KV memory is like"):
        shape_of(said)
