"""Transfers: what a call asks for, as one frozen value with all of its rules and its arithmetic.

A value is made of checked arguments, before anything of ours or of a peer's is looked at. Whoever
carries it out asks twice: `check` for the rules that need our cache alone, and `segments` once the
peer's cache is known, which is the plan or a refusal. The same value may be asked again, when the
peer's cache proves to be another by now. Nothing of a caller's lists is kept beyond the call.

A pull reads the peer's cache into ours; a push has the peer read ours into its own; a copy stays
within this process. Each comes as a row, as blocks, and as a row that is cut into blocks.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

from llm_datadist.core import plan
from llm_datadist.core.geometry import CacheKind, Geometry, Layout
from llm_datadist.core.reshard import check_alike, common, no_tokens, planned, reshard
from llm_datadist.errors import LLMException, LLMStatusCode, invalid

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_datadist.core.combs import Pieces
    from llm_datadist.core.layers import PulledLayers
    from llm_datadist.core.pattern import Pattern, Windows
    from llm_datadist.core.registry import Entry
    from llm_datadist.core.remote import RemoteCache, RemoteRow
    from llm_datadist.core.segments import Segments
    from llm_datadist.core.strips import Tokens


@dataclass(frozen=True, slots=True)
class Pull(abc.ABC):
    """A peer's cache, or a part of it, into ours. Spec 6.9, 6.10."""

    verb: ClassVar[str]
    key: object  #: as the caller named the source, for the messages of errors
    place: RemoteRow
    cache_id: int  #: ours
    layers: PulledLayers
    is_one_sided: bool  #: our cache, too, must be remote accessible then
    #: whether the owner is told when it has arrived: a part of something larger is not yet all
    is_all: ClassVar[bool] = True

    @property
    def tensors(self) -> range | None:
        """Which tensors of the row are taken; None: all. For the owner, who counts them (6.7)."""
        return self.layers.src

    def __str__(self) -> str:
        return f"{self.verb} of {self.key} into cache {self.cache_id}"

    def check(self, ours: Entry) -> None:
        """The rules that need only our cache. Raises LLM_PARAM_INVALID."""
        geometry = ours.layout.geometry
        if ours.kv_layout is None:  # else the plan counts its blocks, if the peer has one as well
            self._check_fit(geometry)
        self.layers.check(geometry)

    def segments(self, remote: RemoteCache, row: int, ours: Entry) -> Pieces | Windows:
        """What to read. Raises LLMException: LLM_PARAM_INVALID, LLM_KV_CACHE_NOT_EXIST."""
        _check_row(remote, row)
        if self.is_one_sided:
            _check_ours(ours)
        _check_theirs(remote)
        if remote.kv_layout is not None and ours.kv_layout is not None:
            if self.layers.are_all:
                return self._reshard(remote, ours)
            check_alike(remote.kv_layout, ours.kv_layout)
        if ours.kv_layout is not None:
            self._check_fit(ours.layout.geometry)
        src, dst = self.layers.select(remote.layout, ours.layout)
        return self._plan(src, row, dst)

    def _reshard(self, remote: RemoteCache, ours: Entry) -> Pieces | Windows:
        """What to read where both caches say what their blocks hold."""
        raise invalid(f"{self.verb} moves rows, and both caches have blocks")

    @abc.abstractmethod
    def _check_fit(self, ours: Geometry) -> None: ...

    @abc.abstractmethod
    def _plan(self, src: Layout, src_row: int, dst: Layout) -> Pieces: ...


@dataclass(frozen=True, slots=True)
class PullRow(Pull):
    """A batch row into a batch row, each behind its offset; a `size` of -1 is the rest of ours."""

    verb = "pull_cache"
    dst_row: int
    size: int = -1
    src_offset: int = 0
    dst_offset: int = 0

    def _check_fit(self, ours: Geometry) -> None:
        if self.dst_row >= ours.num_rows:
            raise invalid(
                f"batch_index {self.dst_row} is out of range: our cache has rows 0 to "
                f"{ours.num_rows - 1}"
            )
        plan.check_batch_rows(ours, self._nbytes(ours), "destination", self.dst_offset)

    def _plan(self, src: Layout, src_row: int, dst: Layout) -> Pieces:
        nbytes = self._nbytes(dst.geometry)
        plan.check_batch_rows(src.geometry, nbytes, "source", self.src_offset)
        return plan.row_to_row(
            src, src_row, dst, self.dst_row, nbytes,
            src_offset=self.src_offset, dst_offset=self.dst_offset,
        )  # fmt: skip

    def _nbytes(self, ours: Geometry) -> int:
        return ours.row_nbytes - self.dst_offset if self.size == -1 else self.size


@dataclass(frozen=True, slots=True)
class PullBlocks(Pull):
    """Block `src_blocks[j]` into block `dst_blocks[j]`; without `src_blocks`, a row into them."""

    verb = "pull_blocks"
    src_blocks: Sequence[int]
    dst_blocks: Sequence[int]
    tokens: Tokens = None  #: for caches with layouts

    def _check_fit(self, ours: Geometry) -> None:
        plan.check_blocks(ours, self.dst_blocks, "destination")

    def _reshard(self, remote: RemoteCache, ours: Entry) -> Pieces | Windows:
        if not self.src_blocks:
            raise invalid("the key names a cache of blocks: name the blocks to pull (src_blocks)")
        patterns = self._patterns(remote, ours)
        src, dst = remote.layout.addrs, ours.layout.addrs
        return planned(patterns, src, self.src_blocks, dst, self.dst_blocks, self.tokens)

    def _patterns(self, remote: RemoteCache, ours: Entry) -> Sequence[Pattern]:
        assert remote.kv_layout is not None
        assert ours.kv_layout is not None
        return reshard([remote.kv_layout], ours.kv_layout)

    def _plan(self, src: Layout, src_row: int, dst: Layout) -> Pieces:
        if self.tokens is not None:
            raise no_tokens()
        if self.src_blocks:
            plan.check_blocks(src.geometry, self.src_blocks, "source")
            return plan.blocks_to_blocks(src, self.src_blocks, dst, self.dst_blocks)
        plan.check_batch_rows(src.geometry, 0, "source")
        return plan.row_to_blocks(src, src_row, dst, self.dst_blocks)


class Layers(Protocol):
    """Which tensors a push moves: PushedLayers, or OneLayer."""

    @property
    def are_all(self) -> bool: ...

    def check(self, ours: Geometry) -> None: ...

    def moves_nothing(self, ours: Geometry) -> bool: ...

    def select(self, src: Layout, dst: Layout) -> tuple[Layout, Layout]: ...


@dataclass(frozen=True, slots=True)
class Push(abc.ABC):
    """A cache of ours, or a part of it, into a peer's. Spec 6.11, 6.12."""

    verb: ClassVar[str]
    key: object  #: as the caller named the destination, for the messages of errors
    place: RemoteRow
    cache_id: int  #: ours
    layers: Layers

    def __str__(self) -> str:
        return f"{self.verb} of cache {self.cache_id} to {self.key}"

    def check(self, ours: Entry) -> None:
        """The rules that need only our cache. Raises LLM_PARAM_INVALID."""
        if ours.kv_layout is None:  # as of a pull
            self.check_fit(ours.layout.geometry)
        _check_ours(ours)

    def check_fit(self, ours: Geometry) -> None:
        """Those of them that hold for destinations which are known by address, too."""
        self.layers.check(ours)

    def segments(self, remote: RemoteCache, row: int, ours: Entry) -> Pieces | Windows:
        """What the peer is to read. Raises as `Pull.segments` does."""
        _check_theirs(remote)
        _check_row(remote, row)
        if remote.kv_layout is not None and ours.kv_layout is not None:
            if self.layers.are_all:
                return self._reshard(remote, ours)
            check_alike(ours.kv_layout, remote.kv_layout)
        if ours.kv_layout is not None:
            self.check_fit(ours.layout.geometry)
        src, dst = self.layers.select(ours.layout, remote.layout)
        return self.plan(src, dst, row)

    def _reshard(self, remote: RemoteCache, ours: Entry) -> Pieces | Windows:
        """As of a pull."""
        raise invalid(f"{self.verb} moves rows, and both caches have blocks")

    @abc.abstractmethod
    def plan(self, src: Layout, dst: Layout, dst_row: int) -> Pieces:
        """The same between layouts that are cut to the tensors that are meant."""

    @abc.abstractmethod
    def layout_at(self, addrs: Sequence[int], src: Geometry) -> Layout:
        """A destination that is known by its addresses alone, as large as it needs to be."""


@dataclass(frozen=True, slots=True)
class PushRow(Push):
    """A whole batch row into a row that holds it (O13)."""

    verb = "push_cache"
    src_row: int

    def plan(self, src: Layout, dst: Layout, dst_row: int) -> Pieces:
        nbytes = src.geometry.row_nbytes
        _check_src_row(src, self.src_row)
        plan.check_batch_rows(dst.geometry, nbytes, "destination")
        return plan.row_to_row(src, self.src_row, dst, dst_row, nbytes)

    def layout_at(self, addrs: Sequence[int], src: Geometry) -> Layout:
        geometry = Geometry(CacheKind.CONTINUOUS, len(addrs), 1, src.row_nbytes)
        return Layout.at(geometry, addrs)


@dataclass(frozen=True, slots=True)
class PushLayerRow(PushRow):
    """A row of one layer into a row; a blocks cache, at either end, has one: block 0. Spec 6.12."""

    verb = "transfer_cache_async"

    def segments(self, remote: RemoteCache, row: int, ours: Entry) -> Pieces | Windows:
        return PushRow.segments(self, replace(remote, layout=_as_rows(remote.layout)), row, ours)

    def plan(self, src: Layout, dst: Layout, dst_row: int) -> Pieces:
        return PushRow.plan(self, _as_rows(src), dst, dst_row)


@dataclass(frozen=True, slots=True)
class PushBlocks(Push):
    """Block `src_blocks[j]` into block `dst_blocks[j]`."""

    verb = "push_blocks"
    src_blocks: Sequence[int]
    dst_blocks: Sequence[int]
    #: what the caller thinks a block has (spec 6.12); 0: nothing
    block_nbytes: int = 0
    tokens: Tokens = None  #: for caches with layouts

    def check_fit(self, ours: Geometry) -> None:
        Push.check_fit(self, ours)
        if self.block_nbytes not in (0, ours.row_nbytes):
            raise invalid(
                f"dst_block_memory_size {self.block_nbytes} is not our block size, "
                f"{ours.row_nbytes}"
            )
        plan.check_blocks(ours, self.src_blocks, "source")

    def _reshard(self, remote: RemoteCache, ours: Entry) -> Pieces | Windows:
        assert ours.kv_layout is not None
        assert remote.kv_layout is not None
        pattern = common(ours.kv_layout, remote.kv_layout)
        src, dst = ours.layout.addrs, remote.layout.addrs
        return planned([pattern], src, self.src_blocks, dst, self.dst_blocks, self.tokens)

    def plan(self, src: Layout, dst: Layout, dst_row: int) -> Pieces:
        if self.tokens is not None:
            raise no_tokens()
        plan.check_blocks(dst.geometry, self.dst_blocks, "destination")
        return plan.blocks_to_blocks(src, self.src_blocks, dst, self.dst_blocks)

    def layout_at(self, addrs: Sequence[int], src: Geometry) -> Layout:
        num_rows = max(self.dst_blocks) + 1
        return Layout.at(Geometry(CacheKind.BLOCKS, len(addrs), num_rows, src.row_nbytes), addrs)


@dataclass(frozen=True, slots=True)
class PushRowIntoBlocks(Push):
    """A row of one layer, as of PushLayerRow, cut into blocks of `block_nbytes`. Spec 6.12."""

    verb = "transfer_cache_async"
    src_row: int
    dst_blocks: Sequence[int]
    block_nbytes: int

    def plan(self, src: Layout, dst: Layout, dst_row: int) -> Pieces:
        plan.check_blocks(dst.geometry, self.dst_blocks, "destination")
        if self.block_nbytes != dst.geometry.row_nbytes:
            raise invalid(
                f"dst_block_memory_size is {self.block_nbytes}, the destination's blocks have "
                f"{dst.geometry.row_nbytes} bytes"
            )
        rows = _as_rows(src)
        _check_src_row(rows, self.src_row)
        return plan.row_to_blocks(rows, self.src_row, dst, self.dst_blocks)

    def layout_at(self, addrs: Sequence[int], src: Geometry) -> Layout:
        if not self.block_nbytes:
            raise invalid("dst_block_memory_size must be greater than 0")
        num_rows = max(self.dst_blocks) + 1
        return Layout.at(Geometry(CacheKind.BLOCKS, len(addrs), num_rows, self.block_nbytes), addrs)


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a peer is still to be told: that a row of its cache was pulled. Spec 6.7.

    A pull on several devices tells it when all have everything: one that failed can be called
    again then, since no key was used up.
    """

    cluster_id: int
    bundle: bytes  #: of the link by which it was pulled: behind another one is another peer
    remote: RemoteCache
    row: int
    tensors: range | None

    def __str__(self) -> str:
        return f"receipt for row {self.row} of cache {self.remote.guard.cache_id}"


class Place(NamedTuple):
    """Where memory lies that no catalog knows, and in which space (memory/device.py)."""

    layout: Layout
    space: str


@dataclass(frozen=True, slots=True)
class Copy(abc.ABC):
    """Between two caches of this process, or within one. Spec 6.8, 6.13, 7.4."""

    src: int | Place  #: a cache by its id
    dst: int | Place

    def __str__(self) -> str:
        return f"copy from {_name_of(self.src)} to {_name_of(self.dst)}"

    @abc.abstractmethod
    def segments(self, src: Layout, dst: Layout) -> Segments:
        """What to copy; none where there is nothing. Raises LLM_PARAM_INVALID."""


@dataclass(frozen=True, slots=True)
class CopyRow(Copy):
    """`nbytes` (-1: the rest) behind `offset` of a row, to that offset of another. Spec 6.8."""

    src_row: int
    dst_row: int
    offset: int
    nbytes: int

    def segments(self, src: Layout, dst: Layout) -> Segments:
        _check_as_many_tensors(src, dst)
        room = min(src.geometry.row_nbytes, dst.geometry.row_nbytes) - self.offset
        wanted = src.geometry.row_nbytes - self.offset if self.nbytes == -1 else self.nbytes
        for row, side, whose in ((self.src_row, src, "source"), (self.dst_row, dst, "destination")):
            if row >= side.geometry.num_rows:
                raise invalid(
                    f"batch index {row} is out of range: the {whose} has "
                    f"{side.geometry.num_rows} rows"
                )
        if room <= 0 or wanted > room:
            raise invalid(
                f"{wanted} bytes from offset {self.offset} on do not fit rows of "
                f"{src.geometry.row_nbytes} and {dst.geometry.row_nbytes} bytes"
            )
        return plan.row_to_row(
            src, self.src_row, dst, self.dst_row, wanted,
            src_offset=self.offset, dst_offset=self.offset,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class CopyBlocks(Copy):
    """Block `src_blocks[j]` to block `dst_blocks[j]`; both may be of one cache."""

    src_blocks: Sequence[int]
    dst_blocks: Sequence[int]

    def segments(self, src: Layout, dst: Layout) -> Segments:
        _check_as_many_tensors(src, dst)
        if src.geometry.row_nbytes != dst.geometry.row_nbytes:
            raise invalid(
                f"source blocks have {src.geometry.row_nbytes} bytes, destination blocks "
                f"{dst.geometry.row_nbytes}"
            )
        if not self.dst_blocks:
            return plan.NOTHING
        plan.check_blocks(src.geometry, self.src_blocks, "source")
        plan.check_blocks(dst.geometry, self.dst_blocks, "destination")
        return plan.blocks_to_blocks(src, self.src_blocks, dst, self.dst_blocks).flat()


def _name_of(cache: int | Place) -> str:
    return f"cache {cache}" if isinstance(cache, int) else "a CPU cache"


def _as_rows(layout: Layout) -> Layout:
    """The same as batch rows, of which a blocks cache has one: its first block. Spec 6.1, 6.12."""
    if layout.geometry.has_batch_rows:
        return layout
    return Layout(replace(layout.geometry, kind=CacheKind.CONTINUOUS, num_rows=1), layout.addrs)


def _check_src_row(src: Layout, row: int) -> None:
    if row >= src.geometry.num_rows:
        raise invalid(f"src_batch_index {row} is out of range: {src.geometry.num_rows} rows")


def _check_row(remote: RemoteCache, row: int) -> None:
    """A batch row that is not there is LLM_KV_CACHE_NOT_EXIST, as a cache is. Spec 6.9, O9."""
    geometry = remote.layout.geometry
    if row >= geometry.num_rows and geometry.has_batch_rows:
        raise LLMException(
            f"the peer's cache {remote.guard.cache_id} has no row {row}, but {geometry.num_rows}",
            LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
        )


def _check_ours(ours: Entry) -> None:
    if not ours.is_remote_accessible:
        raise invalid(
            f"our cache {ours.cache_id} is not remote accessible: register it with "
            "remote_accessible=True"
        )


def _check_theirs(remote: RemoteCache) -> None:
    if not remote.is_remote_accessible:
        raise invalid(
            f"the peer's cache {remote.guard.cache_id} is not remote accessible: its owner must "
            "register it with remote_accessible=True"
        )


def _check_as_many_tensors(src: Layout, dst: Layout) -> None:
    if src.geometry.num_tensors != dst.geometry.num_tensors:
        raise invalid(
            f"{src.geometry.num_tensors} source tensors for {dst.geometry.num_tensors} "
            "destination tensors"
        )
