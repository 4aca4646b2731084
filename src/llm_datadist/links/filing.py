"""Filing links: what becomes of a link that is made, and of one that ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from llm_datadist.errors import LLMStatusCode
from llm_datadist.links.ids import Verdict
from llm_datadist.observe.log import get_logger

if TYPE_CHECKING:
    from llm_datadist.links.groups import Groups
    from llm_datadist.links.ids import Ids
    from llm_datadist.links.session import Session
    from llm_datadist.links.table import LinkTable


class Siblings(Protocol):
    """Who is told of the links of a device that is one of several. In the loop's thread."""

    def made(self, session: Session) -> None:
        """A link of a bundle is filed."""
        ...

    def ended(self, session: Session, reason: str) -> None:
        """A link of a bundle has ended."""
        ...


class Filing:
    """The Registrar of a cluster's sessions. Belongs to the loop's thread."""

    def __init__(
        self,
        cluster_id: int,
        instance: bytes,
        links: LinkTable,
        groups: Groups,
        ids: Ids,
        siblings: Siblings | None = None,
    ) -> None:
        self._cluster_id = cluster_id
        self._instance = instance
        self._links = links
        self._groups = groups
        self._ids = ids
        #: why no link is made now; empty when links are
        self.shut_because = ""
        self._siblings = siblings

    async def linked(self, session: Session) -> None:
        """Files the link; one of a rank table waits for the others of its group."""
        if not session.is_caller and session.is_with_ourselves:
            session.report()  # the answering end of a link to ourselves is not one to use
            return
        if session.is_caller:
            verdict = await self._ids.of_called(session)
        elif session.instance == self._instance:
            verdict = Verdict("the peer says that it is this very cluster, and is another")
        else:
            verdict = await self._ids.of_caller(session, session.cluster_id)
        objection = verdict.objection or self.shut_because
        if objection:
            await session.refuse(LLMStatusCode.LLM_LINK_FAILED, objection)
            return
        if session.is_closed:
            return
        session.displaced = verdict.displaced
        if session.group:
            await self._groups.join(session)
            return
        self._links.add(session)
        if session.bundle and self._siblings is not None:
            self._siblings.made(session)
        for stale in session.displaced:
            await stale.cut(f"cluster {session.cluster_id} linked anew")
        session.report()

    def retracted(self, session: Session, reason: str) -> None:
        """Operations do not find the link any more."""
        self._links.remove(session, reason)

    def ended(self, session: Session, reason: str) -> None:
        """As `retracted`, and says so."""
        self._links.remove(session, reason)
        self._groups.leave(session)
        get_logger().info(
            "the link of cluster %d to cluster %d ended: %s",
            self._cluster_id, session.cluster_id, reason,
        )  # fmt: skip
        if session.bundle and self._siblings is not None:
            self._siblings.ended(session, reason)
