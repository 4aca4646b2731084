"""The catalog: this process's caches, by id and by key, with the memory they lie in.

Guaranteed: memory that a call uses stays what it is until the call has ended. Each use is noted in
the gate under the call's token, at the moment at which the cache is found. An unregistered cache
waits for its uses, and gets no new ones; an allocated cache that is freed while it is used is gone
for everybody at once, but its memory goes back to its pool with a later look at the pools, when
nothing uses it any more: what is being sent of it to peers ends at once (`Permit`), since it is
worthless to them. So does memory that an array shows, which a Pin keeps.

Changes of several steps are made where no signal's exception strikes (`Errands`): half of one would
leave a key on memory that is free, or memory that is nobody's.

Any thread may call. `_lock` guards the registry, the exposure's file and what is leaving or doomed;
it is taken before the gate's and the pools', and no code of the program's runs under it: tensors
are let go behind it, since their finalizers may call us. Rejected: memory that goes back with the
end of the last use itself (the end of a call would have to take this lock, and a finalizer may end
one wherever the garbage collector strikes).
"""

from __future__ import annotations

import secrets
import time
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from llm_datadist.core import messages as m
from llm_datadist.core.generations import STALE, Generations
from llm_datadist.core.geometry import CacheKind, Geometry, Layout
from llm_datadist.core.registry import Entry, KeyName, Registry
from llm_datadist.core.remote import describe
from llm_datadist.core.stats import HeldKey
from llm_datadist.errors import LLMException, LLMStatusCode, invalid
from llm_datadist.locks import make_lock
from llm_datadist.memory.device import HOST
from llm_datadist.memory.host import warn_of_strays
from llm_datadist.memory.views import held_bytes
from llm_datadist.observe.log import get_logger
from llm_datadist.owner.allocations import Allocations
from llm_datadist.owner.exposure import Exposure
from llm_datadist.owner.tickets import Tickets
from llm_datadist.running.bell import Bell
from llm_datadist.running.threads import is_finalizer
from llm_datadist.transport.base import PROBE_NBYTES, ProbeNonce
from llm_datadist.transport.tcp import Permit
from llm_datadist.types import Placement

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    import numpy.typing as npt

    from llm_datadist.core.pages import PoolUsage
    from llm_datadist.core.segments import U64
    from llm_datadist.kv_layout import KVLayout
    from llm_datadist.memory.arena import MemoryPool
    from llm_datadist.owner.tickets import Ticket
    from llm_datadist.running.gate import Gate
    from llm_datadist.running.threads import Errands
    from llm_datadist.transport.base import Transport

#: a finalizer in a thread of ours waits so long for the last use of a cache
_MOMENT_S = 0.1
#: the cache that holds the nonce of the hand-shake
PROBE_ID = 0


class Holdings(NamedTuple):
    """What a catalog holds at a moment."""

    num_caches: int
    num_keys: int
    #: of those that hold an allocated cache, or a row of it
    oldest_key: HeldKey | None


class Catalog:
    """The registry behind a lock, and who uses what it has. Thread-safe."""

    def __init__(
        self,
        gate: Gate,
        pools: Mapping[Placement, MemoryPool],
        transports: Sequence[Transport],
        *,
        peers_keep_tables: bool,
        errands: Errands,
    ) -> None:
        #: where allocated caches lie, by placement
        self.pools = pools
        self._exposure = Exposure(transports)
        self._gate = gate
        self._errands = errands
        #: rung when a peer has pulled of a cache, and when one has gone
        self._was_read = Bell()
        #: of all devices, this one among them, where a cache has a part and an id on each
        self.siblings: Sequence[Catalog] = (self,)
        self._lock = make_lock()
        #: being unregistered, by which call: no use may begin, or waiting for the last one might
        #: never end
        self.leaving: dict[object, Entry] = {}
        #: unregistered by finalizers that could not wait for their last use
        self._left: dict[Entry, None] = {}
        self._allocations = Allocations(pools, gate, self._exposure)
        generations = Generations(secrets.randbits(62), self._exposure.expose_words)
        self._tickets = Tickets(generations, gate)
        self._registry = Registry(
            generations, first_id=PROBE_ID, peers_keep_tables=peers_keep_tables
        )
        self._nonce = ProbeNonce()
        geometry = Geometry(CacheKind.CONTINUOUS, 1, 1, PROBE_NBYTES)
        layout = Layout.at(geometry, [self._nonce.addr])
        #: the cache of the nonce, which no call names
        self.probe = self._file(layout, Placement.HOST, (), (), is_remote_accessible=True)

    @property
    def probe_target(self) -> m.ProbeTarget:
        probe = self.probe
        return m.ProbeTarget(self._nonce.addr, self._nonce.nonce, probe.word_addr, probe.generation)

    def register(
        self,
        geometry: Geometry,
        addrs: Sequence[int],
        placement: Placement,
        keys: Sequence[KeyName | None] = (),
        *,
        is_remote_accessible: bool,
        held: Sequence[object | None] = (),
        kv_layout: KVLayout | None = None,
        num_readers: int = 0,
        cache_id: int | None = None,
    ) -> Entry:
        """Files a cache over memory that stays the caller's. Spec 6.4.

        The memory is not touched: what is not mapped is warned about, and fails when it is moved.
        `held` keeps it until the cache is unregistered, one object per tensor or none; its id is
        the next one, or the one given. Raises LLMException(LLM_PARAM_INVALID).
        """
        layout = Layout.at(geometry, addrs)
        warn_of_strays(addrs, geometry.tensor_nbytes, held)
        return self._errands.run(
            partial(
                self._file,
                layout,
                placement,
                keys,
                held,
                kv_layout,
                num_readers,
                cache_id,
                is_remote_accessible=is_remote_accessible,
            ),
            lambda entry: self.forget(entry.cache_id),
        )

    def unregister(self, cache_id: int, timeout_s: float) -> Entry | None:
        """Forgets a cache, once the calls of this process that use its memory have ended.

        Returns it, so that its tensors go when the lock is free: their finalizers may call us.
        An unknown id is no error, nor is that of an allocated cache, which stays (O19). Raises
        LLMException(LLM_TIMEOUT) when the calls do not end; the cache then stays. A finalizer in a
        thread of the library's, which those calls may need, waits for a moment; then the cache is
        gone for everybody at once, and its tensors go with a later look.
        """
        leave = object()
        try:
            entry = self.begin_to_leave(cache_id, leave)
            if entry is None:
                return None
            self.await_uses(entry, timeout_s)
            self._errands.run(lambda: self.forget(cache_id))
            return entry
        finally:
            self.leaving.pop(leave, None)

    def await_uses(self, entry: Entry, timeout_s: float) -> None:
        """Waits for the calls that use a cache which is leaving. Raises as `unregister` does."""
        for permit in self._gate.uses_beside(entry):
            if isinstance(permit, Permit):
                permit.revoke(is_awaited=True)
        cannot_wait = is_finalizer()
        if not self._gate.drain(entry, min(timeout_s, _MOMENT_S) if cannot_wait else timeout_s):
            if not cannot_wait:
                raise LLMException(
                    f"cache {entry.cache_id} is still used by a transfer after {timeout_s:.3f} s",
                    LLMStatusCode.LLM_TIMEOUT,
                )
            self._left[entry] = None

    def begin_to_leave(self, cache_id: int, leave: object) -> Entry | None:
        """A cache that is unregistered next; until `leaving` loses the call, nobody may use it."""
        with self._lock:
            entry = self._registry.get(cache_id)
            if entry is None or entry.is_owned or entry is self.probe:
                return None
            self.leaving[leave] = entry
            return entry

    def is_leaving(self, cache_id: int) -> bool:
        """Whether somebody is unregistering it."""
        return any(entry.cache_id == cache_id for entry in list(self.leaving.values()))

    def allocate(
        self,
        geometry: Geometry,
        placement: Placement,
        keys: Sequence[KeyName | None],
        kv_layout: KVLayout | None = None,
        cache_id: int | None = None,
    ) -> Entry:
        """A cache in pool memory. Raises LLMException: LLM_OUT_OF_MEMORY, LLM_PARAM_INVALID."""
        work = partial(self._allocate, geometry, placement, keys, kv_layout, cache_id)
        return self._errands.run(work, lambda entry: self.forget(entry.cache_id))

    def forget(self, cache_id: int) -> None:
        """The end of `register` or `allocate` where nobody got the cache, with its keys.

        Waits for no use; nothing happens for an id that is none.
        """
        with self._lock:
            entry = None if cache_id == PROBE_ID else self._registry.unregister(cache_id)
            if entry is not None and entry.is_owned:
                self._allocations.give_back(entry)
            elif entry is not None and entry not in self._left:
                self._exposure.conceal(cache_id)
        self._was_read.ring()
        self._let_go()

    def _let_go(self) -> None:
        """Of what finalizers have left in use, and nothing uses any more."""
        if not self._left:
            return
        with self._lock:
            unused = [entry for entry in list(self._left) if not self._gate.count(entry)]
            for entry in unused:
                self._exposure.conceal(entry.cache_id)
                self._left.pop(entry, None)
        unused.clear()  # behind the lock: their tensors' finalizers may call us

    def _allocate(
        self,
        geometry: Geometry,
        placement: Placement,
        keys: Sequence[KeyName | None],
        kv_layout: KVLayout | None,
        cache_id: int | None,
    ) -> Entry:
        layout = self._take_memory(geometry, placement)
        region, space = None, self.pools[placement].space
        try:
            region = self._exposure.expose(layout, space, is_remote_accessible=True)
            with self._lock:
                entry = self._registry.allocate(layout, placement, keys, kv_layout, cache_id)
                entry.allocated_at, entry.space = time.monotonic(), space
                self._exposure.file(entry.cache_id, region)
        except BaseException:
            if region is not None:
                self._exposure.conceal_region(region)
            self._allocations.free(layout, placement)
            raise
        return entry

    def _take_memory(self, geometry: Geometry, placement: Placement) -> Layout:
        self._reclaim()
        try:
            return self._allocations.take(geometry, placement)
        except LLMException as error:
            if self._allocations.await_last_uses():
                self._reclaim()
                return self._allocations.take(geometry, placement)
            get_logger().error(str(error))
            raise

    def deallocate(self, cache_id: int) -> None:
        """Drops the id's reference; what no key holds is freed. Spec 6.5."""
        self._errands.run(lambda: self._drop(partial(self._registry.deallocate, cache_id)))

    def remove_key(self, key: KeyName) -> None:
        """Drops a key of an allocated cache; what nothing else holds is freed. Spec 6.6."""
        self._errands.run(lambda: self._drop(partial(self._registry.remove_key, key)))

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
        self._was_read.ring()
        return entries

    def use(self, token: object, cache_id: int) -> Entry:
        """A cache of ours whose memory stays it until the call of that token has left the gate.

        Raises LLMException: LLM_KV_CACHE_NOT_EXIST, and what `Gate.enter` raises.
        """
        with self._lock:
            entry = self._find(cache_id)
            self._refuse_leaving(entry)
            self._gate.enter(token, None, entry)
            return entry

    def issue(
        self, token: object, ours: Entry, reader: object, pushed: Layout | None = None
    ) -> Ticket:
        """A ticket, under which the peer `reader` may fetch our cache while the token's call runs.

        Or only the part of it that is `pushed`. The call revokes it in one step:
        `ticket.cell[0] = STALE`.
        """
        with self._lock:
            return self._tickets.issue(token, ours, reader, pushed)

    def serve(self, token: object, cache_id: int, permit: Permit, reader: object) -> Entry:
        """A cache, or a ticket of the reader's, that an answer to it reads from; the permit can end
        that, which is a use as `use` makes one.

        Raises LLMException(LLM_KV_CACHE_NOT_EXIST).
        """
        with self._lock:
            ticket = self._tickets.find(cache_id, reader)
            if ticket is not None:
                self._refuse_leaving(ticket.ours)
                permit.ticket = ticket.cell, ticket.entry.generation
                self._gate.enter(token, None, ticket.ours, permit)
                return ticket.entry
            entry = self._registry.find(cache_id)
            self._refuse_leaving(entry)
            self._gate.enter(token, None, entry, permit)
            return entry

    @property
    def num_entries(self) -> int:
        """Caches, the probe's among them, and keys."""
        return len(self._registry) + self._registry.num_keys

    def num_tensors(self, cache_id: int) -> int:
        """Of a cache of ours. Raises LLM_KV_CACHE_NOT_EXIST."""
        with self._lock:
            return self._find(cache_id).layout.geometry.num_tensors

    def find_key(self, key: KeyName) -> tuple[Entry, int]:
        """The cache and the row of a key. Raises LLMException(LLM_KV_CACHE_NOT_EXIST)."""
        with self._lock:
            return self._registry.find_key(key)

    def find_at(self, addrs: U64, nbytes: U64) -> Entry:
        """The cache that peers may reach at these addresses. Raises LLM_PARAM_INVALID."""
        with self._lock:
            entry = self._registry.find_at(addrs, nbytes)
        if entry is None or entry is self.probe:
            raise invalid("the addresses lie in no cache that is remote accessible")
        return entry

    def describe(self, name: int | KeyName) -> tuple[m.CacheInfo, int]:
        """What a peer is told of a cache, and the row. Of a key that it names no other is told.

        Raises LLMException: LLM_KV_CACHE_NOT_EXIST, and LLM_PARAM_INVALID for one that peers may
        not reach, of which they learn no more than that.
        """
        with self._lock:
            key, row = None, 0
            if isinstance(name, KeyName):
                key, (entry, row) = name, self._registry.find_key(name)
            else:
                entry = self._find(name)
            if not entry.is_remote_accessible:
                raise invalid(
                    f"the peer's cache {entry.cache_id} is not remote accessible: its owner must "
                    "register it with remote_accessible=True"
                )
            return describe(entry, key), row

    def describe_all(self) -> list[m.CacheInfo]:
        """What a peer is told of the caches that it may reach; of the newest, if there are many.

        Not of those that are being unregistered: others may lie at their addresses already.
        """
        with self._lock:
            hidden = {self.probe, *list(self.leaving.values())}
            entries = [
                entry
                for entry in list(self._registry.entries())
                if entry not in hidden and entry.is_remote_accessible
            ]
        # without the lock, which others want: it may take long
        infos = map(describe, entries[-m.MAX_CACHES :])
        return [info for info in infos if info.generation != STALE]

    def is_remote_accessible(self, cache_id: int) -> bool:
        """Whether peers may reach that cache, or there is none: nothing is told of it then."""
        with self._lock:
            entry = self._registry.get(cache_id)
            return entry is None or entry.is_remote_accessible

    def use_up(self, cache_id: int, row: int, tensors: range | None) -> None:
        """A peer has pulled these tensors of a row; its key goes with the last ones. Spec 6.7.

        On all devices, whichever of them was told: a key is one key. On the first one last, so that
        whoever allocates a cache finds the key gone from all when it is gone from that.
        """
        for catalog in reversed(self.siblings):
            catalog._drop(partial(catalog._registry.use_up, cache_id, row, tensors))
            catalog._was_read.ring()

    def await_readers(self, cache_id: int, timeout_s: float) -> bool:
        """Waits until as many peers have pulled of a cache as are expected; False if they are late.

        Raises LLMException(LLM_KV_CACHE_NOT_EXIST) when it is not there, or goes meanwhile.
        """

        def is_over() -> bool:
            with self._lock:
                entry = self._registry.get(cache_id)
                return entry is None or entry.num_read >= entry.num_readers

        is_read = self._was_read.wait_until(is_over, timeout_s)
        with self._lock:
            self._find(cache_id)
        return is_read

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
        self._errands.run(self._reclaim)
        return {placement: pool.usage() for placement, pool in self.pools.items()}

    def _hold(self, entry: Entry, index: int) -> object | None:
        """What keeps the memory of a tensor, beyond `close` too; None if only the program does."""
        if entry.is_owned:
            return self._allocations.hold(entry, index)
        return entry.held[index] if entry.held else None

    def _file(
        self,
        layout: Layout,
        placement: Placement,
        keys: Sequence[KeyName | None],
        held: Sequence[object | None],
        kv_layout: KVLayout | None = None,
        num_readers: int = 0,
        cache_id: int | None = None,
        *,
        is_remote_accessible: bool,
    ) -> Entry:
        self._let_go()
        region = self._exposure.expose(layout, HOST, is_remote_accessible=is_remote_accessible)
        try:
            with self._lock:
                bound = self._registry.bound(keys)
                entry = self._registry.register(
                    layout, placement, keys, is_remote_accessible=is_remote_accessible, held=held,
                    kv_layout=kv_layout, num_readers=num_readers, cache_id=cache_id,
                )  # fmt: skip
                self._exposure.file(entry.cache_id, region)
        except BaseException:
            self._exposure.conceal_region(region)
            raise
        for key, other in bound:
            leads_to = other if layout.geometry.has_batch_rows else entry
            get_logger().warning(
                "register: %s named cache %d already; of that and the new cache %d it leads to %d",
                key, other.cache_id, entry.cache_id, leads_to.cache_id,
            )  # fmt: skip
        return entry

    def _drop(self, drop: Callable[[], Entry | None]) -> None:
        """Drops a reference; the memory of a cache that is free then goes back."""
        with self._lock:
            freed = drop()
            if freed is not None:
                self._allocations.give_back(freed)

    def _reclaim(self) -> None:
        self._let_go()
        with self._lock:
            self._allocations.reclaim()

    def _refuse_leaving(self, entry: Entry) -> None:
        if self.leaving and entry in list(self.leaving.values()):
            raise LLMException(
                f"cache {entry.cache_id} is being unregistered",
                LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
            )

    def _find(self, cache_id: int) -> Entry:
        if cache_id <= PROBE_ID:
            raise LLMException(
                f"there is no cache {cache_id}: ids begin at 1",
                LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
            )
        return self._registry.find(cache_id)


def _held(entry: Entry) -> HeldKey:
    key = next(iter(entry.keys))
    age_s = time.monotonic() - entry.allocated_at
    return HeldKey(entry.cache_id, age_s, key.id, key.model_id, key.is_prefix)
