"""Cluster ids: whose one is.

An id belongs to whoever has it on a live link. Who comes with it meanwhile says that it is the same
cluster, and may be another: a second instance by mistake, a successor, a stranger. So the one on
the live link is asked, on that link, whether the call is its own (`Vouch`):

- it is: a cluster that lost its end, or that links in the other direction, too. It is let in.
- it is not: the newcomer is refused.
- nothing comes within a second: whoever had the id is gone, or stands still. The newcomer takes
  over, a warning says so, and the old link is cut. So a restarted peer gets in.

A call of our own to a cluster that the program named by this id is the program's word, and is done,
with a warning: the links are then told apart by address. One address, though, must not lead to two
clusters that both live.

Under TLS an id also belongs to a certificate: to those that name it, or else to the one that is on
its live link. The loop's thread only.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

from llm_datadist.observe.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from llm_datadist.links.session import Session
    from llm_datadist.links.table import LinkTable
    from llm_datadist.transport.certificate import Certificate

#: a cluster that takes longer to say that it is there is taken for gone
_ANSWER_S = 1.0


class Verdict(NamedTuple):
    """On a newcomer: why it is refused, or which links end when its own is made."""

    objection: str = ""
    displaced: Sequence[Session] = ()


class Ids:
    """Decides whether a newcomer may use an id."""

    def __init__(self, links: LinkTable) -> None:
        self._links = links

    async def of_caller(
        self, cluster_id: int, call: bytes, certificate: Certificate | None, timeout_s: float
    ) -> Verdict:
        """On a cluster that calls us by this call, and says that it has the id."""
        live = _live(self._links.of(cluster_id))
        objection = _name_objection(cluster_id, certificate)
        if objection or not live:
            return Verdict(objection)
        answers = await _ask(live, call, timeout_s)
        if True in answers:
            return Verdict()
        return self._judge(cluster_id, live, answers, certificate)

    async def of_called(self, session: Session, named: int | None, timeout_s: float) -> Verdict:
        """On a cluster that we called; `named` is the id by which the program did."""
        cluster_id, certificate = session.cluster_id, session.certificate
        others = [each for each in _live(self._links.all()) if each.instance != session.instance]
        at = session.endpoint
        at_address = [other for other in others if at is not None and other.endpoint == at]
        with_id = [o for o in others if o.cluster_id == cluster_id and o not in at_address]
        objection = _name_objection(cluster_id, certificate)
        if objection or not (at_address or with_id):
            return Verdict(objection)
        for other, answer in zip(at_address, await _ask(at_address, b"", timeout_s), strict=True):
            if answer is not None:
                return Verdict(
                    f"{session.endpoint} leads to two clusters: {other.cluster_id}, which is "
                    f"linked and alive, and {cluster_id}, which answered now; give each an address "
                    "of its own"
                )
        if named != cluster_id or not _belongs(certificate, with_id, cluster_id):
            return self._judge(
                cluster_id, with_id, await _ask(with_id, b"", timeout_s), certificate
            )
        for other in with_id:
            get_logger().warning(
                "two peers have the cluster id %d: that at %s, which is used from here on, and one "
                "%s", cluster_id, session.endpoint, other.whereabouts,
            )  # fmt: skip
        return Verdict()

    def _judge(
        self,
        cluster_id: int,
        live: Sequence[Session],
        answers: Iterable[bool | None],
        certificate: Certificate | None,
    ) -> Verdict:
        """On a newcomer whose call is not the call of those who have the id."""
        for other, answer in zip(live, answers, strict=True):
            if answer is not None:
                return Verdict(
                    f"the cluster id {cluster_id} is in use: a peer {other.whereabouts} has it, "
                    "and is alive; give each cluster an id of its own"
                )
        silent = [other for other in live if not other.is_closed]
        if not _belongs(certificate, silent, cluster_id):
            return Verdict(
                f"the cluster id {cluster_id} belongs to another certificate while its link lives: "
                f"name it in the certificate (URI:llm-datadist:cluster:{cluster_id})"
            )
        for other in silent:
            get_logger().warning(
                "a newcomer takes over the cluster id %d: the peer %s did not answer within %.1f s",
                cluster_id, other.whereabouts, _ANSWER_S,
            )  # fmt: skip
        return Verdict("", silent)


def _live(sessions: Iterable[Session]) -> list[Session]:
    return [session for session in sessions if not session.is_closed]


async def _ask(live: Sequence[Session], call: bytes, timeout_s: float) -> list[bool | None]:
    """What each says of the call: its own, not its own, or nothing."""
    limit_s = min(_ANSWER_S, timeout_s / 2)
    return await asyncio.gather(*(session.vouches_for(call, limit_s) for session in live))


def _name_objection(cluster_id: int, certificate: Certificate | None) -> str:
    if certificate is None or not certificate.cluster_ids or cluster_id in certificate.cluster_ids:
        return ""
    ids = ", ".join(map(str, sorted(certificate.cluster_ids)))
    return f"the peer says that it is cluster {cluster_id}, and its certificate is for {ids}"


def _belongs(certificate: Certificate | None, others: Iterable[Session], cluster_id: int) -> bool:
    """Whether the certificate may have the id beside those, or after them."""
    if certificate is None or cluster_id in certificate.cluster_ids:
        return True
    return all(
        other.certificate is not None and other.certificate.fingerprint == certificate.fingerprint
        for other in others
    )
