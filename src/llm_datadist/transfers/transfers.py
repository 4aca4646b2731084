"""Transfers: the values of `core/transfer.py`, carried out on one cluster.

The way of a pull runs straight down from here: our cache is found and kept (`owner/catalog.py`),
the peer is found (`links/table.py`); it looks its own cache up, has the value plan, and reads
(`peer/peer.py`). Nothing is handed down that calls up again.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from llm_datadist.core.generations import STALE
from llm_datadist.core.shards import PullShards
from llm_datadist.core.transfer import Copy, Place, Pull, Push, Receipt
from llm_datadist.errors import LLMException, LLMStatusCode, invalid
from llm_datadist.memory.device import HOST
from llm_datadist.observe.log import get_logger
from llm_datadist.running.bell import WAKE
from llm_datadist.running.deadline import Deadline, Token
from llm_datadist.transfers.by_address import NotBegun, OnLink

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from llm_datadist.core.registry import Entry
    from llm_datadist.core.remote import Guard, RemoteCache
    from llm_datadist.core.shards import PullShard
    from llm_datadist.links.table import LinkTable
    from llm_datadist.memory.device import Device
    from llm_datadist.observe.watch import Observer, Watch
    from llm_datadist.owner.catalog import Catalog
    from llm_datadist.peer.peer import Peer
    from llm_datadist.running.gate import Gate
    from llm_datadist.running.movers import Call, Movers
    from llm_datadist.running.threads import Errands

    Asked: TypeAlias = Pull | Push | Copy | PullShards | OnLink | Receipt


class _Token(Token):
    """That of a call in a thread of the program's: it ends in single steps."""

    __slots__ = ()


class Part(NamedTuple):
    """What the place of one device is told of a call on several."""

    #: of the whole call, with the token that cuts it
    deadline: Deadline
    #: for what peers are to be told when every part has arrived
    receipts: list[Receipt]
    #: the peer's cache that it was, by the name of the bundle of links and its id
    moved: list[tuple[bytes, int]]

    def begin(self, token: Token) -> Deadline:
        """The part's own call may be cut with the whole; its deadline. Raises LLMException."""
        whole = self.deadline.token
        if whole is not None:
            whole.waits[token] = None
            whole.require()
        return self.deadline._replace(token=token)


class Transfers:
    """Moves bytes between caches of ours, and between them and those of peers. Thread-safe."""

    def __init__(
        self,
        catalog: Catalog,
        links: LinkTable,
        gate: Gate,
        devices: Mapping[str, Device],
        observer: Observer | None,
        timeout_s: float,
        errands: Errands,
        movers: Movers,
    ) -> None:
        self._catalog = catalog
        self._links = links
        self._gate = gate
        #: by space; a GPU's would be another
        self._devices = devices
        self._observer = observer
        self._timeout_s = timeout_s
        self._has_warned = False
        #: starts threads where no signal strikes
        self.errands = errands
        self._movers = movers

    def run(self, asked: Asked, part: Part | None = None) -> None:
        """Moves what is asked, within the cluster's time-out; over a given link within its own,
        and as a part within the whole's.

        Raises LLMException; nothing arrives after it was raised.
        """
        gate = self._gate
        token, ringing = _Token(gate.running), map(WAKE, gate.bell.waiting)
        try:
            self._run(token, asked, part)
        except LLMException as error:
            kind = NotBegun if isinstance(error, NotBegun) else LLMException
            raise kind(f"{asked}: {error}", error.status_code) from error
        finally:  # as `Gate.leave`, which a signal could come before: each of these is one step
            try:
                token.cell[0] = STALE
            finally:
                try:
                    gate.running.pop(token, None)
                finally:
                    any(ringing)

    def push_to_addresses(
        self, asked: Push, tensors: range, addrs: Sequence[int], part: Part | None = None
    ) -> None:
        """Pushes these tensors of ours to addresses that must lie in one cache of the peer's.

        Raises as `run` does. In a thread of the library's. Spec 6.12.
        """
        with self._gate.passing() as token:
            ours = self._catalog.use(token, asked.cache_id)
            src = ours.layout.tensors(tensors)
            asked.check_fit(src.geometry)
            segments = asked.plan(src, asked.layout_at(addrs, src.geometry), 0)
            with self.watching("push", asked.place.cluster_id) as watch:
                if watch is not None:
                    watch.moves(segments)
                peer = self._enter(token, asked.place.cluster_id)
                ticket = self._catalog.issue(token, ours, peer)
                try:
                    deadline = (
                        Deadline.after(self._timeout_s, token) if part is None
                        else part.begin(token)
                    )  # fmt: skip
                    peer.send(segments, ticket.guard, None, deadline)
                finally:
                    ticket.cell[0] = STALE

    def is_in_this_thread(self) -> bool:
        """Whether a call of this very thread is under way: a finalizer, or a handler, is in it."""
        mine = get_ident()
        tokens = list(self._gate.running)
        return any(isinstance(token, _Token) and token.thread == mine for token in tokens)

    def watching(
        self, operation: str, cluster_id: int | None = None
    ) -> AbstractContextManager[Watch | None]:
        """Watches an operation while `with` lasts; None where nobody looks."""
        if self._observer is None:
            return nullcontext()
        path = "" if cluster_id is None else self._links.paths.get(cluster_id, "")
        return self._observer.watch(operation, cluster_id, path)

    def _run(self, token: _Token, asked: Asked, part: Part | None) -> None:
        if isinstance(asked, Pull):
            cluster_id = asked.place.cluster_id
            if self._links.is_self(cluster_id):
                raise invalid("the key names this cluster itself; only a linked peer can be pulled")
            ours = self._catalog.use(token, asked.cache_id)
            asked.check(ours)
            if self._observer is None:
                self._move(token, self._enter(token, cluster_id), asked, ours, None, None, part)
            else:
                with self.watching("pull", cluster_id) as watch:
                    peer = self._enter(token, cluster_id)
                    self._move(token, peer, asked, ours, None, watch, part)
        elif isinstance(asked, Push):
            self._push(token, asked, part)
        elif isinstance(asked, PullShards):
            self._pull_shards(token, asked)
        elif isinstance(asked, Receipt):
            self._confirm(token, asked, part)
        elif isinstance(asked, OnLink):
            self._do_on_link(token, asked)
        else:
            self._copy(token, asked)

    def _pull_shards(self, token: _Token, asked: PullShards) -> None:
        """All peers side by side. What was known of their caches may be out of date: then anew."""
        ours, deadline = (
            self._catalog.use(token, asked.cache_id),
            Deadline.after(self._timeout_s, token),
        )
        clusters = [shard.place.cluster_id for shard in asked.shards]
        if any(map(self._links.is_self, clusters)):
            raise invalid("a key names this cluster itself; only linked peers can be pulled")
        peers = [self._enter(token, cluster_id) for cluster_id in clusters]
        try:
            self._pull_from(peers, asked, ours, deadline)
        except LLMException as error:
            if error.status_code is not LLMStatusCode.LLM_PARAM_INVALID:
                raise
            for peer in peers:
                peer.forget()
            self._pull_from(peers, asked, ours, deadline)

    def _pull_from(
        self, peers: Sequence[Peer], asked: PullShards, ours: Entry, deadline: Deadline
    ) -> None:
        found: dict[int, RemoteCache] = {}

        def find(index: int, _: Call) -> None:
            found[index] = peers[index].find(asked.shards[index].place.name, deadline)

        def pull(peer: Peer, shard: PullShard, call: Call) -> None:
            call.require()  # another may have failed meanwhile
            with self.watching("pull", peer.cluster_id) as watch:
                peer.move(shard, ours, None, deadline, watch)

        token = deadline.token
        self._movers.run([partial(find, index) for index in range(len(peers))], token)
        shards = asked.planned([found[index] for index in range(len(peers))], ours)
        pairs = zip(peers, shards, strict=True)
        pulls = [partial(pull, peer, shard) for peer, shard in pairs if shard.patterns]
        self._movers.run(pulls, token)
        for index, peer in enumerate(peers):  # those, too, of which nothing was needed
            peer.tell_read(found[index], deadline)

    def _do_on_link(self, token: _Token, asked: OnLink) -> None:
        try:
            self._gate.enter(token, asked.peer.door)
        except LLMException as error:
            raise NotBegun(str(error), error.status_code) from error
        deadline = Deadline.after(asked.timeout_s, token)
        with self.watching(asked.operation, asked.peer.cluster_id) as watch:
            asked.carry_out(token, self._catalog, deadline, watch)

    def _push(self, token: _Token, asked: Push, part: Part | None) -> None:
        ours = self._catalog.use(token, asked.cache_id)
        asked.check(ours)
        if ours.kv_layout is None and asked.layers.moves_nothing(ours.layout.geometry):
            self._warn_of_nothing(asked, ours)
        with self.watching("push", asked.place.cluster_id) as watch:
            peer = self._enter(token, asked.place.cluster_id)
            ticket = self._catalog.issue(token, ours, peer)
            token.cell = ticket.cell
            self._move(token, peer, asked, ours, ticket.guard, watch, part)

    def _confirm(self, token: _Token, asked: Receipt, part: Part | None) -> None:
        assert part is not None
        peer = self._enter(token, asked.cluster_id)
        if peer.bundle != asked.bundle:
            raise LLMException("the link was cut", LLMStatusCode.LLM_NOT_YET_LINK)
        peer.confirm(asked, part.begin(token))

    def _move(
        self,
        token: Token,
        peer: Peer,
        asked: Pull | Push,
        ours: Entry,
        ticket: Guard | None,
        watch: Watch | None,
        part: Part | None,
    ) -> None:
        if part is None:
            peer.move(asked, ours, ticket, Deadline.after(self._timeout_s, token), watch)
        else:
            deadline = part.begin(token)
            cache_id = peer.move(asked, ours, ticket, deadline, watch, part.receipts)
            part.moved.append((peer.bundle, cache_id))

    def _warn_of_nothing(self, asked: Push, ours: Entry) -> None:
        """It is a success, as in the reference (O14); the log says once what that means."""
        if not self._has_warned:
            self._has_warned = True
            get_logger().warning(
                "%s moves nothing: the cache has %d tensor(s), which is no whole layer; set "
                "tensor_num_per_layer to 1",
                asked, ours.layout.geometry.num_tensors,
            )  # fmt: skip

    def _enter(self, token: object, cluster_id: int) -> Peer:
        peer = self._links.find(cluster_id)
        self._gate.enter(token, peer.door)
        return peer

    def _copy(self, token: object, asked: Copy) -> None:
        source, target = self._place(token, asked.src), self._place(token, asked.dst)
        segments = asked.segments(source.layout, target.layout)
        with self.watching("copy") as watch:
            if watch is not None:
                watch.moves(segments)
            space = source.space if target.space == HOST else target.space
            self._devices[space].copy(segments)

    def _place(self, token: object, cache: int | Place) -> Place:
        if isinstance(cache, Place):
            return cache
        ours = self._catalog.use(token, cache)
        return Place(ours.layout, ours.space)
