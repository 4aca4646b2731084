"""A follower: what the program has of a fleet that it is in."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from llm_datadist.core.stats import FleetStats, MemberStats
from llm_datadist.errors import LLMException
from llm_datadist.following.announcing import Announcer, longest_pause_s
from llm_datadist.following.driver import Driver
from llm_datadist.following.watching import Watcher
from llm_datadist.locks import holds_lock
from llm_datadist.observe.log import get_logger
from llm_datadist.running import forks
from llm_datadist.running.deadline import Deadline
from llm_datadist.running.threads import start_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from llm_datadist.directory.base import Changes, Directory
    from llm_datadist.directory.record import Record
    from llm_datadist.following.wants import Wants
    from llm_datadist.links.filing import Filing
    from llm_datadist.links.linker import Linker
    from llm_datadist.links.table import LinkTable
    from llm_datadist.running.loop import Loop

_STOP_S: Final = 2.0
#: what a directory has to be told that we leave for a while, and peers to agree to be unlinked
_LAST_WORD_S: Final = 1.0
_AGREE_S: Final = 1.0


class MemberInfo(NamedTuple):
    """A member of the fleet, as this cluster sees it."""

    record: Record
    #: "linked", "linking", "retries" (after a pause), "known" (would be linked), "unfit"
    state: str
    reason: str  #: why it is not linked; empty when there is no trouble


class Follower:
    """A cluster's place in a fleet. Made by `LLMDataDist.follow`. Thread-safe.

    An addition to the reference.
    """

    def __init__(
        self,
        directory: Directory,
        wants: Wants | None,
        ttl_s: float,
        facts: Mapping[str, str],
        loop: Loop,
        linker: Linker,
        filing: Filing,
        links: LinkTable,
        cluster_id: int,
        sync_timeout_s: float,
    ) -> None:
        self._directory = directory
        self._loop = loop
        self._pid = os.getpid()
        self._driver = Driver(loop, linker, filing, links, cluster_id, wants, facts, sync_timeout_s)
        self._announcer = Announcer(directory, ttl_s, self._superseded)
        self._watcher = Watcher(
            directory, self._heard, self._announcer.wait_for_attempt, longest_pause_s(ttl_s)
        )
        #: what `say` tells, as the role and the listener are
        self._make_record: Callable[[], Record] | None = None
        self.is_stopped = False

    def begin(self, make_record: Callable[[], Record]) -> None:
        """Announces and watches from here on. `stop` must follow, also when it raises.

        Raises LLMException(LLM_FAILED) when the system gives no threads.
        """
        self._make_record = make_record
        self._announcer.say(make_record())
        self._loop.call_soon(self._driver.begin)
        begun = 0
        try:
            for each in (self._announcer, self._watcher):
                start_thread(each.run, f"llm-datadist-{type(each).__name__.lower()}")
                begun += 1
        except BaseException:
            for each in (self._announcer, self._watcher)[begun:]:
                each.give_up()
            self.begin_end()
            raise

    @property
    def record(self) -> Record:
        """What this cluster says of itself now. Raises LLMException, as `LLMDataDist.follow`."""
        self._require_here()
        assert self._make_record is not None  # it has begun
        return self._make_record()

    def members(self) -> list[MemberInfo]:
        """Everybody who is announced, but this cluster."""
        self._require_here()
        return [
            MemberInfo(member.record, member.state, member.objection or member.problem)
            for member in list(self._driver.plan.members.values())
        ]

    def wait_for(self, cluster_id: int, timeout_s: float) -> bool:
        """Waits until that cluster is linked, as the directory has it; False when it is not.

        It counts as asked for: with `at_once=False` it is linked now, if it is announced.
        """
        self._require_here()
        if holds_lock():
            return self._is_linked(cluster_id)
        self._driver.missing(cluster_id)
        return self._driver.bell.wait_until(lambda: self._is_asked(cluster_id), timeout_s)

    def find(self, cluster_id: int, timeout_s: float = 0.0) -> Record | None:
        """Who is announced under that id, as soon as somebody is; None when nobody is in time.

        It does not count as asked for: no link is made for it.
        """
        self._require_here()
        members = self._driver.plan.members
        if not holds_lock():
            self._driver.bell.wait_until(
                lambda: cluster_id in members or self.is_stopped, timeout_s
            )
        member = members.get(cluster_id)
        return None if member is None else member.record

    def say(self) -> None:
        """Announces what this cluster is now, where its role or address has changed.

        Where nobody can tell by which address it is reached by now, nobody is told one.
        """
        self._require_here()
        assert self._make_record is not None  # it has begun
        record = None
        try:
            record = self._make_record()
        except (LLMException, ValueError) as error:
            get_logger().error("this cluster leaves its fleet: %s", error)
        self._announcer.say(record)

    def stand_down(self, sync_timeout_s: float) -> None:
        """Leaves the fleet for a while, and unlinks from everybody; `stand_up` follows.

        Calls that run have `sync_timeout_s` to end, and peers a second more to agree; then they are
        cut. Raises LLMException(LLM_FAILED) where this thread cannot wait.
        """
        self._require_here()
        self._announcer.say(None)
        self._announcer.wait_until_said(_LAST_WORD_S)
        agree_s = sync_timeout_s + _AGREE_S
        self._loop.run(
            partial(self._driver.stand_down, agree_s), Deadline.after(agree_s + _AGREE_S)
        )

    def stand_up(self) -> None:
        """The end of `stand_down`."""
        self.say()
        self._loop.call_soon(self._driver.stand_up)

    def stop(self) -> None:
        """Says that this cluster has left, and follows no more.

        No link is ended from here; peers that follow the fleet end theirs, in order.
        Waits at most 2 s for a directory that does not answer. May be called again.
        """
        self._require_here()
        self.begin_end()
        try:
            self.end(Deadline.after(_STOP_S))
        except LLMException:
            return  # its threads end when the directory answers

    def begin_end(self) -> None:
        """Says that we leave, and waits for nothing; in a child nothing. May be called again."""
        if os.getpid() != self._pid:
            return  # the parent's threads would hear of it
        self.is_stopped = True
        self._loop.call_soon(self._driver.stop)  # first: what the last word meets ends no link
        self._announcer.stop()
        self._watcher.stop()
        self._driver.bell.ring()

    def end(self, deadline: Deadline) -> None:
        """Behind `begin_end`: waits for the threads. Raises LLMException(LLM_TIMEOUT)."""
        self.begin_end()
        self._announcer.join(deadline)
        self._watcher.join(deadline)

    def stats(self, most: int | None = None) -> FleetStats:
        """How it is, for `LLMDataDist.stats`; with so many members, or all."""
        driver, members = self._driver, self.members()
        return FleetStats(
            directory=str(self._directory)[:1024],
            problem=(self._watcher.problem or self._announcer.problem)[:1024],
            is_announced=self._announcer.is_announced,
            num_members=len(members),
            num_fitting=sum(each.state != "unfit" for each in members),
            num_linked=sum(each.state == "linked" for each in members),
            joined=driver.num_joined,
            left=driver.num_left,
            changed=driver.num_changed,
            links_made=driver.num_linked,
            links_failed=driver.num_failed,
            members=tuple(map(_member, members[:most])),
        )

    def _superseded(self, is_so: bool) -> None:
        self._loop.call_soon(partial(self._driver.superseded, is_so))

    def _heard(self, changes: Changes) -> None:
        self._loop.call_soon(partial(self._driver.told, changes))

    def _is_linked(self, cluster_id: int) -> bool:
        member = self._driver.plan.members.get(cluster_id)
        return member is not None and member.is_linked

    def _is_asked(self, cluster_id: int) -> bool:
        return self._is_linked(cluster_id) or self.is_stopped

    def _require_here(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError(f"this process follows no fleet: {forks.FORKED}")


def _member(info: MemberInfo) -> MemberStats:
    record = info.record
    return MemberStats(
        record.cluster_id, record.role, record.incarnation, str(record.endpoint or ""), info.state,
        info.reason[:500],
    )  # fmt: skip
