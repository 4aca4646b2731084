"""Leases as words in memory that the other end reads and writes with plain pulls and pushes.

A producer's board has five words for each slot. It writes the first three: which request's blocks
are still where they were, and the lease's key. A reader that finds them unchanged *after* its data
has read nothing else, as with a seqlock, and no clocks of two machines are compared. Readers write
the others: that they still wait, and that they are done.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from llm_datadist.integrations.vllm.handover import KEY_NBYTES
from llm_datadist.integrations.vllm.words import Words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_datadist.cache_manager import CacheManager
    from llm_datadist.integrations.vllm.handover import Lease

_NUM_KEY_WORDS = KEY_NBYTES // 8
_GRANT, _KEY = 0, 1
_BEAT = _KEY + _NUM_KEY_WORDS
_RELEASE, _WORDS_PER_SLOT = _BEAT + 1, _BEAT + 2
_BEAT_BITS = 16


class Board:
    """The words of one worker, and the way to those of others. Thread-safe."""

    def __init__(
        self, manager: CacheManager, cluster_id: int, model_id: int, num_slots: int
    ) -> None:
        self._words = Words(manager, cluster_id, model_id, _WORDS_PER_SLOT * num_slots)
        self._own = self._words.own
        self._beats = itertools.cycle(range(1, 1 << _BEAT_BITS))

    # -- the producer's own ----------------------------------------------------------------------

    def grant(self, lease: Lease, key: bytes) -> None:
        """The lease holds from now on, and this is its key."""
        key_at = _word_of(lease, _KEY)
        self._own[key_at : key_at + _NUM_KEY_WORDS] = np.frombuffer(key, np.uint64)
        self._own[_word_of(lease, _GRANT)] = lease.generation

    def end(self, lease: Lease) -> None:
        """The lease holds no longer. Comes before its blocks are given to anyone else."""
        if self._own[_word_of(lease, _GRANT)] == lease.generation:
            self._own[_word_of(lease, _GRANT)] = 0

    def beat_of(self, lease: Lease) -> int:
        """A number that changes as long as its reader waits, 0 before it was heard of."""
        generation, beat = divmod(int(self._own[_word_of(lease, _BEAT)]), 1 << _BEAT_BITS)
        return beat if generation == lease.generation else 0

    def is_released(self, lease: Lease) -> bool:
        """Whether its reader is done."""
        return int(self._own[_word_of(lease, _RELEASE)]) == lease.generation

    # -- a reader's, of another's board ------------------------------------------------------------

    def key_of(self, cluster_id: int, lease: Lease) -> bytes | None:
        """The lease's key if it stands there now. Raises LLMException as `pull_blocks` does."""
        return self.keys_of(cluster_id, [lease])[0]

    def keys_of(self, cluster_id: int, leases: Sequence[Lease]) -> list[bytes | None]:
        """The same of several. One whose slot does not exist is LLM_PARAM_INVALID for them all."""
        size = 1 + _NUM_KEY_WORDS
        firsts = [_word_of(lease, _GRANT) for lease in leases]
        found = self._words.read(
            cluster_id, [word for first in firsts for word in range(first, first + size)]
        )
        return [
            words[_KEY:].tobytes() if words[_GRANT] == lease.generation else None
            for lease, words in zip(leases, found.reshape(len(leases), size), strict=True)
        ]

    def renew(self, cluster_id: int, leases: Sequence[Lease]) -> None:
        """Says that these are waited for. Raises LLMException as `push_blocks` does."""
        beat = next(self._beats)
        values = [(lease.generation << _BEAT_BITS) | beat for lease in leases]
        self._words.write(cluster_id, [_word_of(lease, _BEAT) for lease in leases], values)

    def release(self, cluster_id: int, leases: Sequence[Lease]) -> None:
        """Says that these are needed no longer. Raises LLMException as `push_blocks` does."""
        values = [lease.generation for lease in leases]
        self._words.write(cluster_id, [_word_of(lease, _RELEASE) for lease in leases], values)


def _word_of(lease: Lease, which: int) -> int:
    return _WORDS_PER_SLOT * lease.slot + which
