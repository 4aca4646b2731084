"""The keys of a peer's caches, as columns: a peer says how many there are.

An object for each would keep the interpreter, and its garbage collector, from everything else for
seconds. Of a table's keys few are ever asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from llm_datadist.core.messages import KEY_NBYTES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llm_datadist.core.registry import KeyName
    from llm_datadist.core.segments import U64

#: id, model id, whether it is a prefix, row
_COLUMNS: Final = KEY_NBYTES // 8


class RemoteKeys:
    """The keys of several caches. Never changed."""

    def __init__(self, packed: Sequence[bytes]) -> None:
        """Each cache's as `pack_keys` makes them."""
        none = np.empty((_COLUMNS, 0), dtype=np.uint64)
        self._columns = np.concatenate([none, *map(_columns_of, packed)], axis=1)
        #: where the keys of each cache end
        self._ends = np.cumsum([len(each) // KEY_NBYTES for each in packed])

    def find(self, key: KeyName) -> tuple[int, int] | None:
        """Which of the caches has the key, and at which row; of several the last."""
        ids, model_ids, prefixes, rows = self._columns
        places = np.flatnonzero(
            (ids == np.uint64(key.id))
            & (model_ids == np.uint64(key.model_id))
            & (prefixes == np.uint64(key.is_prefix))
        )
        if not len(places):
            return None
        return int(np.searchsorted(self._ends, places[-1], side="right")), int(rows[places[-1]])


def has_request_at(packed: bytes, row: int) -> bool:
    """Whether a key of a cache leads to the row, and is no prefix."""
    _, _, prefixes, rows = _columns_of(packed)
    return bool(((rows == row) & (prefixes == 0)).any())


def pack_keys(keys: Mapping[KeyName, int]) -> bytes:
    """What peers are told of keys and the rows to which they lead."""
    told = [
        (key.id, key.model_id, key.is_prefix, row)
        for key, row in list(keys.items())
        if 0 <= key.model_id < 2**64  # a BlocksCacheKey may have any; no peer can ask for it
    ]
    return np.array(told, dtype="<u8").reshape(-1, _COLUMNS).T.tobytes()


def _columns_of(packed: bytes) -> U64:
    flat = np.frombuffer(packed, dtype="<u8").astype(np.uint64, copy=False)
    return flat.reshape(_COLUMNS, -1)
