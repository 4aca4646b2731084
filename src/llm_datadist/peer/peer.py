"""A peer: the other end of one live link, as the threads see it that move bytes.

A peer is whole from the moment it exists: the hand-shake is over, a path was verified. What it
needs of its link is here; it knows neither the link's connection nor the loop's thread. When the
link ends, its door is shut and its streams and channel are closed, and whoever is inside fails.

`move` is the one way of a pull and of a push: look the peer's cache up, have the value plan, read
or have it fetched. What was found earlier may have been replaced meanwhile; then once more.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from llm_datadist.core import messages as m
from llm_datadist.core.fetches import names_of
from llm_datadist.core.packed import pack_columns
from llm_datadist.core.pattern import Windows
from llm_datadist.core.segments import Segments
from llm_datadist.core.transfer import Pull, Receipt
from llm_datadist.errors import LLMException, LLMStatusCode, invalid
from llm_datadist.memory.checksum import digest_of
from llm_datadist.observe.log import get_logger
from llm_datadist.peer.lookup import Lookup
from llm_datadist.transport.base import StaleCache
from llm_datadist.transport.stream import RequestRefused

if TYPE_CHECKING:
    from collections.abc import Iterable

    from llm_datadist.core.combs import Pieces
    from llm_datadist.core.registry import Entry, KeyName
    from llm_datadist.core.remote import Guard, RemoteCache, RemoteTable
    from llm_datadist.core.transfer import Push
    from llm_datadist.observe.watch import Watch
    from llm_datadist.peer.lookup import Found
    from llm_datadist.peer.streams import StreamPool
    from llm_datadist.running.deadline import Deadline
    from llm_datadist.running.gate import Door
    from llm_datadist.running.movers import Call, Movers
    from llm_datadist.transport.base import Channel, Transport
    from llm_datadist.transport.stream import Stream

#: a cache that is freed or re-made while it is read is looked up anew so many times
_ATTEMPTS = 3
#: pieces of a large transfer that are smaller than this on average are warned about
_CRUMB_NBYTES = 1024
#: how it shows that what was found earlier has been replaced by something else
_MAYBE_STALE = (LLMStatusCode.LLM_PARAM_INVALID, LLMStatusCode.LLM_KV_CACHE_NOT_EXIST)


class Peer:
    """One peer. Thread-safe."""

    def __init__(
        self,
        cluster_id: int,
        transport: Transport,
        channel: Channel,
        streams: StreamPool,
        door: Door,
        bundle: bytes,
        *,
        is_one_sided: bool,
        checking: Movers | None,
    ) -> None:
        """`is_one_sided`: remote-accessible mode. `checking`: compares what arrived; None: not."""
        self.cluster_id = cluster_id
        #: what calls that use this peer go through
        self.door = door
        #: names the links of several devices that were made together, to one process
        self.bundle = bundle
        self._transport = transport
        self._channel = channel
        self._streams = streams
        self._is_one_sided = is_one_sided
        self._checking = checking
        self._has_warned = False
        # where the owner takes part in each read, it checks there what it once answered
        remembers = transport.asks_owner and not is_one_sided
        self._lookup = Lookup(streams, is_tabled=is_one_sided, remembers=remembers)

    @property
    def path(self) -> str:
        """The name of the transport that moves this peer's bytes."""
        return self._transport.name

    @property
    def is_gone(self) -> bool:
        """Whether the link has ended."""
        return self._streams.is_closed

    def move(
        self,
        asked: Pull | Push,
        ours: Entry,
        ticket: Guard | None,
        deadline: Deadline,
        watch: Watch | None = None,
        receipts: list[Receipt] | None = None,
    ) -> int:
        """Carries out what is asked between the peer's cache and ours; the id of the peer's.

        A push is under a `ticket`: the peer fetches as long as it holds. With `receipts` a peer is
        not told yet what was pulled of it: see `confirm`. Returns only when all bytes have been
        moved, of a cache that existed throughout. Raises LLMException; nothing arrives after it was
        raised. The caller has entered the door.
        """
        attempts_left = _ATTEMPTS
        while True:
            attempts_left -= 1
            found = self._lookup.find(asked.place.name, deadline)
            try:
                self._move(asked, ours, ticket, found, deadline, watch, receipts)
            except LLMException as error:
                if not attempts_left or not _is_stale(error, found):
                    raise
                self._lookup.forget()
            else:
                return found.cache.guard.cache_id

    def find(self, name: int | KeyName, deadline: Deadline) -> RemoteCache:
        """A cache of the peer's. Raises LLMException. The caller has entered the door."""
        return self._lookup.find(name, deadline).cache

    def table(self, deadline: Deadline, seen: RemoteTable | None = None) -> RemoteTable:
        """All that we may reach of the peer's; newer than `seen`. As `find` otherwise."""
        return self._lookup.table(deadline, seen)

    def notify(self, name: str, text: str, deadline: Deadline) -> None:
        """Has the peer keep a notice for its program. Raises as `find` does."""
        with self._streams.borrow(deadline) as stream:
            answer = stream.ask(m.Notify(name, text), deadline)
            if not isinstance(answer, m.Done):
                raise _garbage(answer)

    def forget(self) -> None:
        """What was found earlier does not fit, and may have been replaced: asks anew next time."""
        self._lookup.forget()

    def _move(
        self,
        asked: Pull | Push,
        ours: Entry,
        ticket: Guard | None,
        found: Found,
        deadline: Deadline,
        watch: Watch | None,
        receipts: list[Receipt] | None,
    ) -> None:
        remote, row = found.cache, found.row if asked.place.row is None else asked.place.row
        if watch is not None:
            watch.plans()
        segments = asked.segments(remote, row, ours)
        if watch is not None:
            watch.moves(segments)
        # Windows are made one after the other, for a plan that is too large to exist at once
        for window in (segments,) if type(segments) is Segments else self._windows(asked, segments):
            if ticket is None:
                self.read(window, remote.guard, ours, deadline)
            else:
                self.send(window, ticket, remote.guard, deadline)
        if ticket is None and isinstance(asked, Pull):
            if remote.is_counted and asked.is_all:
                self.tell_read(remote, deadline)
            elif not self._is_one_sided and remote.has_key_at(row):
                if receipts is None:
                    self._use_up(remote, row, asked.tensors, deadline)
                else:
                    receipts.append(
                        Receipt(self.cluster_id, self.bundle, remote, row, asked.tensors)
                    )

    def confirm(self, receipt: Receipt, deadline: Deadline) -> None:
        """Tells the owner what `move` left for later."""
        self._use_up(receipt.remote, receipt.row, receipt.tensors, deadline)

    def tell_read(self, remote: RemoteCache, deadline: Deadline) -> None:
        """Tells an owner who counts readers that we have what we need of its cache."""
        if remote.is_counted:
            self._use_up(remote, 0, None, deadline)

    def _windows(self, asked: Pull | Push, pieces: Pieces | Windows) -> Iterable[Pieces]:
        if not isinstance(pieces, Windows):
            return (pieces,)
        are_crumbs = pieces.are_many and pieces.total_nbytes < _CRUMB_NBYTES * len(pieces)
        if are_crumbs and not self._has_warned:
            self._has_warned = True
            get_logger().warning(
                "%s moves %d pieces of %d bytes on average, which costs more than their bytes: "
                "with heads outside of tokens (HND) at both ends a split by heads has fewer",
                asked, len(pieces), pieces.total_nbytes // len(pieces),
            )  # fmt: skip
        return pieces

    def read(self, pieces: Pieces, guard: Guard, ours: Entry, deadline: Deadline) -> None:
        """Reads into our cache over the link's path, and compares what came where that is asked.

        Raises LLMException, as `Channel.read` does.
        """
        if ours.space not in self._transport.reaches:
            raise invalid(
                f"our cache {ours.cache_id} lies in {ours.space}, which the path {self.path} of "
                f"the link to cluster {self.cluster_id} does not reach"
            )
        self._channel.read(pieces, guard, deadline)
        if self._checking is not None and len(pieces):
            movers = self._checking
            parts = pieces.flat().split(movers.parts_of(pieces.total_nbytes))
            tasks = [partial(self._verify, part, guard, deadline) for part in parts]
            movers.run(tasks, deadline.token)

    def send(self, pieces: Pieces, src: Guard, dst: Guard | None, deadline: Deadline) -> None:
        """Has the peer fetch pieces of ours, under the ticket `src`, into its cache `dst`.

        Without `dst` the destination is found by its addresses. Raises StaleCache when the peer's
        cache is another by now, LLMException otherwise.
        """
        with self._streams.borrow(deadline) as stream:
            for window in pieces.windows(m.MAX_REQUEST_SEGMENTS) if len(pieces) else ():
                try:
                    answer = stream.ask(_fetch_request(window, src, dst, deadline), deadline)
                except RequestRefused as refused:
                    if dst and refused.status_code is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST:
                        raise StaleCache(dst) from refused
                    raise
                if not isinstance(answer, m.Done):
                    raise _garbage(answer)

    def _verify(self, part: Segments, src: Guard, deadline: Deadline, call: Call) -> None:
        """Compares what lies at our end of the segments with what their owner has, both at once.

        Raises LLMException(LLM_FAILED) when it differs, StaleCache when the owner has it no more.
        """
        for piece in part.windows(m.MAX_REQUEST_SEGMENTS):
            columns = pack_columns(piece.src, piece.nbytes)
            timeout_ms = max(1, int(deadline.require("the checksum of a transfer") * 1000))
            with self._streams.borrow(deadline) as stream:
                question = m.Digest(src.cache_id, src.generation, timeout_ms, columns)
                stream.tell(question, deadline)
                go_on = partial(_require, stream, call, deadline)
                ours = digest_of(piece.dst, piece.nbytes, go_on)
                try:
                    answer = stream.answer(deadline)
                except RequestRefused as refused:
                    if refused.status_code is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST:
                        raise StaleCache(src) from refused
                    raise
            if not isinstance(answer, m.Digested) or answer.digest != ours:
                raise LLMException(
                    f"what arrived of the peer's cache {src.cache_id} is not what its owner has: "
                    "the checksums differ (verify_transfers)",
                    LLMStatusCode.LLM_FAILED,
                )

    def _use_up(
        self, remote: RemoteCache, row: int, tensors: range | None, deadline: Deadline
    ) -> None:
        """Tells the owner that a row was pulled, so that it lets go of the row's key. Spec 6.7."""
        first, count = (tensors.start, len(tensors)) if tensors else (0, 0)
        try:
            with self._streams.borrow(deadline) as stream:
                question = m.UseUp(remote.guard.cache_id, row, first, count)
                answer = stream.ask(question, deadline)
                if not isinstance(answer, m.Done):
                    raise _garbage(answer)
        except LLMException as error:  # the bytes have been moved: that is what was asked for
            get_logger().warning(
                "the owner of cache %d does not know that its row %d was pulled: %s",
                remote.guard.cache_id, row, error,
            )  # fmt: skip


def _require(stream: Stream, call: Call, deadline: Deadline) -> None:
    """Raises LLMException when the checksum is not wanted any more."""
    deadline.require("the checksum of a transfer")
    call.require()
    if stream.is_shut:
        raise LLMException("the link was cut", LLMStatusCode.LLM_NOT_YET_LINK)


def _is_stale(error: LLMException, found: Found) -> bool:
    """What was found earlier and does not fit may have been replaced by something that does."""
    if isinstance(error, StaleCache):
        return True
    return not found.is_fresh and error.status_code in _MAYBE_STALE


def _garbage(answer: m.AnyMessage) -> LLMException:
    return LLMException(f"the peer answered {answer!r:.200}", LLMStatusCode.LLM_FAILED)


def _fetch_request(pieces: Pieces, src: Guard, dst: Guard | None, deadline: Deadline) -> m.Fetch:
    return m.Fetch(
        dst.cache_id if dst else None,
        dst.generation if dst else 0,
        src.cache_id,
        src.generation,
        src.word_addr,
        max(1, int(deadline.require("the transfer") * 1000)),
        deadline.at,
        *names_of(pieces),
    )
