"""The engine: wires catalog, transports, links and the loop's thread, for one LLMDataDist."""

from __future__ import annotations

import asyncio
import secrets
import selectors
import socket
import threading
import time
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from llm_datadist.core import link as lk
from llm_datadist.endpoint import Endpoint
from llm_datadist.engine import requests
from llm_datadist.engine.catalog import Catalog
from llm_datadist.engine.context import Context
from llm_datadist.engine.groups import Groups
from llm_datadist.engine.linker import Linker
from llm_datadist.engine.links import Links
from llm_datadist.engine.listener import Listener, bind
from llm_datadist.engine.pools import open_pools
from llm_datadist.engine.rendezvous import Rendezvous
from llm_datadist.engine.snapshot import snapshot
from llm_datadist.engine.tasks import cancel_all
from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.memory.device import HOST
from llm_datadist.observe.log import get_logger
from llm_datadist.transport.base import StaleCache
from llm_datadist.transport.checksum import require_checksums
from llm_datadist.transport.deadline import Deadline
from llm_datadist.transport.host import HostMemory
from llm_datadist.transport.installed import transports_for
from llm_datadist.transport.movers import Movers
from llm_datadist.transport.shield import Shields
from llm_datadist.transport.threads import Threads

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Sequence

    from llm_datadist.core.plan import Planner
    from llm_datadist.core.registry import Entry
    from llm_datadist.core.remote import Guard, RemoteCache, RemoteRow
    from llm_datadist.core.segments import Segments
    from llm_datadist.core.stats import ClusterStats
    from llm_datadist.engine.groups import GroupPlan
    from llm_datadist.engine.linker import Outcome, Target
    from llm_datadist.engine.session import Session
    from llm_datadist.memory.device import Device
    from llm_datadist.observe.recorder import Recorder
    from llm_datadist.options import Options

T = TypeVar("T")

#: how long a transfer may take to notice that its link was cut
_LAST_TRANSFERS_S = 2.0
_WORKERS = 16
#: more than the streams of several peers: one that stalls in a push holds its streams' threads
_FETCHERS = 256
#: started when needed; a listener greets no more callers at once
_WAITERS = 512
#: a cache that is freed or re-made while it is read is looked up anew so many times
_ATTEMPTS = 3
#: how it shows that what was found earlier has been replaced by something else
_MAYBE_STALE = (LLMStatusCode.LLM_PARAM_INVALID, LLMStatusCode.LLM_KV_CACHE_NOT_EXIST)


class Engine:
    """One cluster at work. Thread-safe, but for `start` and `stop`. See observed.make_engine."""

    def __init__(self, cluster_id: int, options: Options, recorder: Recorder | None = None) -> None:
        self.cluster_id = cluster_id
        self.options = options
        #: counts what links and peers do; None when metrics are off
        self.recorder = recorder
        self._movers = Movers(options.transfer_threads)
        host = HostMemory(self._movers)
        #: by space; a GPU's would be another
        self._devices: dict[str, Device] = {host.space: host}
        self._pools = open_pools(options, host)
        self.links = Links(cluster_id, recorder)
        self.groups = Groups(cluster_id, self.links)
        self._shields = Shields(options.link_security)
        if options.verify_transfers:
            require_checksums()
        self._workers = Threads(_WORKERS, "llm-datadist-worker")
        # apart from the workers, so that two peers that push to each other both have some to answer
        self._fetchers = Threads(_FETCHERS, "llm-datadist-fetcher")
        # apart from both: strangers and name servers can make these wait for as long as they like
        self._waiters = Threads(_WAITERS, "llm-datadist-waiter")
        self._transports = transports_for(options, self._movers)
        self.catalog = Catalog(
            self._pools,
            list(self._transports.values()),
            peers_keep_tables=options.remote_accessible,
        )
        me = self._identity()
        self._loop = _new_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="llm-datadist-loop", daemon=True
        )
        self._context = Context(
            me,
            self.catalog,
            self.links,
            self.groups,
            self._transports,
            self._loop,
            self._movers,
            self._workers,
            self._fetchers,
            self._waiters,
            self._shields,
            options.verify_transfers,
            options.sync_timeout_s,
            options.transfer_backend is not None,
            recorder,
            time.monotonic(),
        )
        self._linker = Linker(self._context)
        self._rank_listeners: list[Listener] = []
        self._rank_ports: dict[Endpoint, int] = {}
        #: a rank-table link was made, which changes what may be registered (spec 5.8)
        self.has_rank_links = False
        self._listener: Listener | None = None
        self._asked_endpoint: Endpoint | None = None
        #: where the listener really is, the port that was taken for 0 included
        self.listen_endpoint: Endpoint | None = None

    def start(self) -> None:
        """Listens, if the options say where. Raises LLMException when the address cannot be had."""
        self._thread.start()
        try:
            self.listen_on(self.options.listen)
        except LLMException:
            self._shut_down()
            raise

    def stop(self) -> None:
        """Ends all links, lets running transfers end first, and gives everything back."""
        deadline = Deadline.after(self.options.sync_timeout_s)
        sessions = self.links.all()
        for session in sessions:
            session.gate.drain(max(0.0, deadline.remaining_s()))
        entries = self.catalog.close()
        self._run(self._close_links())
        for session in sessions:  # a transfer that outlasted the timeout sees that its link is gone
            session.gate.drain(_LAST_TRANSFERS_S)
        self._shut_down()
        entries.clear()  # not before: transports reached the memory until now

    def listen_on(self, endpoint: Endpoint | None) -> None:
        """Opens, moves or closes the listener. Not while other calls run. Spec 5.7.

        Raises LLMException: LLM_EXIST_LINK while there are links, LLM_FAILED when the address
        cannot be had; all is then as it was.
        """
        if self.links.all():
            raise LLMException("unlink all clusters first", LLMStatusCode.LLM_EXIST_LINK)
        if endpoint == self._asked_endpoint:
            return
        before, self._asked_endpoint = self._asked_endpoint, None
        taken = self.listen_endpoint
        self._run(self._close_listener())
        try:
            self._open_listener(endpoint)
        except LLMException:
            self._open_listener(taken)
            self._asked_endpoint = before
            raise
        self._asked_endpoint = endpoint

    def _open_listener(self, endpoint: Endpoint | None) -> None:
        if endpoint is not None:
            sock = bind(endpoint)
            if not self._shields.is_secure and not endpoint.is_loopback:
                get_logger().warning(
                    "cluster %d listens on %s without link security: whoever reaches that address "
                    "can link and read what is registered; set LLMConfig.link_security",
                    self.cluster_id, endpoint,
                )  # fmt: skip
            self.listen_endpoint = Endpoint(*sock.getsockname()[:2])
            self._listener = self._run(self._make_listener(sock))

    def link(self, targets: Sequence[Target], timeout_s: float) -> list[Outcome]:
        """Links to all targets at once; each has `timeout_s`. Spec 5.4."""
        return self._run(_gather(self._linker.link(target, timeout_s) for target in targets))

    def unlink(self, targets: Sequence[Target], timeout_s: float, *, force: bool) -> list[Outcome]:
        """Unlinks from all targets at once; `force` asks nobody. Spec 5.5."""
        work = self._linker.cut if force else self._linker.leave
        return self._run(_gather(work(target, timeout_s) for target in targets))

    def link_ranks(self, plan: GroupPlan, port: int | None) -> int:
        """Begins a rank-table link and returns its comm_id at once. Spec 5.8, 12.1.

        `port` is where members on other hosts expect us, None when there are none. Raises
        LLMException: LLM_PARAM_INVALID, LLM_LINK_FAILED.
        """
        rendezvous = Rendezvous()
        here = self._listen_for_ranks(Endpoint("127.0.0.1", 0))
        if port is not None:
            places = [place for member in plan.members.values() for place in member]
            for anywhere in {"::" if ":" in place.host else "0.0.0.0" for place in places}:
                try:
                    self._listen_for_ranks(Endpoint(anywhere, port))
                except LLMException as error:  # we can still call the others
                    get_logger().warning("members on other hosts cannot call us: %s", error)
        comm_id = self._run(self.groups.start(plan, self._linker, rendezvous, here))
        self.has_rank_links = True
        return comm_id

    def unlink_ranks(self, comm_id: int) -> None:
        """Ends a rank-table link once its transfers have ended. Raises LLM_NOT_YET_LINK."""
        deadline = Deadline.after(self.options.sync_timeout_s)
        for session in list(self.groups.find(comm_id).sessions.values()):
            session.gate.drain(max(0.0, deadline.remaining_s()))
        self._run(self.groups.stop(comm_id))

    def _listen_for_ranks(self, endpoint: Endpoint) -> int:
        """The port of the listener there; one for each endpoint asked for."""
        port = self._rank_ports.get(endpoint)
        if port is None:
            sock = bind(endpoint, is_v6_only=endpoint.host == "::")  # 0.0.0.0 has its own
            port = self._rank_ports[endpoint] = sock.getsockname()[1]
            self._rank_listeners.append(self._run(self._make_listener(sock)))
        return port

    def is_self(self, cluster_id: int) -> bool:
        """Whether the id means this cluster, and no peer that happens to carry the same id."""
        if cluster_id != self.cluster_id:
            return False
        me = self._context.me.instance
        return all(session.instance == me for session in self.links.of(cluster_id))

    def pull(self, source: RemoteRow, plan: Planner, dst: Entry) -> None:
        """Reads from a peer's cache into `dst` what `plan` makes of its description.

        Returns only when all bytes have been moved from a cache that existed throughout. Raises
        LLMException; nothing arrives after it was raised.
        """

        def move(session: Session, remote: RemoteCache, row: int, deadline: Deadline) -> None:
            session.require_reach(dst)
            session.read(plan(remote, row), remote.guard, deadline)
            if not self.options.remote_accessible and remote.has_key_at(row):
                requests.use_up(session.streams, remote, row, source.tensors, deadline)

        self._with_remote(source, move)

    def push(self, target: RemoteRow, src: Guard, plan: Planner) -> None:
        """Has a peer fetch into its cache what `plan` makes of the cache's description.

        `src` guards our cache, which the caller holds. As `pull` otherwise.
        """

        def move(session: Session, remote: RemoteCache, row: int, deadline: Deadline) -> None:
            requests.send(session.streams, plan(remote, row), src, remote.guard, deadline)

        self._with_remote(target, move)

    def push_to_addresses(self, cluster_id: int, src: Guard, segments: Segments) -> None:
        """As `push`, to addresses of the peer that must lie in one of its caches."""
        deadline = Deadline.after(self.options.sync_timeout_s)
        session = self.links.find(cluster_id)
        with session.gate:
            requests.send(session.streams, segments, src, None, deadline)

    def transfer(self, send: Callable[[], Sequence[LLMStatusCode]]) -> Sequence[LLMStatusCode]:
        """A layer-wise transfer: `send` pushes the layers; a result for each destination."""
        return send()

    def copy(self, segments: Segments, src_space: str, dst_space: str) -> None:
        """Copies within this process; the spaces say in what kinds of memory the ends lie."""
        self._devices[src_space if dst_space == HOST else dst_space].copy(segments)

    def stats(self) -> ClusterStats:
        """What there is, and what was counted so far."""
        return snapshot(self._context)

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Has the loop's thread call what is quick. Takes no lock: finalizers of objects may."""
        with suppress(RuntimeError):  # the loop is closed, and nothing left to be done
            self._loop.call_soon_threadsafe(callback)

    def _with_remote(
        self, place: RemoteRow, move: Callable[[Session, RemoteCache, int, Deadline], None]
    ) -> None:
        """Looks the peer's cache up and moves; anew when it proves to be another by now.

        What was found earlier and does not fit may have been replaced by something that does.
        """
        deadline = Deadline.after(self.options.sync_timeout_s)
        session = self.links.find(place.cluster_id)
        with session.gate:
            for attempts_left in reversed(range(_ATTEMPTS)):
                found = session.lookup.find(
                    place.name, deadline, claims_are_checked=session.asks_owner
                )
                row = found.row if place.row is None else place.row
                try:
                    move(session, found.cache, row, deadline)
                except LLMException as error:
                    is_stale = isinstance(error, StaleCache) or (
                        not found.is_fresh and error.status_code in _MAYBE_STALE
                    )
                    if not is_stale or not attempts_left:
                        raise
                    session.lookup.forget()
                else:
                    return

    def _identity(self) -> lk.Identity:
        offers = {name: t.offer() for name, t in self._transports.items()}
        return lk.Identity(
            self.cluster_id,
            secrets.token_bytes(16),
            self.options.remote_accessible,
            {name: offer for name, offer in offers.items() if offer is not None},
            self.catalog.probe_target,
            self.options.path,
        )

    async def _make_listener(self, sock: socket.socket) -> Listener:
        return Listener(sock, self._context)

    async def _close_listener(self) -> None:
        if self._listener is not None:
            await self._listener.close()
        self._listener = self.listen_endpoint = None

    async def _close_links(self) -> None:
        await self._close_listener()
        await self.groups.close()
        for listener in self._rank_listeners:
            await listener.close()
        for session in self.links.all():
            await session.cut("this cluster was finalized")
            await session.join()
        await cancel_all(task for task in asyncio.all_tasks() if task is not asyncio.current_task())

    def _shut_down(self) -> None:
        """Gives back what is left when no link is: threads, pools and the loop."""
        self._waiters.shutdown(wait=True)
        self._fetchers.shutdown(wait=True)
        self._workers.shutdown(wait=True)
        self._movers.close()
        for transport in self._transports.values():
            transport.close()
        for pool in self._pools.values():
            pool.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[object, object, T]) -> T:
        """Runs a coroutine in the loop's thread, from any other."""
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result()
        except CancelledError:
            raise LLMException(
                "the cluster was finalized meanwhile", LLMStatusCode.LLM_FAILED
            ) from None


def _new_loop() -> asyncio.AbstractEventLoop:
    """Raises OSError when the system has no descriptors for it."""
    selector = selectors.DefaultSelector()
    try:
        for end in socket.socketpair():  # a loop that does not get one complains when it is dropped
            end.close()
        return asyncio.SelectorEventLoop(selector)
    except OSError:
        selector.close()
        raise


async def _gather(work: Iterable[Coroutine[object, object, T]]) -> list[T]:
    return list(await asyncio.gather(*work))
