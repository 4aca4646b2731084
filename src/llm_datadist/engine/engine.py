"""The engine: wires catalog, transports, links and the loop's thread, for one LLMDataDist."""

from __future__ import annotations

import asyncio
import secrets
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, TypeVar
from weakref import WeakValueDictionary

from llm_datadist.core import link as lk
from llm_datadist.core import messages as m
from llm_datadist.endpoint import Endpoint
from llm_datadist.engine import requests
from llm_datadist.engine.catalog import Catalog
from llm_datadist.engine.context import Context
from llm_datadist.engine.control import ConnectionEnded, dial
from llm_datadist.engine.links import Links
from llm_datadist.engine.listener import Listener, bind
from llm_datadist.engine.pools import open_pools
from llm_datadist.engine.session import Session
from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.transport.base import StaleCache, Transport
from llm_datadist.transport.cma import CmaTransport
from llm_datadist.transport.deadline import Deadline
from llm_datadist.transport.local import copy
from llm_datadist.transport.movers import Movers
from llm_datadist.transport.tcp import TcpTransport

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from llm_datadist.core.plan import Planner
    from llm_datadist.core.remote import Guard, RemoteCache, RemoteRow
    from llm_datadist.core.segments import Segments
    from llm_datadist.options import Options

T = TypeVar("T")

_WORKERS = 16
#: streams that one large transfer over TCP is spread over
_TCP_STREAMS = 2
#: a cache that is freed or re-made while it is read is looked up anew so many times
_ATTEMPTS = 3


class Target(NamedTuple):
    """A cluster to link to or to unlink, as the caller described it."""

    cluster_id: int | None
    endpoints: tuple[Endpoint, ...]


class Outcome(NamedTuple):
    """What became of one link or unlink."""

    status: LLMStatusCode
    reason: str = ""


class Engine:
    """One cluster at work. Thread-safe, but for `start` and `stop`."""

    def __init__(self, cluster_id: int, options: Options) -> None:
        self.cluster_id = cluster_id
        self.options = options
        self._pools = open_pools(options)
        self.catalog = Catalog(self._pools, peers_keep_tables=options.remote_accessible)
        self.links = Links(cluster_id)
        self._movers = Movers()
        self._workers = ThreadPoolExecutor(_WORKERS, "llm-datadist-worker")
        # apart from the workers, so that two peers that push to each other both have some to answer
        self._fetchers = ThreadPoolExecutor(_WORKERS, "llm-datadist-fetcher")
        transports: list[Transport] = [
            CmaTransport(self._movers),
            TcpTransport(self._movers, _TCP_STREAMS),
        ]
        self._transports = {transport.name: transport for transport in transports}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="llm-datadist-loop", daemon=True
        )
        self._context = Context(
            self._identity(),
            self.catalog,
            self.links,
            self._transports,
            self._loop,
            self._workers,
            self._fetchers,
            options.sync_timeout_s,
        )
        #: whose turn it is to link to an address; belongs to the loop's thread
        self._turns: WeakValueDictionary[Endpoint, asyncio.Lock] = WeakValueDictionary()
        self._listener: Listener | None = None
        self.listen_endpoint: Endpoint | None = None

    def start(self) -> None:
        """Listens, if the options say where. Raises LLMException when the address cannot be had."""
        sock = None
        if self.options.listen is not None:
            try:
                sock = bind(self.options.listen)
            except LLMException:
                self._release()
                self._loop.close()
                raise
        self._thread.start()
        if sock is not None:
            self.listen_endpoint = Endpoint(*sock.getsockname()[:2])
            self._listener = self._run(self._make_listener(sock))

    def stop(self) -> None:
        """Ends all links, lets running transfers end first, and gives everything back."""
        deadline = Deadline.after(self.options.sync_timeout_s)
        for session in self.links.all():
            session.gate.drain(max(0.0, deadline.remaining_s()))
        self.catalog.close()
        self._run(self._close_links())
        self._release()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def link(self, targets: Sequence[Target], timeout_s: float) -> list[Outcome]:
        """Links to all targets at once; each has `timeout_s`. Spec 5.4."""
        return self._run(_gather(self._link(target, timeout_s) for target in targets))

    def unlink(self, targets: Sequence[Target], timeout_s: float, *, force: bool) -> list[Outcome]:
        """Unlinks from all targets at once; `force` asks nobody. Spec 5.5."""
        work = self._cut if force else self._leave
        return self._run(_gather(work(target, timeout_s) for target in targets))

    def is_self(self, cluster_id: int) -> bool:
        """Whether the id means this cluster, and no peer that happens to carry the same id."""
        if cluster_id != self.cluster_id:
            return False
        me = self._context.me.instance
        return all(session.instance == me for session in self.links.of(cluster_id))

    def pull(self, source: RemoteRow, plan: Planner) -> None:
        """Reads from a peer's cache what `plan` makes of its description.

        Returns only when all bytes have been moved from a cache that existed throughout. Raises
        LLMException; nothing arrives after it was raised.
        """

        def move(session: Session, remote: RemoteCache, row: int, deadline: Deadline) -> None:
            session.channel.read(plan(remote, row), remote.guard, deadline)
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
        with session.gate.pass_through():
            requests.send(session.streams, segments, src, None, deadline)

    def copy(self, segments: Segments) -> None:
        """Copies within this process."""
        copy(segments, self._movers)

    def _with_remote(
        self, place: RemoteRow, move: Callable[[Session, RemoteCache, int, Deadline], None]
    ) -> None:
        """Looks the peer's cache up and moves; anew when it proves to be another by now."""
        deadline = Deadline.after(self.options.sync_timeout_s)
        session = self.links.find(place.cluster_id)
        with session.gate.pass_through():
            for attempts_left in reversed(range(_ATTEMPTS)):
                remote, row = session.lookup.find(place.name, deadline)
                try:
                    move(session, remote, row if place.row is None else place.row, deadline)
                except StaleCache:
                    session.lookup.forget()
                    if not attempts_left:
                        raise
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

    async def _make_listener(self, sock: object) -> Listener:
        return Listener(sock, self._context)  # type: ignore[arg-type]

    async def _close_links(self) -> None:
        if self._listener is not None:
            await self._listener.close()
        for session in self.links.all():
            await session.cut("this cluster was finalized")
            await session.join()

    async def _link(self, target: Target, timeout_s: float) -> Outcome:
        if len(target.endpoints) != 1:
            return Outcome(
                LLMStatusCode.LLM_PARAM_INVALID,
                f"{len(target.endpoints)} remote addresses, one is needed (append_remote_ip_info)",
            )
        deadline = Deadline.after(timeout_s)
        # one after the other: of two links to one peer, each end could keep the other one
        turn = self._turns.setdefault(target.endpoints[0], asyncio.Lock())
        try:
            await asyncio.wait_for(turn.acquire(), timeout_s)
        except asyncio.TimeoutError:
            return Outcome(LLMStatusCode.LLM_TIMEOUT, "other calls were linking to it meanwhile")
        try:
            return await self._link_in_turn(target, deadline)
        finally:
            turn.release()

    async def _link_in_turn(self, target: Target, deadline: Deadline) -> Outcome:
        endpoint = target.endpoints[0]
        try:
            control = await asyncio.wait_for(dial(*endpoint, self._workers), deadline.remaining_s())
        except asyncio.TimeoutError:
            return Outcome(LLMStatusCode.LLM_TIMEOUT, f"no connection to {endpoint} in time")
        except OSError as error:
            return Outcome(
                LLMStatusCode.LLM_LINK_FAILED, f"cannot connect to {endpoint}: {error.strerror}"
            )
        link = lk.CallerLink(self._context.me)
        session = Session(self._context, control, link, endpoint)
        left_s = max(0.001, deadline.remaining_s())
        first = link.start(is_fresh=not self._known(target), timeout_ms=max(1, int(left_s * 1000)))
        await session.greet(first, left_s)
        return Outcome(session.status, session.reason) if session.is_closed else _OK

    def _known(self, target: Target) -> bool:
        if target.cluster_id is None:
            return bool(self.links.at(target.endpoints[0]))
        return bool(self.links.of(target.cluster_id))

    async def _cut(self, target: Target, timeout_s: float) -> Outcome:
        for session in self._sessions_of(target):
            await session.cut("it was unlinked by force")
        return _OK

    async def _leave(self, target: Target, timeout_s: float) -> Outcome:
        if len(target.endpoints) != 1:
            return Outcome(
                LLMStatusCode.LLM_PARAM_INVALID,
                f"{len(target.endpoints)} remote addresses, one is needed unless force=True",
            )
        deadline = Deadline.after(timeout_s)
        sessions = self._sessions_of(target)
        for session in sessions:
            if not await self._leave_session(session, deadline):
                return Outcome(
                    LLMStatusCode.LLM_TIMEOUT,
                    f"{target.endpoints[0]} did not agree to unlink; the link is kept",
                )
        return _OK if sessions else await self._tell(target.endpoints[0], timeout_s)

    def _sessions_of(self, target: Target) -> list[Session]:
        if target.cluster_id is None:
            return self.links.at(target.endpoints[0]) if target.endpoints else []
        return self.links.of(target.cluster_id, target.endpoints[0] if target.endpoints else None)

    async def _leave_session(self, session: Session, deadline: Deadline) -> bool:
        drained = await self._loop.run_in_executor(
            self._workers, session.gate.drain, max(0.0, deadline.remaining_s())
        )
        if not drained:
            session.gate.open()
            return False
        return await session.leave(max(0.001, deadline.remaining_s()))

    async def _tell(self, endpoint: Endpoint, timeout_s: float) -> Outcome:
        """There is no link here; the peer may remember one."""
        try:
            control = await asyncio.wait_for(dial(*endpoint, self._workers), timeout_s)
        except asyncio.TimeoutError:
            return Outcome(LLMStatusCode.LLM_TIMEOUT, f"no connection to {endpoint} in time")
        except OSError as error:
            return Outcome(
                LLMStatusCode.LLM_UNLINK_FAILED, f"cannot connect to {endpoint}: {error.strerror}"
            )
        try:
            await control.send(m.Forget(self._context.me.instance))
            await asyncio.wait_for(control.receive(), timeout_s)
        except asyncio.TimeoutError:
            return Outcome(LLMStatusCode.LLM_TIMEOUT, f"{endpoint} did not answer in time")
        except ConnectionEnded as error:
            return Outcome(LLMStatusCode.LLM_UNLINK_FAILED, f"{endpoint}: {error}")
        finally:
            control.close()
        return _OK

    def _release(self) -> None:
        """What is left when no link is: threads and pools."""
        self._fetchers.shutdown(wait=True)
        self._workers.shutdown(wait=True)
        self._movers.close()
        for pool in self._pools.values():
            pool.close()

    def _run(self, work: Coroutine[object, object, T]) -> T:
        """Runs a coroutine in the loop's thread, from any other."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


_OK = Outcome(LLMStatusCode.LLM_SUCCESS)


async def _gather(work: object) -> list[Outcome]:
    return list(await asyncio.gather(*work))  # type: ignore[misc]
