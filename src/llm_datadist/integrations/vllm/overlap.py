"""Reading a prompt while its producer computes it.

A thread for each such load looks at the prompt's record and reads what is sealed since it looked
last, of each layer. Between looks it sleeps for a part of the time for which there was nothing new:
no message could wake it, for one end only reads the other's memory.
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import TYPE_CHECKING, Final

from llm_datadist.integrations.vllm.memory import Part

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llm_datadist.integrations.vllm.handover import Handover, Named
    from llm_datadist.integrations.vllm.leases import Leases
    from llm_datadist.integrations.vllm.memory import Memory, Peer
    from llm_datadist.integrations.vllm.producers import Producers
    from llm_datadist.integrations.vllm.records import Record, RemoteRecords
    from llm_datadist.integrations.vllm.shapes import RecordsShape
    from llm_datadist.integrations.vllm.step import Pull

#: of the time without news, how long is slept; at least and at most
_SLEPT_PART: Final = 1 / 8
_SHORTEST_S, _LONGEST_S = 0.001, 0.02


class Overlap:
    """Loads of prompts that were announced. Thread-safe."""

    def __init__(
        self,
        memory: Memory,
        records: RemoteRecords,
        leases: Leases,
        producers: Producers,
        patience_s: float,
    ) -> None:
        """`patience_s`: how long is waited without news."""
        self._memory, self._records, self._leases = memory, records, leases
        self._producers, self._patience_s = producers, patience_s
        #: requests that are to be read
        self._wanted: set[str] = set()
        #: what was found of those that were announced, until it is let go
        self._found: dict[tuple[object, ...], Handover] = {}

    def begin(self, request_id: str) -> None:
        """It will be read."""
        self._wanted.add(request_id)

    def end(self, request_id: str) -> None:
        """It will not, or no further: a `read` of it raises LookupError."""
        self._wanted.discard(request_id)

    def find(self, peers: Sequence[Peer], pull: Pull, source: Named) -> list[Record]:
        """Waits until the producer's workers have begun; their records. The lease is renewed then.

        Raises LookupError if they do not hand over like this, have read other tokens, or have ended
        what was found before; TimeoutError; ConnectionError when we are closed; LLMException as
        `pull_blocks`.
        """
        waiting = _Waiting(self, pull.request_id)
        records = [self._find(peer, source, waiting) for peer in peers]
        if len({record.lease for record in records}) > 1:
            raise _withdrawn()
        found = self._found[source.key] = source.found(records[0].lease)
        for origin in self._producers.workers(found):
            self._leases.expect(origin, is_read_now=True)
        return records

    def read(
        self, peers: Sequence[Peer], pull: Pull, source: Named, records: Sequence[Record]
    ) -> int:
        """Reads all of it, as it is sealed; how many bytes. Raises as `find`, and `Memory.read`.

        What was read is right if the lease stands behind it.
        """
        waiting = _Waiting(self, pull.request_id)
        layers = self._memory.shape.layers
        read = dict.fromkeys(layers, pull.num_computed_tokens)
        theirs: list[list[int]] = [[] for _ in peers[0].shape.groups]
        nbytes = 0
        while min(read.values()) < source.remote_num_tokens:
            looks = [
                self._look(peer, record, source)
                for peer, record in zip(peers, records, strict=True)
            ]
            pieces = _pieces(read, _sealed(peers, looks, source.remote_num_tokens))
            for (start, stop), some in pieces.items():
                self._add_blocks(peers[0], records[0], theirs, stop)
                part = Part(_first_blocks(peers[0], theirs, stop), pull.dst_blocks, stop, start)
                nbytes += self._memory.read(peers, part, None if len(some) == len(read) else some)
                read.update(dict.fromkeys(some, stop))
            waiting.has_looked(is_news=bool(pieces))
        return nbytes

    def take_found(self, source: Named) -> Handover | None:
        """What was found of it; it is needed no longer."""
        return self._found.pop(source.key, None)

    def pause(self, request_id: str, silent_s: float) -> None:
        """Sleeps for a part of the time for which nothing was new.

        Raises LookupError if the request has been given up, TimeoutError, ConnectionError.
        """
        if request_id not in self._wanted:
            raise LookupError("the request was given up")
        if silent_s > self._patience_s:
            raise TimeoutError("nothing more of its prompt was computed there in time")
        self._producers.pause(min(max(silent_s * _SLEPT_PART, _SHORTEST_S), _LONGEST_S))

    def _find(self, peer: Peer, source: Named, waiting: _Waiting) -> Record:
        shape = _records_of(peer)
        while (record := self._records.find(peer.cluster_id, shape, source.transfer_id)) is None:
            if source.key in self._found:  # and the link was lost meanwhile
                raise _withdrawn()
            waiting.has_looked(is_news=False)
        if (record.num_tokens, record.digest) != (source.remote_num_tokens, source.remote_digest):
            raise LookupError("its prompt was read as other tokens there")
        return record

    def _look(self, peer: Peer, record: Record, source: Named) -> Record:
        look = self._records.look(peer.cluster_id, record.place, source.transfer_id)
        if look is None or look.lease != record.lease:
            raise _withdrawn()
        return look

    def _add_blocks(
        self, peer: Peer, record: Record, theirs: list[list[int]], num_tokens: int
    ) -> None:
        """Those that are not known yet. All workers have the same."""
        for group, blocks in enumerate(theirs):
            missing = range(len(blocks), _num_blocks(peer, group, num_tokens))
            if missing:
                blocks += self._records.blocks(
                    peer.cluster_id, _records_of(peer), record.place, group, missing
                )


class _Waiting:
    """How long there was nothing new."""

    def __init__(self, overlap: Overlap, request_id: str) -> None:
        self._overlap, self._request_id = overlap, request_id
        self._news_at = time.monotonic()

    def has_looked(self, *, is_news: bool) -> None:
        """Sleeps if it was in vain. Raises as `Overlap.pause`."""
        now = time.monotonic()
        if is_news:
            self._news_at = now
        else:
            self._overlap.pause(self._request_id, now - self._news_at)


def _sealed(peers: Sequence[Peer], looks: Sequence[Record], num_tokens: int) -> dict[str, int]:
    """How many of a prompt's tokens, by layer, at all workers that have the layer."""
    sealed: dict[str, int] = defaultdict(lambda: num_tokens)
    for peer, look in zip(peers, looks, strict=True):
        for number, layer in enumerate(peer.shape.layers):
            sealed[layer] = min(sealed[layer], look.sealed.tokens_of(number))
    return sealed


def _pieces(
    read: Mapping[str, int], sealed: Mapping[str, int]
) -> Mapping[tuple[int, int], list[str]]:
    """What is sealed and not read: of which tokens, which layers."""
    pieces: dict[tuple[int, int], list[str]] = defaultdict(list)
    for layer, start in read.items():
        if sealed[layer] > start:
            pieces[start, sealed[layer]].append(layer)
    return pieces


def _first_blocks(
    peer: Peer, theirs: Sequence[Sequence[int]], num_tokens: int
) -> list[Sequence[int]]:
    return [blocks[: _num_blocks(peer, g, num_tokens)] for g, blocks in enumerate(theirs)]


def _num_blocks(peer: Peer, group: int, num_tokens: int) -> int:
    return -(-num_tokens // peer.shape.groups[group].block_tokens)


def _records_of(peer: Peer) -> RecordsShape:
    if peer.shape.records is None:
        raise LookupError("it hands over only what it has computed: its overlap is off")
    return peer.shape.records


def _withdrawn() -> LookupError:
    return LookupError("the producer has given up the prompt")
