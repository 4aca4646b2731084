"""Linking and unlinking: what is done about one target, in the cluster's loop. Spec 5.4, 5.5."""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
from functools import partial
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakValueDictionary

import msgspec

from llm_datadist.core import link as lk
from llm_datadist.core import link_actions as act
from llm_datadist.core import messages as m
from llm_datadist.endpoint import LACKS_ZONE, Endpoint
from llm_datadist.errors import LLMStatusCode
from llm_datadist.links.control import AnotherUser, ConnectionEnded, Control, Unwelcome, dial
from llm_datadist.links.session import Session
from llm_datadist.observe.log import get_logger
from llm_datadist.running.deadline import Deadline
from llm_datadist.transport.base import PathUnavailable
from llm_datadist.transport.same_host import SameHost

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llm_datadist.links.context import Context
    from llm_datadist.links.session import Registrar
    from llm_datadist.links.table import LinkTable
    from llm_datadist.transport.same_host import Address, Process


class Target(NamedTuple):
    """A cluster to link to or to unlink, as the caller described it."""

    cluster_id: int | None
    endpoints: tuple[Endpoint, ...]
    #: addresses of ours that came with it
    num_local: int = 0


class Call(NamedTuple):
    """A call to a cluster, which makes a link there."""

    at: Address
    #: the id by which the program calls it
    named: int | None
    is_fresh: bool
    group: str
    #: names the links of several devices that are made together
    bundle: bytes = b""
    #: nobody else is linked to; None: whoever answers
    only: int | None = None
    #: where the connection leads, whatever name was called
    reached: tuple[str, int] | None = None


class Outcome(NamedTuple):
    """What became of one link or unlink."""

    status: LLMStatusCode
    reason: str = ""


_OK = Outcome(LLMStatusCode.LLM_SUCCESS)
#: failures to connect that have nothing to do with the peer
_OURS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
#: of the time of a call: whoever is at its peer's same-host socket shows in it that it is the peer
_MEETING_SHARE = 0.5
_REMEDY = (
    "; the peer must listen there and this end be able to reach it (routes, firewalls). Where only "
    "the peer can reach this end, let the peer call: one direction is enough"
)


class Linker:
    """Makes and ends links. Belongs to the loop's thread."""

    def __init__(self, context: Context, links: LinkTable, registrar: Registrar) -> None:
        self._context = context
        self._links = links
        self._registrar = registrar
        #: whose turn it is to link to an address
        self._turns: WeakValueDictionary[Endpoint, asyncio.Lock] = WeakValueDictionary()

    async def link(
        self,
        target: Target,
        timeout_s: float,
        bundle: bytes = b"",
        *,
        expected: bytes = b"",
    ) -> Outcome:
        """Links to the target; to that instance of it alone, where one is `expected`."""
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
            left_s = max(0.001, deadline.remaining_s())
            is_fresh = not self._known(target)
            return await self.call(
                target.endpoints[0],
                left_s,
                is_fresh=is_fresh,
                named=target.cluster_id,
                bundle=bundle,
                expected=expected,
                only=target.cluster_id if expected else None,
            )
        finally:
            turn.release()

    async def call(
        self,
        at: Address,
        timeout_s: float,
        *,
        is_fresh: bool,
        named: int | None = None,
        group: str = "",
        bundle: bytes = b"",
        claim: Callable[[Process | None], str] | None = None,
        expected: bytes = b"",
        only: int | None = None,
    ) -> Outcome:
        """Links to whoever listens there; `is_fresh` when no link to it is known here.

        `named` is the id that the program expects there; another one is linked, too, and said.
        Nobody but the instance that is `expected` and the cluster that is `only` to answer is
        linked to. Once it is reached `claim` may say why the call is to end there, as
        LLM_PROCESSING_LINK.
        """
        deadline = Deadline.after(timeout_s)
        control, outcome = await self._connect(at, timeout_s, LLMStatusCode.LLM_LINK_FAILED)
        if control is None:
            return outcome
        if claim is not None and (objection := claim(control.process)):
            control.close()
            return Outcome(LLMStatusCode.LLM_PROCESSING_LINK, objection)
        reached = control.reached
        if named is None and not group and self._is_linked_at(reached):
            is_fresh = False  # by another name: whoever has our link says that it does
        call = Call(at, named, is_fresh, group, bundle, only, reached)
        session, first, left_s = self._begin(control, call, deadline, expected)
        await session.greet(first, left_s)
        if session.is_closed and session.status is not LLMStatusCode.LLM_SUCCESS:
            return Outcome(session.status, session.reason)
        if named not in (None, session.cluster_id):
            get_logger().warning(
                "cluster %d answers at %s, and not cluster %d: the link has its own id",
                session.cluster_id, at, named,
            )  # fmt: skip
        return _OK

    def _begin(
        self, control: Control, call: Call, deadline: Deadline, expected: bytes = b""
    ) -> tuple[Session, Sequence[act.Action], float]:
        """A session, with what its hand-shake begins with, and how long that may take."""
        link = lk.CallerLink(
            self._context.me, control.is_same_host, expected=expected, only=call.only
        )
        endpoint = None if isinstance(call.at, SameHost) else call.at
        session = Session(
            self._context, self._registrar, control, link, endpoint, call.group, call.named,
            call.bundle,
        )  # fmt: skip
        session.reached = call.reached
        session.meeting = partial(self._meet, session, call)
        left_s = max(0.001, deadline.remaining_s())
        first = link.start(
            secrets.token_bytes(16),
            is_fresh=call.is_fresh,
            timeout_ms=max(1, int(left_s * 1000)),
            group=call.group,
            bundle=call.bundle,
        )
        return session, first, left_s

    async def _meet(self, first: Session, call: Call, offer: bytes, deadline: Deadline) -> Session:
        """Links to the peer of a first session over its same-host socket.

        Whoever is there may be anybody until it has answered as that peer: it has a share of the
        time for that, and what it says before means no more than that there is no such path. Raises
        PathUnavailable.
        """
        try:
            at, is_here = SameHost.offered(offer)
        except (ValueError, msgspec.DecodeError, RecursionError) as error:
            raise PathUnavailable(f"the peer's offer cannot be read: {error}") from error
        if is_here is False:
            raise PathUnavailable("the peer is on another host", is_remarkable=False)
        share = Deadline.after(_MEETING_SHARE * max(0.001, deadline.remaining_s()))
        control = await self._reach(at, is_here, share.remaining_s())
        session, begin, left_s = self._begin(control, call, deadline, first.instance)
        impatience = self._context.loop.call_later(
            max(0.0, share.remaining_s()), session.give_up_unless_answered
        )
        try:
            await session.greet(begin, left_s)
        finally:
            impatience.cancel()
        no_way = LLMStatusCode.LLM_LINK_FAILED, LLMStatusCode.LLM_FAILED
        has_failed = session.is_closed and (not session.has_answered or session.status in no_way)
        if not has_failed:  # closed by now as: unlinked meanwhile
            return session
        if session.rejected:
            _, reason, is_remarkable = session.rejected[-1]
            raise PathUnavailable(reason, is_remarkable=is_remarkable)
        raise PathUnavailable(session.reason)

    async def _reach(self, at: SameHost, is_here: bool | None, left_s: float) -> Control:
        """A connection to a same-host socket. Raises PathUnavailable."""
        shield = self._context.shields.make(is_caller=True)
        try:
            return await dial(at, self._context.waiters, shield, left_s)
        except asyncio.TimeoutError:
            raise PathUnavailable(f"{at} did not answer") from None
        except ConnectionRefusedError:
            if is_here is None:
                raise PathUnavailable(
                    "the peer is on another host, or in another network namespace: one of the ends "
                    "has no /proc/sys/kernel/random/boot_id to tell by", is_remarkable=False,
                ) from None  # fmt: skip
            raise PathUnavailable(
                "the peer is in another network namespace: let the containers share one (--network)"
            ) from None
        except AnotherUser as error:
            raise PathUnavailable(str(error)) from error
        except (OSError, Unwelcome) as error:
            raise PathUnavailable(f"{at}: {error}") from error

    async def cut(self, target: Target, timeout_s: float) -> Outcome:
        """Drops the links to a target without asking anybody."""
        for session in self._sessions_of(target):
            await session.cut("it was unlinked by force")
        return _OK

    async def leave(self, target: Target, timeout_s: float) -> Outcome:
        is_one_way = self._context.is_one_way
        if len(target.endpoints) != 1 and not is_one_way:
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
                    f"cluster {session.cluster_id} did not agree to unlink; the link is kept",
                )
        if sessions or is_one_way:
            return _OK
        return await self._tell(target.endpoints[0], timeout_s)

    def _sessions_of(self, target: Target) -> list[Session]:
        links, endpoint = self._links, target.endpoints[0] if target.endpoints else None
        if target.cluster_id is None:
            return [] if endpoint is None else links.at(endpoint)
        return self.ours(links.of(target.cluster_id, endpoint))

    def _known(self, target: Target) -> bool:
        """Whether the target is linked; not, if that was called at another address.

        Then the program has a reason to call this one: a network of the host may be dead.
        """
        links, endpoint = self._links, target.endpoints[0]
        if target.cluster_id is None:
            return bool(links.at(endpoint))
        ours = self.ours(links.of(target.cluster_id))
        return any(not _differ(session.endpoint, endpoint) for session in ours)

    def _is_linked_at(self, reached: tuple[str, int] | None) -> bool:
        """Whether a link was made where a connection leads."""
        sessions = self.ours(self._links.all())
        return reached is not None and any(each.reached == reached for each in sessions)

    def ours(self, sessions: list[Session]) -> list[Session]:
        """Without those that a peer called for, where such a link is the peer's alone."""
        return [
            session for session in sessions if session.is_caller or not self._context.is_one_way
        ]

    async def end(self, session: Session, timeout_s: float) -> bool:
        """Unlinks one session, once its calls have ended; whether it has ended, else it is kept."""
        return await self._leave_session(session, Deadline.after(timeout_s))

    async def _leave_session(self, session: Session, deadline: Deadline) -> bool:
        """Whether the link has ended; else it is kept, also when this is cancelled."""
        has_left = False
        try:
            if await session.drain(max(0.0, deadline.remaining_s())):
                has_left = await session.leave(max(0.001, deadline.remaining_s()))
        finally:
            if not has_left and not session.is_closed:
                session.stay()
        return session.is_closed

    async def _tell(self, endpoint: Endpoint, timeout_s: float) -> Outcome:
        """There is no link here; the peer may remember one."""
        deadline = Deadline.after(timeout_s)
        control, outcome = await self._connect(endpoint, timeout_s, LLMStatusCode.LLM_UNLINK_FAILED)
        if control is None:
            return outcome
        forget = m.Forget(self._context.me.instance, secrets.token_bytes(16))
        control.begun(forget)
        self._context.called.add(control.name)
        try:
            await control.send(forget)
            await asyncio.wait_for(control.receive(), deadline.remaining_s())
        except asyncio.TimeoutError:
            return Outcome(LLMStatusCode.LLM_TIMEOUT, f"{endpoint} did not answer in time")
        except ConnectionEnded as error:
            return Outcome(LLMStatusCode.LLM_UNLINK_FAILED, f"{endpoint}: {error}")
        finally:
            self._context.called.discard(control.name)
            control.close()
        return _OK

    async def _connect(
        self, at: Address, timeout_s: float, failure: LLMStatusCode
    ) -> tuple[Control | None, Outcome]:
        try:
            over_tcp = isinstance(at, Endpoint)
            shield = self._context.shields.make(is_caller=True, over_tcp=over_tcp)
            return await dial(at, self._context.waiters, shield, timeout_s), _OK
        except asyncio.TimeoutError:
            reason = f"no connection to {at} within {timeout_s:.3f} s{_REMEDY}"
            return None, Outcome(LLMStatusCode.LLM_TIMEOUT, reason)
        except Unwelcome as error:
            return None, Outcome(failure, f"{at}: {error}")
        except OSError as error:
            remedy = "" if error.errno in _OURS else _REMEDY
            if isinstance(at, Endpoint) and at.lacks_zone:
                remedy = f"; {LACKS_ZONE}"
            reason = f"cannot connect to {at}: {_explain(error)}{remedy}"
            return None, Outcome(failure, reason)


def _differ(at: Endpoint | None, other: Endpoint) -> bool:
    """Whether these are two addresses; names may stand for the same."""
    return at is not None and at != other and at.is_literal and other.is_literal


def _explain(error: OSError) -> str:
    """The system's own words, of which asyncio's connections know only the number."""
    if error.errno is None or error.errno < 0:  # it comes from the look-up of a name
        return error.strerror or str(error)
    return os.strerror(error.errno)
