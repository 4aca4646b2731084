"""The cluster at work: what one initialised LLMDataDist or LlmDataDist has, put together.

It makes the parts, in the order in which they need each other, and ends them in the reverse order.
Whoever carries something out is one of the parts; nobody below knows this file.
"""

from __future__ import annotations

import asyncio
import secrets
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from llm_datadist.core.link import SAME_HOST, Identity
from llm_datadist.device_options import unequal
from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.following.membership import Membership
from llm_datadist.links.context import Context
from llm_datadist.links.filing import Filing
from llm_datadist.links.groups import Groups
from llm_datadist.links.ids import Ids
from llm_datadist.links.linker import Linker, Outcome
from llm_datadist.links.listening import Listening
from llm_datadist.links.ranks import RankLinks
from llm_datadist.links.snapshot import Snapshots
from llm_datadist.links.strangers import Strangers
from llm_datadist.links.table import LinkTable
from llm_datadist.locks import holds_lock
from llm_datadist.memory.checksum import require_checksums
from llm_datadist.memory.process import ProcessMemory
from llm_datadist.observe.log import get_logger
from llm_datadist.observe.watch import Observer
from llm_datadist.owner.answers import MAX_ANSWER_S, Answers
from llm_datadist.owner.catalog import Catalog
from llm_datadist.owner.fetching import Fetching
from llm_datadist.owner.notices import Notices
from llm_datadist.owner.pools import open_pools
from llm_datadist.owner.service import Serving
from llm_datadist.peer.streams import MAX_STREAMS
from llm_datadist.running.bell import Latch, Turns
from llm_datadist.running.deadline import Deadline
from llm_datadist.running.ending import Ending
from llm_datadist.running.gate import Gate
from llm_datadist.running.loop import CannotWait, Loop, cancel_all
from llm_datadist.running.movers import Movers
from llm_datadist.running.shares import LoopShares, Shares
from llm_datadist.running.threads import Errands, Threads, is_ours, start_thread
from llm_datadist.transfers.transfers import Transfers
from llm_datadist.transport.credentials import warn_of_public_files
from llm_datadist.transport.installed import transports_for
from llm_datadist.transport.same_host import SameHost
from llm_datadist.transport.shields import Shields

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from llm_datadist.core.registry import Entry
    from llm_datadist.core.stats import ClusterStats
    from llm_datadist.endpoint import Endpoint
    from llm_datadist.links.filing import Siblings
    from llm_datadist.links.linker import Target
    from llm_datadist.memory.arena import MemoryPool
    from llm_datadist.observe.recorder import Recorder
    from llm_datadist.options import Options
    from llm_datadist.transport.base import Transport
    from llm_datadist.types import Placement

T = TypeVar("T")

_TIMEOUT = LLMStatusCode.LLM_TIMEOUT

#: how long the end may take, beside waiting for running calls
_LAST_S = 2.0
#: each step of the end has a little more, however late it is
_GRACE_S = 3.0
#: what the names of our threads begin with
_OUR_THREADS = "llm-datadist"
_WORKERS = 16
#: one peer has at most so many of them at a time, and of the fetchers one for each of its streams
_WORKERS_OF_ONE = 12
_CHECKERS_OF_ONE = 4
#: more than the streams of several peers: one that stalls in a push holds its streams' threads
_FETCHERS = 256
#: started when needed; a listener greets no more callers at once
_WAITERS = 512


class Cluster:
    """One cluster. Thread-safe, but for `start` and `stop`.

    Raises LLMException for what the options ask for and cannot be had, OSError when descriptors
    have run out; nothing is left behind then.
    """

    def __init__(
        self,
        cluster_id: int,
        options: Options,
        siblings: Siblings | None = None,
    ) -> None:
        """`siblings` is told of the links where this is one of several devices (`places/`)."""
        self.cluster_id = cluster_id
        self._siblings = siblings
        self.options = options
        self._ending = Ending()
        self._is_started = False
        #: who ends it
        self._stopping = Turns()
        self._stopped = Latch()
        #: what the catalog had, until no transport can reach it any more
        self._entries: list[Entry] = []
        try:
            self._make()
        except BaseException:
            self._ending.run(Deadline.after(_LAST_S))
            raise

    def _make(self) -> None:
        """The parts, from the bottom up: each is ended before those that were made before it."""
        options = self.options
        self._observer = Observer.of(self.cluster_id, options)
        recorder = None if self._observer is None else self._observer.recorder
        if options.verify_transfers:
            require_checksums()
        #: the thread in which connections wait
        self.loop = Loop()
        self._ending.add("the loop", self.loop.close)
        #: what runs here
        self.gate = Gate(recorder)
        #: no link ends before all of these are drained: those of several devices, whose links are
        #: cut together
        self.gates: Sequence[Gate] = (self.gate,)
        self._errands = errands = Errands(f"{_OUR_THREADS}-errand")
        movers = Movers(options.transfer_threads, errands)
        process = ProcessMemory(movers)
        pools = open_pools(options, process)
        self._ending.add("the memory pools", lambda _: self._close_pools(pools))
        self._ending.add("the errands", errands.end)
        transports = transports_for(options, movers)
        for transport in transports.values():
            self._ending.add(f"the transport {transport.name}", partial(_close, transport))
        self._ending.add("the movers", movers.end)
        self._movers = movers
        #: what peers have told our program
        self.notices = Notices(is_wanted=options.is_engine)
        #: our caches
        self.catalog = Catalog(
            self.gate,
            pools,
            list(transports.values()),
            peers_keep_tables=options.remote_accessible,
            errands=errands,
        )
        self._make_links(self._make_context(movers, transports, recorder))
        self._ending.add("the place in the fleet", self.membership.end)
        #: what moves bytes
        self.transfers = Transfers(
            self.catalog,
            self.links,
            self.gate,
            {process.space: process},
            self._observer,
            options.sync_timeout_s,
            errands,
            movers,
        )

    def _make_context(
        self, movers: Movers, transports: Mapping[str, Transport], recorder: Recorder | None
    ) -> Context:
        """What links share: who we are, threads, and how peers are answered."""
        options, loop = self.options, self.loop.asyncio
        workers = self._threads(_WORKERS, "worker")
        # apart from the workers, so that two peers that push to each other both have some to answer
        fetchers = self._threads(_FETCHERS, "fetcher")
        answers = Answers(self.cluster_id, self.catalog, transports)
        # each transfer of an engine's has a time of its own, which the peer says
        peers_s = MAX_ANSWER_S if options.is_engine else options.sync_timeout_s
        fetching = Fetching(answers, self.gate, recorder, peers_s)
        offers = {name: transport.offer() for name, transport in transports.items()}
        meets = options.path in ("auto", SAME_HOST) and offers[SAME_HOST] is not None
        same_host = SameHost.new() if meets else None
        if same_host is not None:
            offers[SAME_HOST] = same_host.offer()
        warn_of_public_files(options.link_security)
        me = Identity(
            self.cluster_id,
            secrets.token_bytes(16),
            options.remote_accessible,
            {name: offer for name, offer in offers.items() if offer is not None},
            self.catalog.probe_target,
            options.path,
            options.device_index,
            options.num_devices,
        )
        return Context(
            me,
            loop,
            self.gate,
            transports,
            Serving(
                loop,
                answers,
                fetching,
                self.notices,
                self.gate,
                Shares(workers, _WORKERS_OF_ONE),
                Shares(workers, _CHECKERS_OF_ONE),
                Shares(fetchers, MAX_STREAMS),
                LoopShares(loop),
                peers_s,
                recorder,
            ),
            # apart from both: strangers and name servers can make these wait as long as they like
            self._threads(_WAITERS, "waiter"),
            Shields(options.link_security),
            same_host,
            movers if options.verify_transfers else None,
            options.sync_timeout_s,
            options.is_engine or options.transfer_backend is not None,
            set(),
            set(),
            recorder,
        )

    def _make_links(self, context: Context) -> None:
        cluster_id, instance, recorder = self.cluster_id, context.me.instance, context.recorder
        #: our live links
        self.links = LinkTable(cluster_id, instance, recorder)
        self._groups = Groups(cluster_id, self.links, is_secure=context.shields.is_secure)
        ids = Ids(self.links)
        filing = Filing(cluster_id, instance, self.links, self._groups, ids, self._siblings)
        #: makes and ends links, in the loop's thread
        self.linker = Linker(context, self.links, filing)
        strangers = Strangers()
        self._snapshots = Snapshots(cluster_id, self.links, self.catalog, strangers, recorder)
        #: where peers reach us
        self.listening = Listening(
            self.loop,
            self._errands,
            context,
            self.links,
            self._groups,
            ids,
            filing,
            strangers,
            self._snapshots.take_for_others,
        )
        #: whom we follow, and as whom
        self.membership = Membership(
            cluster_id,
            instance.hex(),
            self.options,
            self.loop,
            self._errands,
            self.listening,
            self.linker,
            filing,
            self.links,
        )
        self._snapshots.take_fleet = self.membership.stats
        #: links by rank table
        self.ranks = RankLinks(
            cluster_id, self.options, self.loop, self.listening, self._groups, self.linker
        )

    def start(self) -> None:
        """Listens, if the options say where. `stop` must follow, also when it raises.

        Raises LLMException when the address, or a thread, cannot be had.
        """
        self._errands.begin()
        self._errands.run(self.loop.start)
        self.listening.move(self.options.listen)
        self._is_started = True

    @property
    def is_up(self) -> bool:
        """Whether it has started, and nobody has begun to end it."""
        return self._is_started and self.gate.door.shut_because is None

    def stop(self) -> None:
        """Ends all links, lets running calls end first, and gives everything back.

        May be called again, and from several threads: all return when it is done. It is done in a
        thread of its own, which no interruption of a caller's stops; where none is to be had, the
        next call goes on with what is left. Bounded by the cluster's time-out, for calls that run,
        and by `_LAST_S` for all that is left: links that cannot be ended in order, threads that
        wait for a name server or for a peer. What runs then, fails; memory that it uses stays
        mapped. Where a signal's handler or a finalizer calls it in the middle of a call of its own
        thread, it only begins: the end comes when that call has ended. Raises
        LLMException(LLM_FAILED) when there is no thread to be had for that.
        """
        if self.begins_to_stop():
            self.await_stop()

    def begins_to_stop(self) -> bool:
        """The first half of `stop`; whether the end can be waited for. Raises as that does."""
        if self._stopped.is_set:
            return False
        cannot_wait = is_ours() or holds_lock() or self.transfers.is_in_this_thread()
        try:
            self._errands.run(partial(start_thread, self._stop_once, f"{_OUR_THREADS}-end"))
        except LLMException:
            if cannot_wait:
                raise
            self._stop_once()
        return not cannot_wait

    def await_stop(self) -> None:
        """The second half of `stop`."""
        if not self._stopped.wait(self._stop_s):
            get_logger().error(
                "cluster %d: its end waits for a thread that was interrupted, and goes on without "
                "finalize", self.cluster_id,
            )  # fmt: skip

    @property
    def _stop_s(self) -> float:
        """How long `stop` may take."""
        return self.options.sync_timeout_s + _LAST_S + _GRACE_S

    def _stop_once(self) -> None:
        """Of several calls one after the other, each unless one before it came to its end."""
        turn = object()
        try:
            self._stopping.take(turn, Deadline.after(self._stop_s), "the end of the cluster")
            self._stop()
        except LLMException as error:
            get_logger().error("cluster %d has not ended: %s", self.cluster_id, error)
        finally:
            self._stopping.leave(turn)

    def _stop(self) -> None:
        """May be called again, when it was interrupted."""
        if self._stopped.is_set:
            return
        self.membership.begin_end()
        gates, deadline = self.gates, Deadline.after(self.options.sync_timeout_s)
        for gate in gates:
            gate.shut(gate.door, "the cluster is being finalized")
        for gate in gates:
            gate.drain(gate.door, max(0.0, deadline.remaining_s()))
        deadline = Deadline.after(_LAST_S)
        self._entries += self.catalog.close()
        self._movers.stop()
        try:
            self.loop.finish(self._close_links, deadline)
        except LLMException as error:
            get_logger().error("not all links ended in order: %s", error)
        self.gate.drain(self.gate.door, max(0.0, deadline.remaining_s()))
        self._ending.run(deadline)
        self._entries.clear()
        self._stopped.set()

    def _close_pools(self, pools: Mapping[Placement, MemoryPool]) -> None:
        """The memory of what still runs stays where it is."""
        if self.gate.count(self.gate.door):
            get_logger().error(
                "cluster %d: calls outlast its end; the memory of its pools stays mapped",
                self.cluster_id,
            )
            return
        for pool in pools.values():
            pool.close()

    def make(self, make: Callable[[], T], id_of: Callable[[T], int]) -> T:
        """Something that has a cache of ours, which is forgotten if a signal keeps it from the
        caller: the program would have a cache that it cannot name.
        """
        return self._errands.run(make, lambda made: self.catalog.forget(id_of(made)))

    def holds(self, bundle: bytes) -> bool:
        """Whether there is a live link of that bundle."""
        return any(session.bundle == bundle for session in self.links.all())

    def cut_soon(self, bundle: bytes, because: str) -> None:
        """Drops the links of that bundle. In any thread, and does not wait."""
        self.loop.spawn(partial(self.cut, bundle, because))

    async def cut(self, bundle: bytes, because: str) -> None:
        """Drops the links of that bundle. In the loop's thread."""
        for session in self.links.all():
            if session.bundle == bundle:
                await session.cut(because)

    def switching(self) -> AbstractContextManager[None]:
        """The turn to change the role; see `Listening.switching`."""
        return self.listening.switching(self.options)

    def switch_listening(self, endpoints: Sequence[Endpoint]) -> None:
        """Listens there, or no more. Raises LLMException. Spec 5.7."""
        if len(endpoints) > 1:
            raise unequal(1, len(endpoints))
        self.listening.switch(endpoints[0] if endpoints else None, self.options)

    def link(self, targets: Sequence[Target], timeout_s: float) -> list[Outcome]:
        """Links to all targets at once; each has `timeout_s`. Spec 5.4."""
        if self.options.cannot_link:
            refused = Outcome(LLMStatusCode.LLM_PARAM_INVALID, self.options.cannot_link)
            return [refused for _ in targets]
        with self.transfers.watching("link") as watch:
            link = partial(self.linker.link, timeout_s=timeout_s)
            outcomes = self._for_each(targets, link, timeout_s)
            if watch is not None:
                watch.ended([outcome.status for outcome in outcomes])
            return outcomes

    def unlink(self, targets: Sequence[Target], timeout_s: float, *, force: bool) -> list[Outcome]:
        """Unlinks from all targets at once; `force` asks nobody. Spec 5.5."""
        with self.transfers.watching("unlink") as watch:
            unlink = self.linker.cut if force else self.linker.leave
            outcomes = self._for_each(targets, partial(unlink, timeout_s=timeout_s), timeout_s)
            if watch is not None:
                watch.ended([outcome.status for outcome in outcomes])
            return outcomes

    def _for_each(
        self,
        targets: Sequence[Target],
        do: Callable[[Target], Coroutine[object, object, Outcome]],
        timeout_s: float,
    ) -> list[Outcome]:
        """What comes of each target, all at once, in the loop's thread.

        Each ends by itself in its time, if that thread does; the deadline here is for when not.
        """
        deadline = Deadline.after(timeout_s + _GRACE_S)
        try:
            return self.loop.run(lambda: _gather(map(do, targets)), deadline)
        except LLMException as error:
            if not isinstance(error, CannotWait) and error.status_code is not _TIMEOUT:
                raise  # the cluster was finalized
            return [Outcome(error.status_code, str(error)) for _ in targets]

    def stats(self) -> ClusterStats:
        """What there is, and what was counted so far."""
        return self._snapshots.take()

    def call_soon(self, call: Callable[[], object]) -> None:
        """Has the loop's thread call what is quick. Takes no lock: finalizers of objects may."""
        self.loop.call_soon(call)

    @property
    def listen_endpoints(self) -> tuple[Endpoint, ...]:
        """Where the cluster listens, the port that was taken for 0 included; none if it does not.

        One for each device, of which there is one.
        """
        endpoint = self.listening.endpoint
        return () if endpoint is None else (endpoint,)

    async def _close_links(self) -> None:
        await self.listening.close()
        await self._groups.close()
        await self.listening.close_for_ranks()
        for session in self.links.all():
            await session.cut("this cluster was finalized")
            await session.join()
        await cancel_all(task for task in asyncio.all_tasks() if task is not asyncio.current_task())

    def _threads(self, max_threads: int, what: str) -> Threads:
        threads = Threads(max_threads, f"{_OUR_THREADS}-{what}")
        self._ending.add(f"the {what}s", threads.end)
        return threads


def _close(transport: Transport, _: Deadline) -> None:
    transport.close()


async def _gather(work: Iterable[Coroutine[object, object, T]]) -> list[T]:
    return list(await asyncio.gather(*work))
