"""The registry: every cache of this process, by id and by key. Spec 6.1, 6.2."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from llm_datadist.core.addresses import Addresses
from llm_datadist.core.messages import MAX_KEYS
from llm_datadist.core.packed import pack_layers
from llm_datadist.errors import LLMException, LLMStatusCode, invalid
from llm_datadist.keys import NO_ID, BlocksCacheKey, is_valid_id

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from llm_datadist.core.generations import Generations
    from llm_datadist.core.geometry import Layout
    from llm_datadist.core.segments import U64
    from llm_datadist.keys import CacheKey
    from llm_datadist.kv_layout import KVLayout
    from llm_datadist.types import Placement


class KeyName(NamedTuple):
    """What a key is filed under. The cluster id of a key only picks the link, so it is no part."""

    id: int  #: a request id, or a prefix id when `is_prefix`; 2**64-1 for a blocks cache
    model_id: int
    is_prefix: bool = False

    @classmethod
    def of(cls, key: CacheKey | BlocksCacheKey) -> KeyName | None:
        """Of a key of the interface; None for a placeholder. Spec 6.2."""
        if isinstance(key, BlocksCacheKey):
            return cls(NO_ID, key.model_id)
        if is_valid_id(key.prefix_id):
            return cls(key.prefix_id, key.model_id, is_prefix=True)
        return cls(key.req_id, key.model_id) if is_valid_id(key.req_id) else None

    def __str__(self) -> str:
        """As a program says it, but for the cluster."""
        if self.id == NO_ID:
            return f"BlocksCacheKey(model_id={self.model_id})"
        kind = "prefix_id" if self.is_prefix else "req_id"
        return f"CacheKey({kind}={self.id}, model_id={self.model_id})"


@dataclass(slots=True, eq=False)
class Entry:
    """One cache of this process, registered or allocated."""

    cache_id: int
    layout: Layout
    placement: Placement
    is_remote_accessible: bool
    word_addr: int
    generation: int
    #: what its blocks hold, where the program says it
    kv_layout: KVLayout | None = None
    #: how many peers are to pull of it, and how many have; of no meaning where none is expected
    num_readers: int = 0
    num_read: int = 0
    #: what keeps registered memory, one per tensor, None where the program does; empty is all None
    held: Sequence[object | None] = ()
    #: what kind of memory it lies in, see memory/device.py
    space: str = "host"
    #: the memory is the library's: keys and the id hold references to it
    is_owned: bool = False
    #: the user has not deallocated it
    has_id_reference: bool = True
    #: by the clock of whoever allocated it
    allocated_at: float = 0.0
    #: key -> batch row; a blocks cache has its key at row 0. They come with the cache, and then go
    keys: dict[KeyName, int] = field(default_factory=dict)
    #: batch row -> its key: a row has one at most
    rows: dict[int, KeyName] = field(default_factory=dict)
    #: so many keys, as peers are told of them: those that are left, if they are as many
    packed_keys: tuple[int, bytes] = (0, b"")
    #: tensors that layered pulls by a key have still to take before the key is used up
    remaining: dict[KeyName, set[int]] = field(default_factory=dict)

    def bind(self, key: KeyName, row: int) -> None:
        """The key leads to that row, which has none, from here on."""
        self.keys[key], self.rows[row] = row, key

    def unbind(self, key: KeyName) -> None:
        """The end of `bind`."""
        self.rows.pop(self.keys.pop(key), None)

    def key_at(self, row: int) -> KeyName | None:
        """The key that a pull of this row uses up; a prefix key is none."""
        key = self.rows.get(row)
        return None if key is None or key.is_prefix else key


class Registry:
    """Finds caches. Not thread-safe: the catalog's lock guards it.

    Ids count up from `first_id` and are never used again; whatever made an id or a
    key mean something else gives the caches concerned another generation.
    """

    def __init__(
        self, generations: Generations, first_id: int = 1, *, peers_keep_tables: bool = True
    ) -> None:
        self._generations = generations
        #: peers that ask each time need no new generation when only a key goes
        self._peers_keep_tables = peers_keep_tables
        self._entries: dict[int, Entry] = {}
        self._by_key: dict[KeyName, Entry] = {}
        #: of the caches that peers may reach
        self._addresses = Addresses()
        #: those that keys hold, by id and so by age
        self._held: dict[int, Entry] = {}
        self._last_id = first_id - 1

    def __len__(self) -> int:
        return len(self._entries)

    def entries(self) -> Iterable[Entry]:
        return self._entries.values()

    @property
    def num_keys(self) -> int:
        return len(self._by_key)

    def oldest_held(self) -> Entry | None:
        """The oldest allocated cache that a key still holds; a blocks cache's key holds nothing."""
        return next(iter(self._held.values()), None)

    def get(self, cache_id: int) -> Entry | None:
        """As `find`; None for an id that is none."""
        return self._entries.get(cache_id)

    def register(
        self,
        layout: Layout,
        placement: Placement,
        keys: Sequence[KeyName | None],
        *,
        is_remote_accessible: bool,
        held: Sequence[object | None] = (),
        kv_layout: KVLayout | None = None,
        num_readers: int = 0,
        cache_id: int | None = None,
    ) -> Entry:
        """Files a cache, under the next id unless one is given.

        `keys[i]` names batch row i or a whole blocks cache; None names none. A blocks key moves
        to the newest cache; a bound key of a continuous cache stays where it is. `held` is kept as
        long as the entry is. Raises LLMException(LLM_PARAM_INVALID) for what peers could not be
        told.
        """
        _check_can_be_told(keys, kv_layout)
        entry = self._add(layout, placement, cache_id, is_remote_accessible=is_remote_accessible)
        entry.held, entry.kv_layout, entry.num_readers = held, kv_layout, num_readers
        for row, key in enumerate(keys):
            if key is not None:
                self._bind(entry, key, row)
        return entry

    def allocate(
        self,
        layout: Layout,
        placement: Placement,
        keys: Sequence[KeyName | None],
        kv_layout: KVLayout | None = None,
        cache_id: int | None = None,
    ) -> Entry:
        """Files a cache in the library's memory; the id and each key hold a reference. Spec 6.2.

        `cache_id` as in `register`. Of a key given twice the last counts (D2). Raises
        LLMException(LLM_PARAM_INVALID) for more keys than rows, for a key that is bound already,
        and for what peers could not be told.
        """
        _check_can_be_told(keys, kv_layout)
        rows = {key: row for row, key in enumerate(keys) if key is not None}
        if len(keys) > layout.geometry.num_rows:
            raise invalid(f"{len(keys)} keys for {layout.geometry.num_rows} rows")
        for key in rows:
            if key in self._by_key:
                raise invalid(
                    f"{key} names cache {self._by_key[key].cache_id} already; remove that key first"
                )
        entry = self._add(layout, placement, cache_id, is_remote_accessible=True)
        entry.is_owned, entry.kv_layout = True, kv_layout
        for key, row in rows.items():
            self._bind(entry, key, row)
        if rows and layout.geometry.has_batch_rows:
            self._held[entry.cache_id] = entry
        return entry

    def deallocate(self, cache_id: int) -> Entry | None:
        """Drops the id's reference; the entry if it is free now. Spec 6.5.

        A blocks cache goes at once with its key. Nothing happens to a registered cache.
        """
        entry = self._entries.get(cache_id)
        if entry is None or not entry.is_owned:
            return None
        entry.has_id_reference = False
        if entry.layout.geometry.has_batch_rows and entry.keys:
            return None
        return self.unregister(cache_id)

    def remove_key(self, key: KeyName) -> Entry | None:
        """Unbinds a key of an allocated cache; the entry if it is free now. Spec 6.6."""
        entry = self._by_key.get(key)
        if entry is None or not entry.is_owned:
            return None
        return self._unbind(entry, key)

    def use_up(self, cache_id: int, row: int, tensors: range | None) -> Entry | None:
        """A peer has pulled these tensors of a row (None: all); the entry if it is free now.

        The row's key goes once all tensors have been taken, in however many pieces. Prefix keys
        and keys of registered caches stay. Spec 6.7.
        """
        entry = self._entries.get(cache_id)
        if entry is not None and entry.num_readers:
            entry.num_read += 1
            return None
        key = entry.key_at(row) if entry is not None and entry.is_owned else None
        if entry is None or key is None or not entry.layout.geometry.has_batch_rows:
            return None
        if tensors is not None:
            num_tensors = entry.layout.geometry.num_tensors
            left = entry.remaining.setdefault(key, set(range(num_tensors)))
            left.difference_update(range(tensors.start, min(tensors.stop, num_tensors)))
            if left:
                return None
        return self._unbind(entry, key)

    def unregister(self, cache_id: int) -> Entry | None:
        """Forgets a cache and its keys; what peers know of it is stale from here on."""
        entry = self._entries.pop(cache_id, None)
        if entry is not None:
            self._held.pop(cache_id, None)
            self._generations.close(entry.word_addr)
            entry.generation = 0
            for key in list(entry.keys):
                self._by_key.pop(key, None)
            self._addresses.remove(cache_id)
        return entry

    def find(self, cache_id: int) -> Entry:
        """Raises LLMException(LLM_KV_CACHE_NOT_EXIST)."""
        entry = self._entries.get(cache_id)
        if entry is None:
            raise _missing(
                f"there is no cache {cache_id} here: it was unregistered or freed, or never was"
            )
        return entry

    def find_key(self, key: KeyName) -> tuple[Entry, int]:
        """The cache and the row that a key names. Raises LLMException(LLM_KV_CACHE_NOT_EXIST)."""
        entry = self._by_key.get(key)
        if entry is None:
            kind = "prefix_id" if key.is_prefix else "req_id"
            raise _missing(f"no cache has the key {kind}={key.id}, model_id={key.model_id}")
        return entry, entry.keys[key]

    def find_at(self, addrs: U64, nbytes: U64) -> Entry | None:
        """The cache that peers may reach at these addresses; the oldest of several over the same.

        Takes no longer when there are more caches, unless they lie on each other there.
        """
        cache_id = self._addresses.find(addrs, nbytes)
        return None if cache_id is None else self._entries.get(cache_id)

    def bound(self, keys: Iterable[KeyName | None]) -> list[tuple[KeyName, Entry]]:
        """Those of the keys that name caches, with these."""
        found = [(key, self._by_key.get(key)) for key in keys if key is not None]
        return [(key, entry) for key, entry in found if entry is not None]

    def _add(
        self,
        layout: Layout,
        placement: Placement,
        cache_id: int | None,
        *,
        is_remote_accessible: bool,
    ) -> Entry:
        self._last_id = self._last_id + 1 if cache_id is None else cache_id
        word_addr, generation = self._generations.open()
        entry = Entry(self._last_id, layout, placement, is_remote_accessible, word_addr, generation)
        self._entries[entry.cache_id] = entry
        if is_remote_accessible:
            self._addresses.add(entry.cache_id, layout)
        return entry

    def _unbind(self, entry: Entry, key: KeyName) -> Entry | None:
        del self._by_key[key]
        entry.unbind(key)
        entry.remaining.pop(key, None)
        if not entry.keys:
            self._held.pop(entry.cache_id, None)
        if not entry.has_id_reference and not entry.keys:
            return self.unregister(entry.cache_id)
        if self._peers_keep_tables:
            entry.generation = self._generations.renew(entry.word_addr)
        return None

    def _bind(self, entry: Entry, key: KeyName, row: int) -> None:
        holder = self._by_key.get(key)
        if holder is not None:
            if entry.layout.geometry.has_batch_rows:
                return
            holder.unbind(key)
            holder.generation = self._generations.renew(holder.word_addr)
        self._by_key[key] = entry
        entry.bind(key, row)


def _missing(message: str) -> LLMException:
    return LLMException(message, status_code=LLMStatusCode.LLM_KV_CACHE_NOT_EXIST)


def _check_can_be_told(keys: Sequence[object], layout: KVLayout | None) -> None:
    """Raises LLMException(LLM_PARAM_INVALID): a peer could decode no table that has the cache."""
    if len(keys) > MAX_KEYS:
        raise invalid(f"a cache can have {MAX_KEYS} keys, got {len(keys)}")
    if layout is not None:
        try:
            pack_layers(layout.layers)
        except ValueError as error:
            raise invalid(f"peers cannot be told which layers the layout has: {error}") from error
