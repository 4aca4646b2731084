"""How the bytes of a cache are laid out: tensors, rows and addresses."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from llm_datadist.core.segments import FEW, U64
from llm_datadist.errors import invalid

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_RANK = 31


class CacheKind(enum.IntEnum):
    """What dim 0 of a cache's shape counts. Spec 1, 6.1."""

    CONTINUOUS = 0  #: batch rows
    BLOCKS = 1  #: blocks of a paged cache
    MIX = 2  #: both readings are allowed (C++ `RegisterKvCache`)


@dataclass(frozen=True, slots=True)
class Geometry:
    """The shape of a cache in bytes; all its tensors are alike.

    A *row* is one batch row of a continuous cache or one block of a blocks cache.
    """

    kind: CacheKind
    num_tensors: int
    num_rows: int
    row_nbytes: int

    @classmethod
    def of(cls, kind: CacheKind, num_tensors: int, shape: Sequence[int], nbytes: int) -> Geometry:
        """The geometry of `num_tensors` tensors of `shape`, each of `nbytes`. Spec 6.1.

        Raises LLMException(LLM_PARAM_INVALID) for a rank that no cache can have.
        """
        if not 1 <= len(shape) <= MAX_RANK:
            raise invalid(f"a cache's shape has 1 to {MAX_RANK} dims, this one {len(shape)}")
        return cls(kind, num_tensors, shape[0], nbytes // shape[0])

    @property
    def tensor_nbytes(self) -> int:
        return self.num_rows * self.row_nbytes

    @property
    def has_blocks(self) -> bool:
        return self.kind != CacheKind.CONTINUOUS

    @property
    def has_batch_rows(self) -> bool:
        return self.kind != CacheKind.BLOCKS


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """A geometry at its addresses, one address per tensor, in whichever process owns the memory."""

    geometry: Geometry
    addrs: U64

    @classmethod
    def at(cls, geometry: Geometry, addrs: Sequence[int]) -> Layout:
        """Raises LLMException(LLM_PARAM_INVALID) unless each tensor has a usable address."""
        if len(addrs) != geometry.num_tensors:
            raise invalid(f"{len(addrs)} addresses for {geometry.num_tensors} tensors")
        # no peer would believe what it is told of a larger one (`core/remote.py`)
        is_too_large = geometry.tensor_nbytes >= 2**63
        for addr in addrs:
            if is_too_large or not 0 <= addr <= 2**64 - max(geometry.tensor_nbytes, 1):
                raise invalid(
                    f"no tensor of {geometry.tensor_nbytes} bytes can lie at address {addr:#x}"
                )
        return cls(geometry, np.array(addrs, dtype=np.uint64))

    def tensors(self, selected: range | None) -> Layout:
        """The same layout with only the selected tensors; None selects all."""
        if selected is None:
            return self
        geometry = replace(self.geometry, num_tensors=len(selected))
        return Layout(geometry, self.addrs[selected.start : selected.stop])

    def covers(self, addrs: U64, nbytes: U64) -> bool:
        """Whether every (address, length) lies within one tensor; overflow-safe, vectorised."""
        if len(addrs) <= FEW:
            pairs = zip(addrs.tolist(), nbytes.tolist(), strict=True)
            return all(self._covers_one(addr, length) for addr, length in pairs)
        starts = np.sort(self.addrs)
        if not len(starts):
            return not len(addrs)
        index = np.searchsorted(starts, addrs, side="right")
        if len(index) and index.min() == 0:
            return False
        offset = addrs - starts[index - 1]
        size = np.uint64(self.geometry.tensor_nbytes)
        return bool(((offset <= size) & (nbytes <= size - np.minimum(offset, size))).all())

    def _covers_one(self, addr: int, nbytes: int) -> bool:
        room = self.geometry.tensor_nbytes - nbytes
        return any(start <= addr <= start + room for start in self.addrs.tolist())
