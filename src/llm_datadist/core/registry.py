"""The registry: every cache of this process, by id and by key. Spec 6.1, 6.2."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from llm_datadist.errors import LLMException, LLMStatusCode

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from llm_datadist.core.generations import Generations
    from llm_datadist.core.geometry import Layout
    from llm_datadist.types import Placement


class KeyName(NamedTuple):
    """What a key is filed under. The cluster id of a key only picks the link, so it is no part."""

    id: int  #: a request id, or a prefix id when `is_prefix`; 2**64-1 for a blocks cache
    model_id: int
    is_prefix: bool = False


@dataclass(slots=True, eq=False)
class Entry:
    """One cache that this process registered."""

    cache_id: int
    layout: Layout
    placement: Placement
    is_remote_accessible: bool
    word_addr: int
    generation: int
    #: batch row -> its key; a blocks cache has its keys under row 0
    keys: dict[KeyName, int] = field(default_factory=dict)


class Registry:
    """Finds caches. Not thread-safe: the engine's lock guards it.

    Ids count up from `first_id` and are never used again; whatever made an id or a
    key mean something else gives the caches concerned another generation.
    """

    def __init__(self, generations: Generations, first_id: int = 1) -> None:
        self._generations = generations
        self._entries: dict[int, Entry] = {}
        self._by_key: dict[KeyName, Entry] = {}
        self._last_id = first_id - 1

    def __len__(self) -> int:
        return len(self._entries)

    def entries(self) -> Iterable[Entry]:
        return self._entries.values()

    def register(
        self,
        layout: Layout,
        placement: Placement,
        keys: Sequence[KeyName | None],
        *,
        is_remote_accessible: bool,
    ) -> Entry:
        """Files a cache. `keys[i]` names batch row i or a whole blocks cache; None names none.

        A blocks key moves to the newest cache; a bound key of a continuous cache stays where it is.
        """
        self._last_id += 1
        word_addr, generation = self._generations.open()
        entry = Entry(self._last_id, layout, placement, is_remote_accessible, word_addr, generation)
        self._entries[entry.cache_id] = entry
        for row, key in enumerate(keys):
            if key is not None:
                self._bind(entry, key, row)
        return entry

    def unregister(self, cache_id: int) -> Entry | None:
        """Forgets a cache and its keys; what peers know of it is stale from here on."""
        entry = self._entries.pop(cache_id, None)
        if entry is not None:
            self._generations.close(entry.word_addr)
            entry.generation = 0
            for key in entry.keys:
                del self._by_key[key]
        return entry

    def find(self, cache_id: int) -> Entry:
        """Raises LLMException(LLM_KV_CACHE_NOT_EXIST)."""
        entry = self._entries.get(cache_id)
        if entry is None:
            raise _missing(f"there is no cache {cache_id}")
        return entry

    def find_key(self, key: KeyName) -> tuple[Entry, int]:
        """The cache and the row that a key names. Raises LLMException(LLM_KV_CACHE_NOT_EXIST)."""
        entry = self._by_key.get(key)
        if entry is None:
            kind = "prefix_id" if key.is_prefix else "req_id"
            raise _missing(f"no cache has the key {kind}={key.id}, model_id={key.model_id}")
        return entry, entry.keys[key]

    def _bind(self, entry: Entry, key: KeyName, row: int) -> None:
        holder = self._by_key.get(key)
        if holder is not None:
            if entry.layout.geometry.has_batch_rows:
                return
            del holder.keys[key]
            holder.generation = self._generations.renew(holder.word_addr)
        self._by_key[key] = entry
        entry.keys[key] = row


def _missing(message: str) -> LLMException:
    return LLMException(message, status_code=LLMStatusCode.LLM_KV_CACHE_NOT_EXIST)
