"""What a block of a layer is made of, as far as ends that differ can make use of it.

Between ends that are alike a block is moved as it is. Ends with other heads need to tell heads
apart, ends with other blocks need to tell tokens apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from llm_datadist import DataType, KVHeads, KVLayout

if TYPE_CHECKING:
    from collections.abc import Sequence

#: elements are only moved, so that their size is all that matters
_ELEMENTS: Final = {
    1: DataType.DT_UINT8, 2: DataType.DT_UINT16, 4: DataType.DT_UINT32, 8: DataType.DT_UINT64,
}  # fmt: skip


@dataclass(frozen=True)
class Plane:
    """A vector for each token of a block: K or V of a head, or a latent one."""

    name: str
    #: from the beginning of the head, or of the block
    offset_nbytes: int
    #: elements of the vector
    size: int
    #: whether tokens lie beside each other, instead of elements
    is_transposed: bool = False


@dataclass(frozen=True)
class Form:
    """How a block of a layer lies. Without heads and planes it is only known by its bytes."""

    #: both ends must call it the same
    name: str = "opaque"
    #: which heads of the model are in it, one behind the other
    heads: KVHeads | None = None
    #: whether all tensor-parallel ranks have the same
    is_replicated: bool = False
    itemsize: int = 1
    block_tokens: int = 1
    planes: tuple[Plane, ...] = ()

    @classmethod
    def latent(cls, name: str, size: int, itemsize: int, block_tokens: int) -> Form:
        """One vector a token, which all ranks have (MLA)."""
        return cls(name, None, True, itemsize, block_tokens, (Plane("latent", 0, size),))

    @classmethod
    def k_then_v(
        cls, name: str, heads: KVHeads, size: int, itemsize: int, block_tokens: int
    ) -> Form:
        """All K of a head, and all V of it behind that; K element by element, V token by token.

        As vLLM's attention on CPUs has it, where K is not packed for matrix instructions.
        """
        planes = Plane("K", 0, size, True), Plane("V", size * itemsize * block_tokens, size)
        return cls(name, heads, False, itemsize, block_tokens, planes)

    def whole(self, layers: Sequence[str], num_blocks: int, nbytes: int, stride: int) -> KVLayout:
        """Blocks of so many bytes, and so far apart, as they are; heads are told apart."""
        if self.heads is None:
            return KVLayout(
                tuple(layers), KVHeads.all(1), num_blocks, 1, nbytes, DataType.DT_UINT8, "BND",
                (stride, nbytes, 1),
            )  # fmt: skip
        half = nbytes // self.heads.count // 2
        return KVLayout(
            tuple(layers), self.heads, num_blocks, 1, half, DataType.DT_UINT8, "BHKND",
            (stride, 2 * half, half, half, 1),
        )  # fmt: skip

    def by_token(
        self, plane: Plane, layers: Sequence[str], num_blocks: int, stride: int
    ) -> KVLayout:
        """The plane of each head of each layer, as `plane_addrs` has them: tokens are told apart.

        Each head is a layer of its own here, so that K and V may lie in different ways.
        """
        steps = (1, self.block_tokens) if plane.is_transposed else (plane.size, 1)
        by_token, by_element = (step * self.itemsize for step in steps)
        return KVLayout(
            tuple(f"{layer} {head}" for layer in layers for head in self._head_numbers),
            KVHeads.all(1), num_blocks, self.block_tokens, plane.size, _ELEMENTS[self.itemsize],
            "BND", (stride, by_token, by_element),
        )  # fmt: skip

    def plane_addrs(self, plane: Plane, addrs: Sequence[int], nbytes: int) -> list[int]:
        """Where the planes of the first block begin, of layers that begin there."""
        step = nbytes // len(self._head_numbers)
        return [
            addr + place * step + plane.offset_nbytes
            for addr in addrs
            for place in range(len(self._head_numbers))
        ]

    @property
    def num_heads(self) -> int:
        """How many are told apart."""
        return self.heads.count if self.heads else 1

    @property
    def _head_numbers(self) -> range:
        return range(self.heads.first, self.heads.stop) if self.heads else range(1)
