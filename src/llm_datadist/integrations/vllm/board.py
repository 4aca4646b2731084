"""Leases as words in memory that the other end reads and writes with plain pulls and pushes.

A producer's board has three words for each slot. It writes the first: which request's blocks are
still where they were. A reader that finds it unchanged *after* its data has read nothing else, as
with a seqlock, and no clocks of two machines are compared. Readers write the others: that they
still wait, and that they are done.
"""

from __future__ import annotations

import itertools
import queue
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from llm_datadist import BlocksCacheKey, CacheDesc, DataType

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from llm_datadist.cache_manager import CacheManager
    from llm_datadist.integrations.vllm.handover import Lease

_GRANT, _BEAT, _RELEASE, _WORDS_PER_SLOT = range(4)
_BEAT_BITS = 16
#: words of our own, for what is read from others' boards, and what is written there
_WORDS_PER_PAGE = 32
#: how many threads may do so at once, also while peers that hang keep some
_NUM_PAGES = 1024


class Board:
    """The words of one worker, as a blocks cache of 8-byte blocks. Thread-safe."""

    def __init__(
        self, manager: CacheManager, cluster_id: int, model_id: int, num_slots: int
    ) -> None:
        first_free = _WORDS_PER_SLOT * num_slots
        num_words = first_free + _NUM_PAGES * _WORDS_PER_PAGE
        self._words = np.zeros(num_words, np.uint64)
        self._manager, self._model_id = manager, model_id
        self._cache = manager.register_blocks_cache(
            CacheDesc(1, [num_words, 1], DataType.DT_UINT64),
            [self._words.ctypes.data],
            BlocksCacheKey(cluster_id, model_id),
        )
        self._pages: queue.SimpleQueue[int] = queue.SimpleQueue()
        for page in range(first_free, num_words, _WORDS_PER_PAGE):
            self._pages.put(page)
        self._beats = itertools.cycle(range(1, 1 << _BEAT_BITS))

    # -- the producer's own ----------------------------------------------------------------------

    def grant(self, lease: Lease) -> None:
        """The lease holds from now on."""
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

    def holds(self, cluster_id: int, lease: Lease) -> bool:
        """Whether the lease stands there now. Raises LLMException as `pull_blocks` does."""
        with self._page() as page:
            self._manager.pull_blocks(
                BlocksCacheKey(cluster_id, self._model_id),
                self._cache,
                [_word_of(lease, _GRANT)],
                [page],
                tensor_num_per_layer=1,
            )
            return int(self._words[page]) == lease.generation

    def renew(self, cluster_id: int, leases: Sequence[Lease]) -> None:
        """Says that these are waited for. Raises LLMException as `push_blocks` does."""
        beat = next(self._beats)
        values = [(lease.generation << _BEAT_BITS) | beat for lease in leases]
        self._answer(cluster_id, [_word_of(lease, _BEAT) for lease in leases], values)

    def release(self, cluster_id: int, leases: Sequence[Lease]) -> None:
        """Says that these are needed no longer. Raises LLMException as `push_blocks` does."""
        values = [lease.generation for lease in leases]
        self._answer(cluster_id, [_word_of(lease, _RELEASE) for lease in leases], values)

    def _answer(self, cluster_id: int, words: list[int], values: list[int]) -> None:
        with self._page() as page:
            for begin in range(0, len(words), _WORDS_PER_PAGE):
                some = slice(begin, begin + _WORDS_PER_PAGE)
                end = page + len(words[some])
                self._words[page:end] = values[some]
                self._manager.push_blocks(
                    BlocksCacheKey(cluster_id, self._model_id),
                    self._cache,
                    list(range(page, end)),
                    words[some],
                    tensor_num_per_layer=1,
                )

    @contextmanager
    def _page(self) -> Iterator[int]:
        page = self._pages.get()
        try:
            yield page
        finally:
            self._pages.put(page)


def _word_of(lease: Lease, which: int) -> int:
    return _WORDS_PER_SLOT * lease.slot + which
