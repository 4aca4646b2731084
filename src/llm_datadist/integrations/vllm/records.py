"""What a producer says of prompts while it computes them: words, as on its board.

A record is found by the name that both engines were told. Its head says under which lease the
prompt's blocks are and how far it is *sealed*: computed, so that it does not change any more while
the lease stands. The numbers of its blocks follow. The producer writes the name last and takes it
away first; how far it is sealed is one word, written when the blocks that it counts have their
numbers here and their tokens in them.
"""

from __future__ import annotations

import hashlib
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from llm_datadist.integrations.vllm.handover import Lease
from llm_datadist.integrations.vllm.words import Words

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from llm_datadist.cache_manager import CacheManager
    from llm_datadist.integrations.vllm.shapes import RecordsShape
    from llm_datadist.integrations.vllm.step import Announcement

#: of a head: the name, how far, the lease, how many tokens, and their digest
_NAME, _SEALED, _SLOT, _GENERATION, _NUM_TOKENS, _DIGEST = range(6)
_DIGEST_NBYTES = 16
_HEAD = _DIGEST + _DIGEST_NBYTES // 8
_TOKEN_BITS, _LAYER_BITS = 24, 16


class Sealed(NamedTuple):
    """The first `tokens` of a prompt in all layers, and in the first `layers` the first `stop`."""

    tokens: int = 0
    stop: int = 0
    layers: int = 0

    def tokens_of(self, layer: int) -> int:
        """How many are sealed in that layer."""
        return self.stop if layer < self.layers else self.tokens


class Record(NamedTuple):
    """What a head says, and its place."""

    place: int
    lease: Lease
    num_tokens: int
    digest: str
    sealed: Sealed


def words_of(
    manager: CacheManager, cluster_id: int, model_id: int, shape: RecordsShape | None
) -> Words:
    """Room for these records; without, for reading those of others."""
    num_words = _firsts(shape)[-1] * shape.num_records if shape else 1
    return Words(manager, cluster_id, model_id, num_words)


class Records:
    """The producer's own. Not thread-safe: written by the engine's thread."""

    def __init__(self, words: Words, shape: RecordsShape) -> None:
        """In the words that `words_of` makes for this shape."""
        self._own, self._shape = words.own, shape

    def write(self, place: int, announced: Announcement) -> None:
        """Nothing of the prompt is sealed yet."""
        head = self._head(place)
        head[_SEALED] = _packed(Sealed())
        head[_SLOT], head[_GENERATION] = announced.lease.slot, announced.lease.generation
        head[_NUM_TOKENS] = announced.num_tokens
        head[_DIGEST:] = np.frombuffer(bytes.fromhex(announced.digest), np.uint64)
        head[_NAME] = _name_of(announced.transfer_id)

    def write_blocks(self, place: int, group: int, first: int, blocks: Sequence[int]) -> None:
        """The numbers of a group's blocks from the first of these on, as far as there is room."""
        begin = _block_word(self._shape, place, group, first)
        some = blocks[: max(0, self._shape.num_blocks[group] - first)]
        self._own[begin : begin + len(some)] = some

    def write_sealed(self, place: int, sealed: Sealed) -> None:
        """Comes when it is so."""
        self._head(place)[_SEALED] = _packed(sealed)

    def clear(self, place: int) -> None:
        """Comes before the blocks are given to anyone else."""
        self._head(place)[_NAME] = 0

    def _head(self, place: int) -> npt.NDArray[np.uint64]:
        return self._own[_HEAD * place : _HEAD * (place + 1)]


class RemoteRecords:
    """Those of producers. Thread-safe. All raise LLMException as `pull_blocks` does."""

    def __init__(self, words: Words) -> None:
        self._words = words

    def find(self, cluster_id: int, shape: RecordsShape, transfer_id: str) -> Record | None:
        """The record of that name, if there is one now."""
        heads = self._words.read(cluster_id, range(_HEAD * shape.num_records))
        named = np.flatnonzero(heads[_NAME::_HEAD] == _name_of(transfer_id))
        # what is read beside a name may be older than it, and is not when it is read behind it
        return self.look(cluster_id, int(named[0]), transfer_id) if len(named) else None

    def look(self, cluster_id: int, place: int, transfer_id: str) -> Record | None:
        """What is there by now; None if it is another's, or nobody's."""
        head = self._words.read(cluster_id, range(_HEAD * place, _HEAD * (place + 1)))
        if head[_NAME] != _name_of(transfer_id):
            return None
        return Record(
            place,
            Lease(int(head[_SLOT]), int(head[_GENERATION])),
            int(head[_NUM_TOKENS]),
            head[_DIGEST:].tobytes().hex(),
            _unpacked(int(head[_SEALED])),
        )

    def blocks(
        self, cluster_id: int, shape: RecordsShape, place: int, group: int, which: range
    ) -> list[int]:
        """The numbers of a group's blocks. Raises LookupError if they cannot be that many."""
        if len(shape.num_blocks) <= group or shape.num_blocks[group] < which.stop:
            raise LookupError("the prompt has more blocks than the producer has room for")
        first = _block_word(shape, place, group, 0)
        words = range(first + which.start, first + which.stop)
        return [int(word) for word in self._words.read(cluster_id, words)]


def _firsts(shape: RecordsShape) -> list[int]:
    """By group, where a record's numbers of blocks begin; and the words that it has in all."""
    return list(accumulate(shape.num_blocks, initial=_HEAD))


def _block_word(shape: RecordsShape, place: int, group: int, block: int) -> int:
    """All heads come first, so that one transfer has them."""
    *firsts, size = _firsts(shape)
    heads = _HEAD * shape.num_records
    return heads + (size - _HEAD) * place + firsts[group] - _HEAD + block


def _name_of(transfer_id: str) -> int:
    """Never 0."""
    digest = hashlib.blake2b(transfer_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") | 1


def _packed(sealed: Sealed) -> int:
    return (sealed.tokens << _TOKEN_BITS | sealed.stop) << _LAYER_BITS | sealed.layers


def _unpacked(word: int) -> Sealed:
    rest, layers = divmod(word, 1 << _LAYER_BITS)
    return Sealed(*divmod(rest, 1 << _TOKEN_BITS), layers)
