"""The catalog: this process's caches, as its own calls and its peers' requests see them."""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from llm_datadist.core import messages as m
from llm_datadist.core.generations import Generations
from llm_datadist.core.geometry import CacheKind, Geometry, Layout
from llm_datadist.core.registry import Entry, KeyName, Registry
from llm_datadist.core.remote import describe
from llm_datadist.core.stats import HeldKey
from llm_datadist.engine.exposure import Exposure
from llm_datadist.errors import LLMException, LLMStatusCode, invalid
from llm_datadist.memory.device import HOST
from llm_datadist.memory.views import held_bytes
from llm_datadist.observe.log import get_logger
from llm_datadist.transport.base import NONCE_NBYTES, ProbeNonce
from llm_datadist.types import Placement

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy.typing as npt

    from llm_datadist.core.geometry import U64
    from llm_datadist.core.pages import PoolUsage
    from llm_datadist.memory.arena import MemoryPool
    from llm_datadist.transport.base import Transport

#: the cache that holds the nonce of the hand-shake
PROBE_ID = 0


class Holdings(NamedTuple):
    """What a catalog holds at a moment."""

    num_caches: int
    num_keys: int
    #: of those that hold an allocated cache, or a row of it
    oldest_key: HeldKey | None


class Catalog:
    """The registry behind a lock, and what peers may ask of it. Thread-safe."""

    def __init__(
        self,
        pools: Mapping[Placement, MemoryPool],
        transports: Sequence[Transport],
        *,
        peers_keep_tables: bool,
    ) -> None:
        #: where allocated caches lie, by placement
        self.pools = pools
        self._exposure = Exposure(transports)
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._in_use: dict[int, int] = {}
        #: being unregistered: no use may begin, or waiting for the last one might never end
        self._leaving: set[int] = set()
        #: freed while in use: their memory goes back to its pool with the last use
        self._doomed: dict[int, Entry] = {}
        #: whose pins are gone: those uses end with the next call that looks at the pools
        self._unpinned: deque[Entry] = deque()
        self._registry = Registry(
            Generations(secrets.randbits(62), self._exposure.expose_words),
            first_id=PROBE_ID,
            peers_keep_tables=peers_keep_tables,
        )
        self._nonce = ProbeNonce()
        geometry = Geometry(CacheKind.CONTINUOUS, 1, 1, NONCE_NBYTES)
        self._probe = self.register(
            Layout.at(geometry, [self._nonce.addr]), Placement.HOST, (), is_remote_accessible=True
        )

    @property
    def probe_target(self) -> m.ProbeTarget:
        probe = self._probe
        return m.ProbeTarget(self._nonce.addr, self._nonce.nonce, probe.word_addr, probe.generation)

    def register(
        self,
        layout: Layout,
        placement: Placement,
        keys: Sequence[KeyName | None],
        *,
        is_remote_accessible: bool,
        held: Sequence[object | None] = (),
        space: str = HOST,
    ) -> Entry:
        region = self._exposure.expose(layout, space, is_remote_accessible=is_remote_accessible)
        try:
            with self._lock:
                entry = self._registry.register(
                    layout, placement, keys, is_remote_accessible=is_remote_accessible, held=held
                )
                entry.space = space
                self._exposure.file(entry.cache_id, region)
        except BaseException:
            self._exposure.conceal_region(region)
            raise
        return entry

    def unregister(self, cache_id: int, timeout_s: float) -> Entry | None:
        """Forgets a cache, once the transfers of this process that use its memory have ended.

        Returns it, so that its tensors go when the lock is free: their finalizers may call us.
        An unknown id is no error, nor is that of an allocated cache, which stays (O19). Raises
        LLMException(LLM_TIMEOUT) when the transfers do not end; the cache then stays.
        """
        with self._lock:
            if self._registry.is_owned(cache_id) or cache_id == PROBE_ID:
                return None
            self._leaving.add(cache_id)
            try:
                if not self._idle.wait_for(lambda: not self._in_use.get(cache_id), timeout_s):
                    raise LLMException(
                        f"cache {cache_id} is still used by a transfer after {timeout_s:.3f} s",
                        LLMStatusCode.LLM_TIMEOUT,
                    )
                entry = self._registry.unregister(cache_id)
                if entry is not None:
                    self._exposure.conceal(cache_id)
                return entry
            finally:
                self._leaving.discard(cache_id)

    def allocate(
        self, geometry: Geometry, placement: Placement, keys: Sequence[KeyName | None]
    ) -> Entry:
        """A cache in pool memory. Raises LLMException: LLM_OUT_OF_MEMORY, LLM_PARAM_INVALID."""
        pool = self.pools[placement]
        self._end_unpinned()
        try:
            addrs = pool.allocate_many(geometry.num_tensors, geometry.tensor_nbytes)
        except LLMException as error:
            kept = len(self._doomed)
            hint = f"; {kept} freed caches are still held by arrays or transfers" if kept else ""
            text = f"no memory for a cache in the {placement.name} pool: {error}{hint}"
            get_logger().error(text)
            raise LLMException(text, error.status_code) from error
        region = None
        try:
            layout = Layout.at(geometry, addrs)
            region = self._exposure.expose(layout, pool.space, is_remote_accessible=True)
            with self._lock:
                entry = self._registry.allocate(layout, placement, keys)
                entry.allocated_at, entry.space = time.monotonic(), pool.space
                self._exposure.file(entry.cache_id, region)
        except BaseException:
            if region is not None:
                self._exposure.conceal_region(region)
            for addr in addrs:
                pool.free(addr)
            raise
        return entry

    def deallocate(self, cache_id: int) -> None:
        """Drops the id's reference; what no key holds is freed. Spec 6.5."""
        with self._lock:
            self._give_back(self._registry.deallocate(cache_id))

    def remove_key(self, key: KeyName) -> None:
        """Drops a key of an allocated cache; what nothing else holds is freed. Spec 6.6."""
        with self._lock:
            self._give_back(self._registry.remove_key(key))

    def holdings(self) -> Holdings:
        """How many caches and keys there are, and the key that has waited longest for its pull."""
        with self._lock:
            entry = self._registry.oldest_held()
            return Holdings(
                len(self._registry) - 1,  # without the probe's
                self._registry.num_keys,
                None if entry is None else _held(entry),
            )

    def close(self) -> list[Entry]:
        """Makes all that peers know of this process stale.

        Returns what was there: the tensors that it holds may go when no transport can reach them.
        """
        with self._lock:
            entries = list(self._registry.entries())
            for entry in entries:
                self._registry.unregister(entry.cache_id)
        return entries

    def use(self, cache_id: int) -> Use:
        """A cache of ours whose memory stays it meanwhile. Raises LLM_KV_CACHE_NOT_EXIST."""
        with self._lock:
            entry = self._find(cache_id)
            if cache_id in self._leaving:
                raise LLMException(
                    f"cache {cache_id} is being unregistered", LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
                )
            self._begin_use(entry)
        return Use(self, entry)

    def release(self, entry: Entry) -> None:
        """The end of one use."""
        with self._lock:
            self._end_use(entry)

    def view(self, cache_id: int, index: int) -> npt.NDArray[np.uint8]:
        """The bytes of one tensor of ours; the array keeps them, whatever becomes of the cache.

        Raises LLMException: LLM_KV_CACHE_NOT_EXIST, and LLM_PARAM_INVALID for memory that is only
        known by its address.
        """
        with self._lock:
            entry = self._find(cache_id)
            held = self._hold(entry, index)
        if held is None:
            raise invalid(
                f"cache {cache_id} was registered by address, so nothing keeps the memory of a "
                "view: register the tensors themselves"
            )
        layout = entry.layout
        return held_bytes(int(layout.addrs[index]), layout.geometry.tensor_nbytes, held)

    def usage(self) -> dict[Placement, tuple[PoolUsage, ...]]:
        """How full each part of each pool is."""
        self._end_unpinned()
        return {placement: pool.usage() for placement, pool in self.pools.items()}

    def answer(self, request: m.Message) -> m.Message:
        """The answer to a peer's question. Raises LLMException to refuse it."""
        if isinstance(request, m.Resolve):
            return self._resolve(request)
        if isinstance(request, m.ListCaches):
            with self._lock:
                infos = [describe(e) for e in self._registry.entries() if e is not self._probe]
            return m.Caches(infos)
        if isinstance(request, m.UseUp):
            first, count = request.first_tensor, request.num_tensors
            tensors = range(first, first + count) if count else None
            with self._lock:
                self._give_back(self._registry.use_up(request.cache_id, request.row, tensors))
            return m.Done()
        raise m.ProtocolError(f"{type(request).__name__} is no request")

    def readable(self, read: m.Read | m.Digest) -> tuple[Entry, U64, U64]:
        """The memory that a peer asks to be sent: cache, addresses, lengths; all checked."""
        addrs, nbytes = m.columns_of(read.columns, 2)
        with self._lock:
            entry = self._registry.find(read.cache_id)
            if isinstance(read, m.Read) and read.claim is not None:
                key_id, model_id, is_prefix, row = read.claim
                key = KeyName(key_id, model_id, is_prefix)
                if self._registry.find_key(key) != (entry, row):
                    raise LLMException(
                        f"{key} leads elsewhere by now",
                        LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
                    )
        _check_reach(entry, read.generation, addrs, nbytes)
        if entry.space != HOST:
            raise invalid(f"cache {entry.cache_id} lies in {entry.space}: no stream sends that")
        return entry, addrs, nbytes

    @contextmanager
    def writable(
        self, cache_id: int | None, generation: int, addrs: U64, nbytes: U64
    ) -> Iterator[Entry]:
        """The cache of memory that a peer asks us to fill, checked and kept meanwhile."""
        if cache_id is None:
            entry = self._find_by_addrs(addrs, nbytes)
            cache_id, generation = entry.cache_id, entry.generation
        with self.use(cache_id) as entry:
            _check_reach(entry, generation, addrs, nbytes)
            yield entry

    def _begin_use(self, entry: Entry) -> None:
        self._in_use[entry.cache_id] = self._in_use.get(entry.cache_id, 0) + 1

    def _end_use(self, entry: Entry) -> None:
        left = self._in_use[entry.cache_id] - 1
        if left:
            self._in_use[entry.cache_id] = left
        else:
            del self._in_use[entry.cache_id]
            self._give_back(self._doomed.pop(entry.cache_id, None))
            if self._leaving:
                self._idle.notify_all()

    def _hold(self, entry: Entry, index: int) -> object | None:
        """What keeps the memory of a tensor, beyond `close` too; None if only the program does."""
        if not entry.is_owned:
            return entry.held[index] if entry.held else None
        nbytes = entry.layout.geometry.tensor_nbytes
        memory = self.pools[entry.placement].view(int(entry.layout.addrs[index]), nbytes)
        self._begin_use(entry)
        return memory, Pin(entry, self._unpinned)

    def _end_unpinned(self) -> None:
        with self._lock:
            while self._unpinned:
                self._end_use(self._unpinned.popleft())

    def _find_by_addrs(self, addrs: U64, nbytes: U64) -> Entry:
        with self._lock:
            for entry in self._registry.entries():
                if (
                    entry is not self._probe
                    and entry.is_remote_accessible
                    and entry.layout.covers(addrs, nbytes)
                ):
                    return entry
        raise invalid("the addresses lie in no cache that is remote accessible")

    def _give_back(self, freed: Entry | None) -> None:
        """Returns the memory of an allocated cache, now or when its last use ends."""
        if freed is None:
            return
        if freed.cache_id in self._in_use:
            self._doomed[freed.cache_id] = freed
            return
        self._exposure.conceal(freed.cache_id)
        pool = self.pools[freed.placement]
        for addr in freed.layout.addrs.tolist():
            pool.free(addr)

    def _resolve(self, request: m.Resolve) -> m.Resolved:
        with self._lock:
            if request.cache_id is not None:
                entry, row = self._find(request.cache_id), 0
            else:
                key = KeyName(request.key_id, request.model_id, request.is_prefix)
                entry, row = self._registry.find_key(key)
            return m.Resolved(describe(entry), row)

    def _find(self, cache_id: int) -> Entry:
        if cache_id <= PROBE_ID:
            raise LLMException(
                f"there is no cache {cache_id}: ids begin at 1",
                LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
            )
        return self._registry.find(cache_id)


class Use:
    """A use of a cache that has begun, to be ended by `with`."""

    __slots__ = ("_catalog", "_entry")

    def __init__(self, catalog: Catalog, entry: Entry) -> None:
        self._catalog = catalog
        self._entry = entry

    def __enter__(self) -> Entry:
        return self._entry

    def __exit__(self, *_: object) -> None:
        self._catalog.release(self._entry)


class Pin:
    """A use of a cache that ends when nobody holds the pin.

    The garbage collector may strike in a thread that holds the catalog's lock, so that the end is
    only noted down there.
    """

    __slots__ = ("_entry", "_unpinned")

    def __init__(self, entry: Entry, unpinned: deque[Entry]) -> None:
        self._entry = entry
        self._unpinned = unpinned

    def __del__(self) -> None:
        self._unpinned.append(self._entry)


def _held(entry: Entry) -> HeldKey:
    key = next(iter(entry.keys))
    age_s = time.monotonic() - entry.allocated_at
    return HeldKey(entry.cache_id, age_s, key.id, key.model_id, key.is_prefix)


def _check_reach(entry: Entry, generation: int, addrs: U64, nbytes: U64) -> None:
    """A peer may reach these bytes of this cache. Raises LLMException."""
    if entry.generation != generation:
        raise LLMException(
            f"cache {entry.cache_id} was freed or changed", LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
        )
    if not entry.is_remote_accessible:
        raise invalid(f"cache {entry.cache_id} is not registered as remote accessible")
    if not entry.layout.covers(addrs, nbytes):
        raise invalid(f"a transfer reaches beyond the tensors of cache {entry.cache_id}")
    if float(nbytes.sum(dtype=np.float64)) > m.MAX_REQUEST_NBYTES:
        raise invalid(f"one request asks for more than {m.MAX_REQUEST_NBYTES} bytes")
