"""A cluster's place in a fleet: what it says of itself, and who follows the others for it.

What follows takes a fifth of what `init` does: it is imported by the first cluster that wants it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from llm_datadist.core.messages import PROTOCOL_VERSION
from llm_datadist.endpoint import Endpoint
from llm_datadist.errors import invalid

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from llm_datadist.core.stats import FleetStats
    from llm_datadist.directory.base import Directory
    from llm_datadist.directory.record import Record
    from llm_datadist.following.follower import Follower
    from llm_datadist.following.wants import Wants
    from llm_datadist.links.filing import Filing
    from llm_datadist.links.linker import Linker
    from llm_datadist.links.listening import Listening
    from llm_datadist.links.table import LinkTable
    from llm_datadist.options import Options
    from llm_datadist.running.deadline import Deadline
    from llm_datadist.running.loop import Loop
    from llm_datadist.running.threads import Errands
    from llm_datadist.types import LLMRole

_EVERY_ADDRESS: Final = ("0.0.0.0", "::")


class Membership:
    """Of one cluster. Thread-safe."""

    def __init__(
        self,
        cluster_id: int,
        incarnation: str,
        options: Options,
        loop: Loop,
        errands: Errands,
        listening: Listening,
        linker: Linker,
        filing: Filing,
        links: LinkTable,
    ) -> None:
        self._cluster_id = cluster_id
        self._incarnation = incarnation
        self._options = options
        self._loop = loop
        self._errands = errands
        self._listening = listening
        self._linker = linker
        self._filing = filing
        self._links = links
        #: a stopped one is kept until the next
        self._follower: Follower | None = None

    @property
    def follower(self) -> Follower | None:
        """What follows a fleet now."""
        follower = self._follower
        return None if follower is None or follower.is_stopped else follower

    def follow(
        self,
        directory: Directory,
        wants: Wants | None,
        ttl_s: float,
        facts: Mapping[str, str],
        make_record: Callable[[], Record],
    ) -> Follower:
        """Announces us in a directory, and links to whom we want of those who are there.

        Raises LLMException: LLM_PARAM_INVALID while we follow one, LLM_FAILED for want of threads.
        """
        from llm_datadist.following.follower import Follower

        follower = Follower(
            directory,
            wants,
            ttl_s,
            facts,
            self._loop,
            self._linker,
            self._filing,
            self._links,
            self._cluster_id,
            self._options.sync_timeout_s,
        )
        return self._errands.run(lambda: self._begin(follower, make_record), Follower.stop)

    def _begin(self, follower: Follower, make_record: Callable[[], Record]) -> Follower:
        if self.follower is not None:
            raise invalid("this cluster follows a fleet already: stop that first")
        self._follower = follower
        follower.begin(make_record)
        return follower

    @property
    def facts(self) -> dict[str, str]:
        """What the library itself needs to be equal at two ends of a link."""
        return {
            "protocol": str(PROTOCOL_VERSION),
            "remote accessible": str(self._options.remote_accessible),
        }

    def record(
        self, role: LLMRole, where: str, facts: Mapping[str, str], labels: Mapping[str, str]
    ) -> Record:
        """What we say of ourselves now. Raises LLMException(LLM_PARAM_INVALID), ValueError."""
        from llm_datadist.directory.record import Record

        listen = self._listening.endpoint
        at, reached = "" if listen is None else str(listen), _advertised(where, listen)
        return Record(
            cluster_id=self._cluster_id,
            incarnation=self._incarnation,
            role=role.name,
            listen=at,
            advertised="" if reached == at else reached,
            facts=dict(facts),
            labels=dict(labels),
        )

    def stats(self, most_members: int | None) -> FleetStats | None:
        """None where no fleet is followed."""
        follower = self.follower
        return None if follower is None else follower.stats(most_members)

    def begin_end(self) -> None:
        """Says that we leave, and waits for nothing."""
        if self._follower is not None:
            self._follower.begin_end()

    def end(self, deadline: Deadline) -> None:
        """Behind `begin_end`. Raises LLMException(LLM_TIMEOUT)."""
        if self._follower is not None:
            self._follower.end(deadline)


def _advertised(text: str, listen: Endpoint | None) -> str:
    """Where others reach a cluster that listens there, as `host:port`; empty when it does not.

    Raises LLMException (LLM_PARAM_INVALID) where nobody could tell.
    """
    if listen is None:
        return ""
    if not text:
        if listen.host in _EVERY_ADDRESS:
            raise invalid(
                f"this cluster listens on {listen}, which is every address: say by which one "
                "others reach it (advertised)"
            )
        return str(listen)
    if _has_port(text):
        return str(Endpoint.parse(text, "advertised"))
    return str(Endpoint(text.strip("[]"), listen.port))


def _has_port(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return port.isdigit() and (":" not in host or host.endswith("]"))
