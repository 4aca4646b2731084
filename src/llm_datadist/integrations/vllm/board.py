"""Leases as words in memory that the other end reads and writes with plain pulls and pushes.

A producer's board has two words for each slot. It writes the first: which request's blocks are
still where they were. A reader that finds it unchanged *after* its data has read nothing else, as
with a seqlock, and no clock of two machines is compared. Readers write the second: that they are
still waiting, or are done.
"""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING

import numpy as np

from llm_datadist import BlocksCacheKey, CacheDesc, DataType

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_datadist.cache_manager import CacheManager
    from llm_datadist.integrations.vllm.handover import Lease

_BEAT_BITS = 16
#: the last beat: there is nothing more to read
_RELEASED = (1 << _BEAT_BITS) - 1
_NUM_READ_WORDS = 16
_NUM_ANSWER_WORDS = 64


class Board:
    """The words of one worker, as a blocks cache of 8-byte blocks. Thread-safe."""

    def __init__(
        self, manager: CacheManager, cluster_id: int, model_id: int, num_slots: int
    ) -> None:
        num_words = 2 * num_slots + _NUM_READ_WORDS + _NUM_ANSWER_WORDS
        self._words = np.zeros(num_words, np.uint64)
        self._manager, self._model_id = manager, model_id
        self._cache = manager.register_blocks_cache(
            CacheDesc(1, [num_words, 1], DataType.DT_UINT64),
            [self._words.ctypes.data],
            BlocksCacheKey(cluster_id, model_id),
        )
        self._read_words: queue.SimpleQueue[int] = queue.SimpleQueue()
        for word in range(2 * num_slots, 2 * num_slots + _NUM_READ_WORDS):
            self._read_words.put(word)
        self._answer_words = range(num_words - _NUM_ANSWER_WORDS, num_words)
        self._answering = threading.Lock()
        self._beat = 0

    # -- the producer's own ----------------------------------------------------------------------

    def grant(self, lease: Lease) -> None:
        """The lease holds from now on."""
        self._words[2 * lease.slot] = lease.generation

    def end(self, lease: Lease) -> None:
        """The lease holds no longer. Comes before its blocks are given to anyone else."""
        if self._words[2 * lease.slot] == lease.generation:
            self._words[2 * lease.slot] = 0

    def answer_to(self, lease: Lease) -> int:
        """What its reader has last said: a number that changes with each beat, 0 for nothing."""
        generation, beat = divmod(int(self._words[2 * lease.slot + 1]), 1 << _BEAT_BITS)
        return beat if generation == lease.generation else 0

    def is_released(self, lease: Lease) -> bool:
        """Whether its reader is done."""
        return self.answer_to(lease) == _RELEASED

    # -- a reader's, of another's board ------------------------------------------------------------

    def holds(self, cluster_id: int, lease: Lease) -> bool:
        """Whether the lease stands there now. Raises LLMException as `pull_blocks` does."""
        word = self._read_words.get()
        try:
            self._manager.pull_blocks(
                BlocksCacheKey(cluster_id, self._model_id),
                self._cache,
                [2 * lease.slot],
                [word],
                tensor_num_per_layer=1,
            )
            return int(self._words[word]) == lease.generation
        finally:
            self._read_words.put(word)

    def renew(self, cluster_id: int, leases: Sequence[Lease]) -> None:
        """Says that these are waited for. Raises LLMException as `push_blocks` does."""
        with self._answering:
            self._beat = self._beat % (_RELEASED - 1) + 1
            self._answer(cluster_id, leases, self._beat)

    def release(self, cluster_id: int, leases: Sequence[Lease]) -> None:
        """Says that these are read. Raises LLMException as `push_blocks` does."""
        with self._answering:
            self._answer(cluster_id, leases, _RELEASED)

    def _answer(self, cluster_id: int, leases: Sequence[Lease], beat: int) -> None:
        for begin in range(0, len(leases), _NUM_ANSWER_WORDS):
            some = leases[begin : begin + _NUM_ANSWER_WORDS]
            words = self._answer_words[: len(some)]
            for word, lease in zip(words, some, strict=True):
                self._words[word] = (lease.generation << _BEAT_BITS) | beat
            self._manager.push_blocks(
                BlocksCacheKey(cluster_id, self._model_id),
                self._cache,
                list(words),
                [2 * lease.slot + 1 for lease in some],
                tensor_num_per_layer=1,
            )
