"""The narrow door: what a transport is to the cluster, and how a path is verified.

A transport knows addresses, lengths and its peer's offer. It knows nothing of caches, keys, roles
or sessions; a Guard is passed through to whoever can check it.
"""

from __future__ import annotations

import mmap
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from llm_datadist.core.remote import Guard
from llm_datadist.core.segments import Segments
from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.memory.device import HOST
from llm_datadist.running.deadline import Deadline

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from llm_datadist.core.combs import Pieces
    from llm_datadist.core.messages import ProbeTarget
    from llm_datadist.transport.same_host import Process
    from llm_datadist.transport.stream import Stream

NONCE_NBYTES = 16
#: as much as fills the largest frames several times: what is verified is a way for data
PROBE_NBYTES = 64 * 1024
#: the share of the hand-shake's time for that; the rest is for finding out why not
_PROBE_SHARE = 0.8


class PathUnavailable(Exception):
    """This transport cannot reach this peer; `is_remarkable` when somebody should mend that."""

    def __init__(self, reason: str, *, is_remarkable: bool = True) -> None:
        super().__init__(reason)
        self.reason = reason
        self.is_remarkable = is_remarkable


class StaleCache(LLMException):
    """The guard did not hold: the owner freed or renewed the cache. What was read is worthless."""

    def __init__(self, guard: Guard) -> None:
        super().__init__(
            f"the peer's cache {guard.cache_id} was freed or changed during the transfer: it must "
            "keep it until the transfer has ended",
            LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
        )


@dataclass(frozen=True, eq=False)
class Region:
    """Memory of one cache of this process, or of the library itself: pieces of equal length."""

    addrs: tuple[int, ...]
    nbytes: int
    #: peers may read it; else it is only read into
    is_remote_accessible: bool
    #: what kind of memory it is, see memory/device.py
    space: str = HOST


class Streams(Protocol):
    """Request streams to one peer: connections on which this end asks and the other answers."""

    #: the peer, where the kernel says which process that is: both ends are on one host
    process: Process | None

    def borrow(self, deadline: Deadline) -> AbstractContextManager[Stream]:
        """A stream for one exchange. One that an exchange fails on is closed, not given back."""
        ...


class Channel(Protocol):
    """A verified way to one peer's memory. Thread-safe."""

    def read(self, pieces: Pieces, guard: Guard, deadline: Deadline) -> None:
        """Copies the peer's `pieces.src_iovecs()` to our `dst_iovecs()`.

        Ours lies in exposed regions. Returns only when every byte was copied while the guard held.
        Raises StaleCache, or LLMException with LLM_TIMEOUT, LLM_PARAM_INVALID (memory that is not
        mapped or not registered) or LLM_NOT_YET_LINK (the peer is gone); the destination
        may then hold anything, all else is untouched, and nothing arrives later.
        """
        ...

    def close(self) -> None: ...


class Transport(Protocol):
    """One way of moving bytes, for all peers of a cluster. Thread-safe."""

    name: str
    #: the owner takes part in each read: it refuses one when the guard's claim does not hold, and a
    #: read waits for it. Without it a read is a few system calls.
    asks_owner: bool
    #: opening a channel and verifying it may wait for the peer
    may_wait: bool
    #: the spaces whose memory it moves: it is told of no other
    reaches: frozenset[str]

    def offer(self) -> bytes | None:
        """What a peer needs to know to reach us; None when this machine cannot do it at all."""
        ...

    def open(self, offer: bytes, streams: Streams) -> Channel:
        """A channel to the peer that made the offer. Raises PathUnavailable."""
        ...

    def expose(self, region: Region) -> None:
        """This memory may be moved from here on. Raises LLMException when it cannot."""
        ...

    def conceal(self, region: Region) -> None:
        """The end of `expose`: nobody asks for this memory any more. Does not raise."""
        ...

    def exports(self) -> bytes:
        """What the channels of linked peers need to know of the memory that is exposed now."""
        ...

    def close(self) -> None: ...


class AllMemory:
    """The part of a transport that reaches any memory of a process by its address alone."""

    reaches = frozenset({HOST})

    def expose(self, region: Region) -> None:
        pass

    def conceal(self, region: Region) -> None:
        pass

    def exports(self) -> bytes:
        return b""


class ProbeNonce:
    """A nonce in our memory that peers read to verify a path, with as much behind it as data has.

    Both ends read the other's, so that large frames go either way. It is PROBE_NBYTES long.
    """

    def __init__(self) -> None:
        self.nonce = secrets.token_bytes(NONCE_NBYTES)
        self._memory = np.zeros(PROBE_NBYTES, dtype=np.uint8)
        self._memory[:NONCE_NBYTES] = np.frombuffer(self.nonce, dtype=np.uint8)

    @property
    def addr(self) -> int:
        return int(self._memory.ctypes.data)


def verify(transport: Transport, channel: Channel, target: ProbeTarget, deadline: Deadline) -> None:
    """Reads the peer's nonce through the channel. Raises PathUnavailable."""
    share = Deadline.after(_PROBE_SHARE * max(0.0, deadline.remaining_s()))
    try:
        try:
            nonce = _read_probe(transport, channel, target, PROBE_NBYTES, share)
        except LLMException as error:
            if error.status_code is not LLMStatusCode.LLM_TIMEOUT:
                raise
            _read_probe(transport, channel, target, NONCE_NBYTES, deadline)
            raise PathUnavailable(
                f"{NONCE_NBYTES} bytes come through, {PROBE_NBYTES} did not within "
                f"{share.timeout_s:.3f} s: the network drops large frames, or is very slow "
                "(compare the MTU of both ends, and of what is between)"
            ) from error
    except LLMException as error:
        raise PathUnavailable(str(error)) from error
    if nonce != target.nonce:
        raise PathUnavailable("the process reached is not the peer of the hand-shake")


def _read_probe(
    transport: Transport, channel: Channel, target: ProbeTarget, nbytes: int, deadline: Deadline
) -> bytes:
    """The nonce, read with so much behind it. Raises LLMException."""
    # pages of its own: those of many links would not all go back from the heap
    landing = np.frombuffer(mmap.mmap(-1, nbytes), dtype=np.uint8)
    region = Region((landing.ctypes.data,), nbytes, is_remote_accessible=False)
    segments = Segments.few([target.addr], [landing.ctypes.data], [nbytes])
    transport.expose(region)
    try:
        channel.read(segments, Guard(0, target.generation, target.word_addr), deadline)
    finally:
        transport.conceal(region)
    return landing[:NONCE_NBYTES].tobytes()
