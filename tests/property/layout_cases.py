"""Random requests between random layouts, and what a naive copy would make of them.

The oracle knows nothing of strides: it fills arrays whose dims are the axes, element by element, in
nested loops. A cell stands for a byte, and its value says which byte of which element it is, so
that one in a wrong place cannot look right.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest

from llm_datadist.core import messages as m
from llm_datadist.core.fetches import names_of, pieces_of
from llm_datadist.core.reshard import common, reshard
from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.kv_layout import KVHeads, KVLayout
from llm_datadist.types import DataType

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from random import Random

    from llm_datadist.core.combs import Pieces
    from llm_datadist.core.pattern import Pattern
    from llm_datadist.core.segments import U64, Segments

Cells: TypeAlias = "npt.NDArray[np.int64]"

TYPES = (DataType.DT_UINT8, DataType.DT_BF16, DataType.DT_FLOAT)
#: what no byte of an element has as its value
UNTOUCHED = -1


@dataclass(frozen=True)
class Model:
    """What all ranks have in common."""

    layers: tuple[int | str, ...]
    num_heads: int  #: 0: latent
    head_size: int
    data_type: DataType

    @classmethod
    def random(cls, rng: Random) -> Model:
        numbers = range(rng.randint(1, 3))
        layers = tuple(numbers) if rng.random() < 0.5 else tuple(f"layer.{n}" for n in numbers)
        return cls(layers, rng.choice([0, 1, 2, 3, 4, 6]), rng.randint(1, 3), rng.choice(TYPES))

    def shares(self, ranks: int) -> list[KVHeads]:
        """What tensor-parallel ranks hold; nothing where that cannot be."""
        if not self.num_heads:
            return [KVHeads.all(1)] * ranks
        try:
            return [KVHeads.share(self.num_heads, rank, ranks) for rank in range(ranks)]
        except LLMException:
            return []


class Rank:
    """One process: its layout, its memory, the arrays on it, the blocks of the sequence."""

    def __init__(
        self, rng: Random, model: Model, layers: Sequence[int | str], heads: KVHeads, tokens: range
    ) -> None:
        self.layers, self.heads, self.tokens = tuple(layers), heads, tokens
        self.num_kv = 2 if model.num_heads else 1
        self.block_tokens = rng.choice([1, 2, 3, 4, 4, 8])
        count = -(-tokens.stop // self.block_tokens) - tokens.start // self.block_tokens
        num_blocks = count + rng.randint(0, 3)
        self.blocks = _blocks(rng, num_blocks, count)
        axes = [axis for axis in "LKBHND" if axis in "BND" or (axis in "LK" and rng.random() < 0.5)]
        axes = [axis for axis in axes if axis != "K" or model.num_heads]
        axes += ["H"] if model.num_heads else []
        rng.shuffle(axes)
        if rng.random() < 0.5:  # as engines have it
            axes = [axis for axis in axes if axis != "D"] + ["D"]
        self.order = "".join(axes)
        sizes = {
            "L": len(layers), "K": self.num_kv, "B": num_blocks, "H": heads.count,
            "N": self.block_tokens, "D": model.head_size,
        }  # fmt: skip
        self._fill(rng, [sizes[axis] for axis in axes], model.data_type)

    def _fill(self, rng: Random, shape: list[int], data_type: DataType) -> None:
        strides, step = [0] * len(shape), 1
        for index in reversed(range(len(shape))):
            strides[index] = step
            step *= shape[index] + rng.choice([0, 0, 0, 1])
        tensor_cells = step * data_type.itemsize
        per_layer = 1 if "K" in self.order else self.num_kv
        num_tensors = per_layer * (1 if "L" in self.order else len(self.layers))
        gaps = [rng.choice([0, 1, 7]) for _ in range(num_tensors + 1)]
        self.base = rng.choice([0, 4096, 2**47])
        self.cells: Cells = np.full(sum(gaps) + num_tensors * tensor_cells, UNTOUCHED, np.int64)
        places = list(range(num_tensors))
        rng.shuffle(places)
        starts = [sum(gaps[: place + 1]) + place * tensor_cells for place in places]
        self.addrs = np.array([self.base + start for start in starts], dtype=np.uint64)
        self.tensor_cells = tensor_cells
        self.arrays = [
            np.lib.stride_tricks.as_strided(
                self.cells[start:],
                (*shape, data_type.itemsize),
                [*(8 * stride * data_type.itemsize for stride in strides), 8],
            )
            for start in starts
        ]
        self.layout = KVLayout.of_tensor(
            shape, strides, data_type, self.order,
            num_tensors=num_tensors, heads=self.heads, layers=self.layers,
        )  # fmt: skip

    def has(self, layer: int | str, head: int) -> bool:
        """Whether it holds this head of the model in that layer."""
        return layer in self.layers and self.heads.first <= head < self.heads.stop

    def places_of(self, vectors: U64) -> Cells:
        """The cells of these vectors, each of which lies in one tensor."""
        for addr, nbytes in vectors.tolist():
            offsets = [addr - int(start) for start in self.addrs]
            assert any(0 <= offset <= self.tensor_cells - nbytes for offset in offsets), "outside"
        ranges = [np.arange(addr, addr + nbytes) - self.base for addr, nbytes in vectors.tolist()]
        return np.concatenate(ranges)

    def elements(self) -> Iterator[tuple[Cells, tuple[int | str, int, int, int, int]]]:
        """The bytes of each element of the tokens, and which element it is."""
        head_size = self.arrays[0].shape[self.order.index("D")]
        for layer, kv, head, token, element in product(
            range(len(self.layers)), range(self.num_kv), range(self.heads.count), self.tokens,
            range(head_size),
        ):  # fmt: skip
            block = self.blocks[token // self.block_tokens - self.tokens.start // self.block_tokens]
            at = {
                "L": layer, "K": kv, "B": block, "H": head,
                "N": token % self.block_tokens, "D": element,
            }  # fmt: skip
            tensor = 0 if "L" in self.order else layer
            if "K" not in self.order:
                tensor = tensor * self.num_kv + kv
            place = tuple(at[axis] for axis in self.order)
            which = (self.layers[layer], kv, self.heads.first + head, token, element)
            yield self.arrays[tensor][place], which


@dataclass(frozen=True)
class Case:
    """Sources, a destination, and the tokens that are asked for."""

    model: Model
    sources: list[Rank]
    destination: Rank
    tokens: range

    @classmethod
    def random(cls, rng: Random) -> Case:
        model = Model.random(rng)
        start = rng.choice([0, 0, rng.randint(0, 9)])
        tokens = range(start, start + rng.randint(1, 14))
        stages = rng.randint(1, len(model.layers))
        cut = rng.randint(0, len(model.layers)) if stages > 1 else len(model.layers)
        parts = [part for part in (model.layers[:cut], model.layers[cut:]) if part]
        shares = rng.choice(list(filter(None, map(model.shares, (1, 2, 3, 4, 8)))))
        sources = [
            Rank(rng, model, _shuffled(rng, part), heads, tokens)
            for part in parts
            for heads in shares
        ]
        rng.shuffle(sources)
        if len(sources) > 1 and rng.random() < 0.2:
            del sources[0]
        mine = rng.choice(rng.choice(list(filter(None, map(model.shares, (1, 2, 3, 4, 8))))))
        kept = _shuffled(rng, model.layers)[: rng.randint(1, len(model.layers))]
        return cls(model, sources, Rank(rng, model, kept, mine, tokens), tokens)

    def is_covered(self) -> bool:
        """Whether the sources have all that the destination needs."""
        heads = range(self.destination.heads.first, self.destination.heads.stop)
        return all(
            any(source.has(layer, head) for source in self.sources)
            for layer, head in product(self.destination.layers, heads)
        )

    def check(self) -> None:
        """Fails unless the plan moves just what the naive copy does, or is refused as it must."""
        layouts = [source.layout for source in self.sources]
        if not self.is_covered():
            with pytest.raises(LLMException, match=r"axis [LH]") as refused:
                reshard(layouts, self.destination.layout)
            assert refused.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
            return
        expected = self._fill(self.sources)
        self._move(reshard(layouts, self.destination.layout), self.sources)
        np.testing.assert_array_equal(self.destination.cells, expected)

    def check_pushes(self) -> None:
        """Fails unless each source brings just what it has, or is refused where it has nothing."""
        for source in self.sources:
            expected = self._fill([source])
            if (expected == UNTOUCHED).all():
                with pytest.raises(LLMException, match=r"axis [LH].*none of them") as refused:
                    common(source.layout, self.destination.layout)
                assert refused.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
            else:
                self._move([common(source.layout, self.destination.layout)], [source])
                np.testing.assert_array_equal(self.destination.cells, expected)

    def _fill(self, sources: Sequence[Rank]) -> Cells:
        """Gives elements values; the destination's cells with all that these sources have."""
        values: dict[object, int] = {}
        self.destination.cells[:] = UNTOUCHED
        for cells, which in self.destination.elements():
            values[which] = 8 * len(values)
            if any(source.has(which[0], which[2]) for source in sources):
                cells[:] = values[which] + np.arange(len(cells))
        expected = self.destination.cells.copy()
        self.destination.cells[:] = UNTOUCHED
        for source in sources:
            for cells, which in source.elements():
                number = values.get(which)
                cells[:] = -2 if number is None else number + np.arange(len(cells))
        return expected

    def _move(self, patterns: Sequence[Pattern], sources: Sequence[Rank]) -> None:
        written = np.zeros(len(self.destination.cells), np.int64)
        for pattern in patterns:
            source = sources[pattern.source]
            blocks = source.blocks, self.destination.blocks, self.tokens
            segments = pattern.segments(*blocks, source.addrs, self.destination.addrs)
            assert len(segments) == pattern.num_segments(*blocks)
            assert segments.total_nbytes == pattern.nbytes_per_token * len(self.tokens)
            addrs = source.addrs, self.destination.addrs
            for count in (3, 2**20):
                windows = list(pattern.windows(*blocks, *addrs, count=count))
                assert max(map(len, windows)) <= count
                assert _rows([window.flat() for window in windows]) == _rows([segments])
            for window in windows:
                for part in window.split(2):
                    assert _pushed(part) == _vectors(part)
                    self._copy(source, part, written)
        assert written.max() <= 1, "a byte was written twice"

    def _copy(self, source: Rank, pieces: Pieces, written: Cells) -> None:
        """As the kernel does: the bytes of the one end's vectors into the other's."""
        here = self.destination.places_of(pieces.dst_iovecs())
        there = source.places_of(pieces.src_iovecs())
        self.destination.cells[here] = source.cells[there]
        np.add.at(written, here, 1)


def _vectors(pieces: Pieces) -> list[list[list[int]]]:
    return [pieces.src_iovecs().tolist(), pieces.dst_iovecs().tolist()]


def _pushed(pieces: Pieces) -> list[list[list[int]]]:
    """The vectors of the same pieces at a receiver who is asked to fetch them."""
    return _vectors(pieces_of(m.Fetch(1, 1, 1, 1, 8, 1000, 1.0, *names_of(pieces))))


def _rows(parts: Sequence[Segments]) -> list[tuple[int, int, int]]:
    return sorted(row for part in parts for row in zip(*part.lists, strict=True))


def _shuffled(rng: Random, layers: Sequence[int | str]) -> list[int | str]:
    return rng.sample(list(layers), len(layers))


def _blocks(rng: Random, num_blocks: int, count: int) -> list[int]:
    if rng.random() < 0.5:
        return rng.sample(range(num_blocks), count)
    start = rng.randint(0, num_blocks - count)
    return list(range(start, start + count))
