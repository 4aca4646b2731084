"""What all planners are asked: one request between two engines with the same model."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from random import Random
from typing import TYPE_CHECKING, Final

import numpy as np

from llm_datadist import DataType, KVHeads, KVLayout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_datadist.core.segments import U64

DATA_TYPE: Final = DataType.DT_BF16
#: between two tensors, so that no two of them are one piece
_GAP: Final = 4096


@dataclass(frozen=True)
class Model:
    """What all ranks have in common."""

    num_layers: int
    num_heads: int  #: 0: latent
    head_size: int


@dataclass(frozen=True)
class Engine:
    """How one end divides the model, and its cache."""

    tp: int
    pp: int = 1
    block_tokens: int = 16


@dataclass(frozen=True)
class Rank:
    """One process: what it holds, at which addresses, and the request's blocks in it."""

    index: int
    tp_rank: int
    layout: KVLayout
    addrs: U64 = field(compare=False)
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    """A request: these tokens, from one engine to the other."""

    model: Model
    src: Engine
    dst: Engine
    order: str
    tokens: range
    #: blocks anywhere in the cache, or one after the other
    is_scattered: bool = True

    def __str__(self) -> str:
        ends = " to ".join(
            f"TP {end.tp} PP {end.pp} blocks of {end.block_tokens}" for end in (self.src, self.dst)
        )
        return f"{self.model}, {ends}, {self.order}, {self.tokens}"

    @cached_property
    def sources(self) -> list[Rank]:
        return self._ranks(self.src, 1)

    @cached_property
    def destinations(self) -> list[Rank]:
        return self._ranks(self.dst, 1 + len(self.sources))

    def _ranks(self, engine: Engine, place: int) -> list[Rank]:
        layers = self.model.num_layers // engine.pp
        return [
            self._rank(engine, index, range(stage * layers, (stage + 1) * layers), place + index)
            for index, stage in enumerate(np.repeat(range(engine.pp), engine.tp).tolist())
        ]

    def _rank(self, engine: Engine, index: int, layers: Sequence[int], place: int) -> Rank:
        tp_rank = index % engine.tp
        size = engine.block_tokens
        count = -(-self.tokens.stop // size) - self.tokens.start // size
        num_blocks = count + 3
        heads = self.model.num_heads
        layout = KVLayout(
            tuple(layers),
            KVHeads.share(heads, tp_rank, engine.tp) if heads else KVHeads.all(1),
            num_blocks, size, self.model.head_size, DATA_TYPE, self.order,
        )  # fmt: skip
        blocks = range(1, 1 + count)
        return Rank(
            index,
            tp_rank,
            layout,
            np.uint64(place << 40)
            + np.arange(layout.num_tensors, dtype=np.uint64) * np.uint64(layout.nbytes + _GAP),
            tuple(Random(place).sample(range(num_blocks), count) if self.is_scattered else blocks),
        )
