"""Preparing a group: calling its members, until all are linked or the time is over. Spec 5.8.

Every member can be met and calls each of the others once at first: whoever comes second finds the
first, so nobody waits for anybody.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from llm_datadist.errors import LLMStatusCode
from llm_datadist.links.rendezvous import taken_places
from llm_datadist.observe.log import get_logger
from llm_datadist.running.deadline import Deadline
from llm_datadist.transport.same_host import SameHost

if TYPE_CHECKING:
    from llm_datadist.links.group import Group
    from llm_datadist.links.linker import Linker, Outcome
    from llm_datadist.transport.same_host import Address

_DEFAULT_TOTAL_S = 120
_CALL_S = 10.0
#: between calls to a member that is just calling us
_BUSY_S = 0.05
#: who takes longer may stand still, or be no member: the next place is called meanwhile
_PATIENCE_S = 0.5
#: … and so long with all of this host together: whoever holds many places says nothing at any
_PATIENCE_WITH_ALL_S = 1.5
#: a member that cannot be called calls the others so often
_AGAIN_S = 2.0


async def prepare(group: Group, linker: Linker) -> str:
    """Why not all members could be linked in time; empty once the group is settled."""
    plan = group.plan
    total_s = plan.total_s or _DEFAULT_TOTAL_S
    for _ in range(plan.retries):
        await _try(group, linker, Deadline.after(total_s / plan.retries))
        if group.settled.is_set():
            return ""
    return f"not all members appeared within {total_s} s: {group.absences()}"


async def _try(group: Group, linker: Linker, deadline: Deadline) -> None:
    """Calls those who are missing, and gives those who come later the rest of the time.

    Those who come later and find no way to us are called again.
    """
    while True:
        limit = Deadline.after(max(0.0, min(deadline.remaining_s(), _CALL_S)))
        await asyncio.gather(*(_call(group, each, linker, limit) for each in group.missing))
        left_s = max(0.0, deadline.remaining_s())
        with suppress(asyncio.TimeoutError):
            pause_s = min(left_s, _AGAIN_S) if group.plan.deafness else left_s
            await asyncio.wait_for(group.settled.wait(), pause_s)
        if group.settled.is_set() or deadline.remaining_s() <= 0:
            return


async def _call(group: Group, member: int, linker: Linker, deadline: Deadline) -> None:
    """Tries to reach a member that may not be there yet, in which case it will call us."""
    calls: set[asyncio.Task[None]] = set()
    try:
        places: list[Address] = [*taken_places(group.plan.name, member)]
        patience_s = min(_PATIENCE_S, _PATIENCE_WITH_ALL_S / max(1, len(places)))
        for at in (*places, *group.plan.members[member]):
            if deadline.remaining_s() <= 0 or member in group.sessions or group.settled.is_set():
                return
            call = asyncio.create_task(_call_at(group, member, at, linker, deadline))
            calls.add(call)
            timeout_s = patience_s if isinstance(at, SameHost) else _PATIENCE_S
            await asyncio.wait({call}, timeout=timeout_s)
        while calls and member not in group.sessions:
            done, calls = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            for call in done:
                call.result()
    finally:
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


async def _call_at(
    group: Group, member: int, at: Address, linker: Linker, deadline: Deadline
) -> None:
    outcome = await _call_until_answered(group, member, at, linker, deadline)
    get_logger().info("calling cluster %d at %s: %s", member, at, outcome.status)
    group.failures.setdefault(member, {})[at] = outcome.reason


async def _call_until_answered(
    group: Group, member: int, at: Address, linker: Linker, deadline: Deadline
) -> Outcome:
    while True:
        left_s = max(0.001, deadline.remaining_s())
        claim, name = partial(group.claim, member, at), group.plan.name
        try:
            # whoever else answers may be calling us: each end would keep another one of two links
            outcome = await linker.call(
                at, left_s, is_fresh=True, group=name, claim=claim, only=member
            )
        finally:
            group.calling.pop((member, at), None)
        busy = outcome.status is LLMStatusCode.LLM_PROCESSING_LINK
        if not busy or member in group.sessions or deadline.remaining_s() < _BUSY_S:
            return outcome
        await asyncio.sleep(_BUSY_S)
