"""Leases as words in memory that the other end reads and writes with plain pulls and pushes.

A producer's board has five words for each slot. It writes the first three: which request's blocks
are still where they were, and the lease's key. A reader that finds them unchanged *after* its data
has read nothing else, as with a seqlock, and no clocks of two machines are compared. Readers write
the others: that they still wait, and that they are done.
"""

from __future__ import annotations

import itertools
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from llm_datadist import BlocksCacheKey, CacheDesc, DataType
from llm_datadist.integrations.vllm.handover import KEY_NBYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from llm_datadist.cache import Cache
    from llm_datadist.cache_manager import CacheManager
    from llm_datadist.integrations.vllm.handover import Lease

_NUM_KEY_WORDS = KEY_NBYTES // 8
_GRANT, _KEY = 0, 1
_BEAT = _KEY + _NUM_KEY_WORDS
_RELEASE, _WORDS_PER_SLOT = _BEAT + 1, _BEAT + 2
_BEAT_BITS = 16
#: so many leases are looked at, or answered, by one transfer
_LEASES_PER_PAGE = 2048
_WORDS_PER_PAGE = _LEASES_PER_PAGE * (1 + _NUM_KEY_WORDS)


class Board:
    """The words of one worker, as a blocks cache of 8-byte blocks. Thread-safe."""

    def __init__(
        self, manager: CacheManager, cluster_id: int, model_id: int, num_slots: int
    ) -> None:
        self._manager, self._model_id = manager, model_id
        self._words = np.zeros(_WORDS_PER_SLOT * num_slots, np.uint64)
        _register(manager, self._words, BlocksCacheKey(cluster_id, model_id))
        self._pages: deque[_Page] = deque()
        self._beats = itertools.cycle(range(1, 1 << _BEAT_BITS))

    # -- the producer's own ----------------------------------------------------------------------

    def grant(self, lease: Lease, key: bytes) -> None:
        """The lease holds from now on, and this is its key."""
        key_at = _word_of(lease, _KEY)
        self._words[key_at : key_at + _NUM_KEY_WORDS] = np.frombuffer(key, np.uint64)
        self._words[_word_of(lease, _GRANT)] = lease.generation

    def end(self, lease: Lease) -> None:
        """The lease holds no longer. Comes before its blocks are given to anyone else."""
        if self._words[_word_of(lease, _GRANT)] == lease.generation:
            self._words[_word_of(lease, _GRANT)] = 0

    def beat_of(self, lease: Lease) -> int:
        """A number that changes as long as its reader waits, 0 before it was heard of."""
        generation, beat = divmod(int(self._words[_word_of(lease, _BEAT)]), 1 << _BEAT_BITS)
        return beat if generation == lease.generation else 0

    def is_released(self, lease: Lease) -> bool:
        """Whether its reader is done."""
        return int(self._words[_word_of(lease, _RELEASE)]) == lease.generation

    # -- a reader's, of another's board ------------------------------------------------------------

    def key_of(self, cluster_id: int, lease: Lease) -> bytes | None:
        """The lease's key if it stands there now. Raises LLMException as `pull_blocks` does."""
        return self.keys_of(cluster_id, [lease])[0]

    def keys_of(self, cluster_id: int, leases: Sequence[Lease]) -> list[bytes | None]:
        """The same of several. One whose slot does not exist is LLM_PARAM_INVALID for them all."""
        keys: list[bytes | None] = []
        with self._page() as page:
            for begin in range(0, len(leases), _LEASES_PER_PAGE):
                keys += self._keys_of(cluster_id, leases[begin : begin + _LEASES_PER_PAGE], page)
        return keys

    def renew(self, cluster_id: int, leases: Sequence[Lease]) -> None:
        """Says that these are waited for. Raises LLMException as `push_blocks` does."""
        beat = next(self._beats)
        values = [(lease.generation << _BEAT_BITS) | beat for lease in leases]
        self._answer(cluster_id, [_word_of(lease, _BEAT) for lease in leases], values)

    def release(self, cluster_id: int, leases: Sequence[Lease]) -> None:
        """Says that these are needed no longer. Raises LLMException as `push_blocks` does."""
        values = [lease.generation for lease in leases]
        self._answer(cluster_id, [_word_of(lease, _RELEASE) for lease in leases], values)

    def _keys_of(self, cluster_id: int, leases: Sequence[Lease], page: _Page) -> list[bytes | None]:
        size, count = 1 + _NUM_KEY_WORDS, len(leases)
        firsts = [_word_of(lease, _GRANT) for lease in leases]
        self._manager.pull_blocks(
            BlocksCacheKey(cluster_id, self._model_id),
            page.cache,
            [word for first in firsts for word in range(first, first + size)],
            list(range(size * count)),
            tensor_num_per_layer=1,
        )
        found = page.words[: size * count].reshape(count, size)
        return [
            words[_KEY:].tobytes() if words[_GRANT] == lease.generation else None
            for lease, words in zip(leases, found, strict=True)
        ]

    def _answer(self, cluster_id: int, words: list[int], values: list[int]) -> None:
        with self._page() as page:
            for begin in range(0, len(words), _WORDS_PER_PAGE):
                some = slice(begin, begin + _WORDS_PER_PAGE)
                count = len(words[some])
                page.words[:count] = values[some]
                self._manager.push_blocks(
                    BlocksCacheKey(cluster_id, self._model_id),
                    page.cache,
                    list(range(count)),
                    words[some],
                    tensor_num_per_layer=1,
                )

    @contextmanager
    def _page(self) -> Iterator[_Page]:
        """One that no other thread has: nobody waits here for a peer that hangs."""
        try:
            page = self._pages.pop()
        except IndexError:
            page = _Page(self._manager)
        try:
            yield page
        finally:
            self._pages.append(page)


class _Page:
    """Words of our own, for what is read from another's board, and what is written there.

    In a cache of their own: no lease that is made up leads to them.
    """

    def __init__(self, manager: CacheManager) -> None:
        self.words = np.zeros(_WORDS_PER_PAGE, np.uint64)
        self.cache = _register(manager, self.words)


def _register(
    manager: CacheManager, words: npt.NDArray[np.uint64], key: BlocksCacheKey | None = None
) -> Cache:
    desc = CacheDesc(1, [len(words), 1], DataType.DT_UINT64)
    return manager.register_blocks_cache(desc, [words.ctypes.data], key)


def _word_of(lease: Lease, which: int) -> int:
    return _WORDS_PER_SLOT * lease.slot + which
