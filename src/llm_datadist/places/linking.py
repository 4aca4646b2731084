"""Links of several devices: a bundle of links, one for each device, made and ended together.

Whoever links gives the bundle a name, which no other bundle has. Both ends know by it which of
their links belong together: when one of them ends, both ends cut the others, at once or, where it
was drained, when these had their time for that; and one that is not whole when the time-out of its
making is over is cut, whatever became of its maker. So there is no link with half of its devices
for longer than that.
"""

from __future__ import annotations

import asyncio
import secrets
from functools import partial
from typing import TYPE_CHECKING, Final, TypeAlias

from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.links.linker import Outcome, Target
from llm_datadist.places.catalogs import named
from llm_datadist.running.deadline import Deadline
from llm_datadist.running.loop import CannotWait, run_in_each

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Sequence

    from llm_datadist.cluster import Cluster
    from llm_datadist.links.session import Session
    from llm_datadist.links.table import LinkInfo
    from llm_datadist.peer.peer import Peer

    #: on one place, one target
    Work: TypeAlias = "Callable[[Cluster, Target, int], Coroutine[object, object, Outcome]]"

#: the others of a bundle come a little later
_MOMENT_S: Final = 1.0
#: a loop does what it is asked for a little later
_GRACE_S: Final = 3.0
_TIMEOUT: Final = LLMStatusCode.LLM_TIMEOUT
_OK: Final = LLMStatusCode.LLM_SUCCESS
_ALREADY: Final = LLMStatusCode.LLM_ALREADY_LINK


class Links:
    """The live links of several devices. Thread-safe."""

    def __init__(self, places: Sequence[Cluster]) -> None:
        self._places = places

    def find(self, cluster_id: int) -> list[Peer]:
        """The peer on each device. Raises LLMException(LLM_NOT_YET_LINK) unless each has one."""
        peers = []
        for device, place in enumerate(self._places):
            with named(device):
                peers.append(place.links.find(cluster_id))
        return peers

    def all(self) -> list[Session]:
        return [session for place in self._places for session in place.links.all()]

    def infos(self) -> list[LinkInfo]:
        """Each link of each device as users see it, those of the first device first."""
        return [info for place in self._places for info in place.links.infos()]


class Bundles:
    """Makes and ends bundles of links, and keeps them whole. Thread-safe."""

    def __init__(self, places: Sequence[Cluster], drain_s: float) -> None:
        """`places` may still be filled; `drain_s` is how long the drain of a link may take."""
        self._places = places
        self._drain_s = drain_s

    # -- for the places: in the thread of any loop --

    def made(self, session: Session) -> None:
        """The others must be there in time, too."""
        self._check_later(session, session.greeting_s + _MOMENT_S, "not all devices are linked")

    def ended(self, session: Session, reason: str) -> None:
        """So must the others. Of links that are being drained one is the first."""
        because = f"the link of another device ended: {reason}"
        if session.was_agreed:
            self._check_later(session, self._drain_s, because)
        else:
            self._cut_soon([session.bundle], because)

    def _check_later(self, session: Session, seconds: float, because: str) -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(seconds, self._check, session.bundle, because)

    def _check(self, name: bytes, because: str) -> None:
        if not all(place.holds(name) for place in self._places):
            self._cut_soon([name], because)

    # -- for callers --

    def link(self, targets: Sequence[Target], timeout_s: float) -> list[Outcome]:
        """Links device i to device i of each target; of a target that fails nothing is left."""
        names = [secrets.token_bytes(16) for _ in targets]

        def link(place: Cluster, target: Target, index: int) -> Coroutine[object, object, Outcome]:
            return place.linker.link(target, timeout_s, names[index])

        try:
            outcomes = self._for_each(targets, link, timeout_s, self._objection)
            whole = [self._whole(each, name) for each, name in zip(outcomes, names, strict=True)]
            failed = [name for name, out in zip(names, whole, strict=True) if out.status is not _OK]
            if failed:
                self._cut(failed, "not all devices could be linked")
        except BaseException:
            self._cut_soon(names, "the call that it was made for has ended")
            raise
        return whole

    def unlink(self, targets: Sequence[Target], timeout_s: float, *, force: bool) -> list[Outcome]:
        """Unlinks all devices, each with the peer's consent. What a device keeps, ends with the
        others' links, unless all of them keep theirs.
        """

        def unlink(place: Cluster, target: Target, _: int) -> Coroutine[object, object, Outcome]:
            leave = place.linker.cut if force else place.linker.leave
            return leave(target, timeout_s)

        is_lenient = force or self._places[0].options.transfer_backend is not None
        check = None if is_lenient else self._objection
        outcomes = self._for_each(targets, unlink, timeout_s, check)
        whole = [_first_failure(each) or each[0] for each in outcomes]
        halves = [
            target
            for target, each in zip(targets, outcomes, strict=True)
            if len({outcome.status is _OK for outcome in each}) > 1
        ]
        if halves:
            self._for_each(halves, lambda place, target, _: place.linker.cut(target, 0), 0)
        return whole

    def _for_each(
        self,
        targets: Sequence[Target],
        work: Work,
        timeout_s: float,
        objection_to: Callable[[Target], str | None] | None = None,
    ) -> list[list[Outcome]]:
        """What comes of each target on each device; no device of one that is objected to."""
        objections = [objection_to(target) if objection_to else None for target in targets]
        wanted = [index for index, objection in enumerate(objections) if objection is None]

        def on_place(device: int) -> Coroutine[object, object, list[Outcome]]:
            place = self._places[device]
            parts = [(_part(targets[i], device, len(self._places)), i) for i in wanted]
            return _gather(work(place, part, i) for part, i in parts)

        invalid = LLMStatusCode.LLM_PARAM_INVALID
        outcomes = [[] if text is None else [Outcome(invalid, text)] for text in objections]
        loops = [place.loop for place in self._places]
        works = [(loop, partial(on_place, i)) for i, loop in enumerate(loops)]
        try:
            found = run_in_each(works, Deadline.after(timeout_s + _GRACE_S))
        except LLMException as error:
            if not isinstance(error, CannotWait) and error.status_code is not _TIMEOUT:
                raise  # the cluster was finalized
            return [each or [Outcome(error.status_code, str(error))] for each in outcomes]
        for device in found:
            for index, outcome in zip(wanted, device, strict=True):
                outcomes[index].append(outcome)
        return outcomes

    def _objection(self, target: Target) -> str | None:
        count = len(self._places)
        if len(target.endpoints) != count:
            return (
                f"{len(target.endpoints)} remote addresses, {count} are needed: one for each device"
            )
        if target.num_local not in (0, count):
            return f"{target.num_local} local addresses for {count} devices: give each one"
        return None

    def _whole(self, outcomes: Sequence[Outcome], name: bytes) -> Outcome:
        """Of one target, from what came of it on each device."""
        statuses = {outcome.status for outcome in outcomes}
        if statuses == {_OK, _ALREADY}:
            return Outcome(
                LLMStatusCode.LLM_PROCESSING_LINK,
                "some devices are linked to it already, and not by this call: another one is at "
                "it, or their links are just ending; call again",
            )
        failure = _first_failure(outcomes)
        if failure is not None:
            return failure
        if not all(place.holds(name) for place in self._places):
            return Outcome(LLMStatusCode.LLM_LINK_FAILED, "the link of a device ended at once")
        return outcomes[0]

    def _cut(self, names: Sequence[bytes], because: str) -> None:
        """Drops the links of these bundles, so that the next call finds nothing of them."""
        try:
            cuts = [(each.loop, partial(_cut, each, names, because)) for each in self._places]
            run_in_each(cuts, Deadline.after(_GRACE_S))
        except LLMException:  # it cannot be waited for here
            self._cut_soon(names, because)

    def _cut_soon(self, names: Sequence[bytes], because: str) -> None:
        for place in self._places:
            for name in names:
                place.cut_soon(name, because)


def _part(target: Target, device: int, count: int) -> Target:
    """A target as one device sees it; without addresses it is named by its id alone."""
    endpoints = target.endpoints if len(target.endpoints) == count else ()
    return Target(target.cluster_id, endpoints[device : device + 1])


def _first_failure(outcomes: Sequence[Outcome]) -> Outcome | None:
    for device, outcome in enumerate(outcomes):
        if outcome.status is not _OK:
            where = f"device {device}: " if len(outcomes) > 1 else ""
            return Outcome(outcome.status, where + outcome.reason)
    return None


async def _cut(place: Cluster, names: Sequence[bytes], because: str) -> None:
    for name in names:
        await place.cut(name, because)


async def _gather(work: Iterable[Coroutine[object, object, Outcome]]) -> list[Outcome]:
    return list(await asyncio.gather(*work))
