"""What this process knows of its peers' caches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from llm_datadist.core.generations import STALE
from llm_datadist.core.geometry import CacheKind, Geometry, Layout
from llm_datadist.core.messages import (
    KEY_NBYTES,
    CacheInfo,
    LayoutInfo,
    ProtocolError,
)
from llm_datadist.core.packed import layers_of, pack_layers
from llm_datadist.core.ranges import Ranges
from llm_datadist.core.registry import Entry, KeyName
from llm_datadist.core.remote_keys import RemoteKeys, has_request_at, pack_keys
from llm_datadist.errors import LLMException, LLMStatusCode, invalid
from llm_datadist.keys import CacheKeyByIdAndIndex
from llm_datadist.kv_layout import KVHeads, KVLayout
from llm_datadist.types import DataType

if TYPE_CHECKING:
    from collections.abc import Iterable

    from llm_datadist.keys import AnyKey


class Claim(NamedTuple):
    """That a key leads to a row of a cache."""

    key: KeyName
    row: int


class Guard(NamedTuple):
    """What a one-sided access must find unchanged: this generation, in this word of the owner.

    The claim is for the owner to check, where it takes part in the access.
    """

    cache_id: int
    generation: int
    word_addr: int
    claim: Claim | None = None

    @classmethod
    def of(cls, entry: Entry) -> Guard:
        """What whoever reads our cache must find unchanged."""
        return cls(entry.cache_id, entry.generation, entry.word_addr)


@dataclass(frozen=True, slots=True, eq=False)
class RemoteCache:
    """A peer's cache, as its owner described it."""

    guard: Guard
    layout: Layout
    is_remote_accessible: bool
    is_owned: bool
    keys: bytes  #: as its owner packed them: see `core/remote_keys.py`
    kv_layout: KVLayout | None = None
    is_counted: bool = False

    def claimed(self, key: KeyName, row: int) -> RemoteCache:
        """The same, to be reached only while the key leads there."""
        return replace(self, guard=self.guard._replace(claim=Claim(key, row)))

    def has_key_at(self, row: int) -> bool:
        """Whether a pull of this row uses up a key."""
        return self.is_owned and has_request_at(self.keys, row)


class RemoteRow(NamedTuple):
    """Where a transfer reaches into a peer: a cache, or a row of it."""

    cluster_id: int
    name: int | KeyName  #: its id, or one of its keys
    row: int | None = None  #: None: the row that the key names

    @classmethod
    def of(cls, key: AnyKey) -> RemoteRow:
        """What a key leads to at its cluster. Raises LLMException for one that names nothing."""
        if isinstance(key, CacheKeyByIdAndIndex):
            return cls(key.cluster_id, key.cache_id, key.batch_index)
        name = KeyName.of(key)
        if name is None:
            raise invalid(f"{key} has neither a req_id nor a prefix_id")
        if not 0 <= name.model_id < 2**64:
            raise LLMException(f"no cache can have {key}", LLMStatusCode.LLM_KV_CACHE_NOT_EXIST)
        return cls(key.cluster_id, name)


def describe(entry: Entry, key: KeyName | None = None) -> CacheInfo:
    """What the owner of a cache tells its peers about it, with all of its keys, or with this one.

    All keys are told in any thread, without a lock: what changes meanwhile makes that stale.
    """
    generation = entry.generation  # first: of what was read before it changed, it is a former one
    geometry = entry.layout.geometry
    return CacheInfo(
        cache_id=entry.cache_id,
        kind=geometry.kind,
        num_tensors=geometry.num_tensors,
        num_rows=geometry.num_rows,
        row_nbytes=geometry.row_nbytes,
        is_remote_accessible=entry.is_remote_accessible,
        is_owned=entry.is_owned,
        generation=generation,
        word_addr=entry.word_addr,
        addrs=entry.layout.addrs.astype("<u8", copy=False).tobytes(),
        keys=_packed_keys(entry) if key is None else pack_keys({key: entry.keys[key]}),
        layout=None if entry.kv_layout is None else _layout_info(entry.kv_layout),
        is_counted=entry.num_readers > 0,
    )


def _packed_keys(entry: Entry) -> bytes:
    """Made once for as long as no key goes, however often peers ask."""
    count, packed = entry.packed_keys
    if count != len(entry.keys):
        keys = entry.keys.copy()
        packed = pack_keys(keys)
        entry.packed_keys = len(keys), packed
    return packed


def understand(info: CacheInfo) -> RemoteCache:
    """A peer's description, checked. Raises ProtocolError when it cannot be true."""
    tensor_nbytes = info.num_rows * info.row_nbytes
    is_whole = len(info.addrs) == 8 * info.num_tensors and len(info.keys) % KEY_NBYTES == 0
    if not is_whole or info.kind not in tuple(CacheKind):
        raise ProtocolError(f"cache {info.cache_id} is described with parts that do not fit")
    if tensor_nbytes >= 2**63 or info.generation == STALE:
        raise ProtocolError(f"cache {info.cache_id} is described as one that cannot be")
    addrs = np.frombuffer(info.addrs, dtype="<u8").astype(np.uint64, copy=False)
    if len(addrs) and int(addrs.max()) > 2**64 - max(tensor_nbytes, 1):
        raise ProtocolError(f"cache {info.cache_id} is described as beyond the address space")
    geometry = Geometry(CacheKind(info.kind), info.num_tensors, info.num_rows, info.row_nbytes)
    kv_layout = None if info.layout is None else _layout_of(info.layout, geometry)
    return RemoteCache(
        Guard(info.cache_id, info.generation, info.word_addr),
        Layout(geometry, addrs),
        info.is_remote_accessible,
        info.is_owned,
        info.keys,
        kv_layout,
        info.is_counted,
    )


def _layout_info(layout: KVLayout) -> LayoutInfo:
    heads = layout.heads
    return LayoutInfo(
        pack_layers(layout.layers), (heads.first, heads.count, heads.of), layout.num_blocks,
        layout.block_tokens, layout.head_size, layout.data_type.value, layout.order,
        list(layout.strides),
    )  # fmt: skip


def _layout_of(info: LayoutInfo, geometry: Geometry) -> KVLayout:
    """Raises ProtocolError for one that cannot be, or reaches beyond the cache."""
    try:
        layout = KVLayout(
            tuple(layers_of(info.layers)), KVHeads(*info.heads), info.num_blocks, info.block_tokens,
            info.head_size, DataType(info.data_type), info.order, tuple(info.strides),
        )  # fmt: skip
        layout.check_cache(geometry.num_tensors, geometry.tensor_nbytes)
    except (ValueError, LLMException) as error:
        raise ProtocolError(f"a cache has a layout that cannot be: {error}") from error
    return layout


class RemoteTable:
    """The caches of one peer in remote-accessible mode; replaced as a whole, never changed."""

    def __init__(self, caches: Iterable[RemoteCache] = ()) -> None:
        self._by_id = {cache.guard.cache_id: cache for cache in caches}
        #: those that have keys
        self._keyed = [cache for cache in self._by_id.values() if cache.keys]
        self._keys = RemoteKeys([cache.keys for cache in self._keyed])
        #: those that were found before
        self._found: dict[KeyName, tuple[RemoteCache, int]] = {}
        self._ranges: Ranges | None = None

    def find(self, cache_id: int) -> RemoteCache | None:
        return self._by_id.get(cache_id)

    @property
    def ranges(self) -> Ranges:
        """All of the memory in it, by the ids of the caches."""
        if self._ranges is None:
            self._ranges = Ranges(
                (addr, cache.layout.geometry.tensor_nbytes, cache.guard.cache_id)
                for cache in self._by_id.values()
                if cache.layout.geometry.tensor_nbytes
                for addr in cache.layout.addrs.tolist()
            )
        return self._ranges

    def find_key(self, key: KeyName) -> tuple[RemoteCache, int] | None:
        """The cache and the row to which it leads."""
        found = self._found.get(key)
        if found is None and (place := self._keys.find(key)) is not None:
            index, row = place
            found = self._found[key] = self._keyed[index], row
        return found
