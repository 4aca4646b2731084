"""Cluster ids: whose one is.

An id belongs to whoever has it on a live link. Who comes with it meanwhile says that it is the same
cluster, and may be another: a second instance by mistake, a successor, a stranger. What it says of
itself proves nothing, since all of it was said to others before. So the one on the live link is
asked, on that link, whether the newcomer's connection is one of its own (`Vouch`), and the
connection is named by the addresses of its ends, which nobody in between can have alike, and by a
nonce that was said on it alone, which nobody else knows where others can have the addresses, too:

- it is: a cluster that lost its end, or that links in the other direction, too. It is let in.
- it is not: the newcomer is refused.
- nothing comes within a second: whoever had the id is gone, or stands still. The newcomer takes
  over, a warning says so, and the old link is cut. So a restarted peer gets in.

That is asked when a link begins, to say no early, and once more when it is filed.

A call of our own to a cluster that the program named by this id is the program's word, and is done,
with a warning: the links are then told apart by address. One address, though, must not lead to two
clusters that both live.

Under TLS an id also belongs to a certificate: to those that name it, or else to the one that is on
its live link. The loop's thread only.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

from llm_datadist.links.vouching import ANSWER_S
from llm_datadist.observe.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from llm_datadist.links.session import Session
    from llm_datadist.links.table import LinkTable
    from llm_datadist.transport.certificate import Certificate

#: newcomers that come while others are asked about: more at once are too many
_ROUNDS = 3


class Verdict(NamedTuple):
    """On a newcomer: why it is refused, or which links end when its own is made."""

    objection: str = ""
    displaced: Sequence[Session] = ()


class Ids:
    """Decides whether a newcomer may use an id."""

    def __init__(self, links: LinkTable) -> None:
        self._links = links

    async def of_caller(self, newcomer: Session, cluster_id: int) -> Verdict:
        """On a cluster that calls us, and says that it has the id."""
        if objection := _name_objection(cluster_id, newcomer.certificate):
            return Verdict(objection)
        for _ in range(_ROUNDS):
            live = _live(self._links.of(cluster_id), newcomer)
            if not _belongs(newcomer, live):  # whatever they would say of it
                return Verdict(_of_another_certificate(cluster_id))
            answers = await _ask(live, newcomer)
            if same := [other for other in live if answers[other]]:
                return Verdict("", _replaced(newcomer, same))
            if set(_live(self._links.of(cluster_id), newcomer)) <= answers.keys():
                return _judge(newcomer, cluster_id, answers)
        return Verdict(f"several clusters come with the id {cluster_id} at a time")

    async def of_called(self, newcomer: Session) -> Verdict:
        """On a cluster that we called."""
        cluster_id, named = newcomer.cluster_id, newcomer.named
        if objection := _name_objection(cluster_id, newcomer.certificate):
            return Verdict(objection)
        others = [
            other
            for other in _live(self._links.all(), newcomer)
            if other.cluster_id == cluster_id or _is_at(other, newcomer)
        ]
        # by the program's word those who say that they are others need not be asked
        is_meant = named == cluster_id and _belongs(newcomer, others)
        asked = [each for each in others if not is_meant or _is_like(each, newcomer)]
        answers = {**dict.fromkeys(others), **await _ask(asked, newcomer)}
        same = [other for other in others if answers[other]]
        strange = {other: answer for other, answer in answers.items() if not answer}
        for other, answer in strange.items():
            if _is_at(other, newcomer) and answer is not None:
                return Verdict(
                    f"{newcomer.endpoint} leads to two clusters: {other.cluster_id}, which is "
                    f"linked and alive, and {cluster_id}, which answered now; give each an address "
                    "of its own"
                )
        gone = [
            other
            for other, answer in strange.items()
            if answer is None and _is_like(other, newcomer)
        ]
        rest = {other: answer for other, answer in strange.items() if other not in gone}
        if not same and not is_meant:
            verdict = _judge(newcomer, cluster_id, rest)
            return Verdict(verdict.objection, [*gone, *verdict.displaced])
        for other in rest if is_meant and not same else ():
            get_logger().warning(
                "two peers have the cluster id %d: that at %s, which is used from here on, and one "
                "%s", cluster_id, newcomer.endpoint, other.whereabouts,
            )  # fmt: skip
        return Verdict("", [*_replaced(newcomer, same), *gone])


def _judge(newcomer: Session, cluster_id: int, answers: Mapping[Session, bool | None]) -> Verdict:
    """On a newcomer that is none of those who have the id."""
    for other, answer in answers.items():
        if answer is not None:
            return Verdict(
                f"the cluster id {cluster_id} is in use: a peer {other.whereabouts} has it, and is "
                "alive; give each cluster an id of its own"
            )
    silent = [other for other in answers if not other.is_closed]
    if not _belongs(newcomer, silent):
        return Verdict(_of_another_certificate(cluster_id))
    for other in silent:
        get_logger().warning(
            "a newcomer takes over the cluster id %d: the peer %s did not answer within %.1f s",
            cluster_id, other.whereabouts, ANSWER_S,
        )  # fmt: skip
    return Verdict("", silent)


def _live(sessions: Iterable[Session], newcomer: Session) -> list[Session]:
    return [each for each in sessions if not each.is_closed and each is not newcomer]


async def _ask(live: Sequence[Session], newcomer: Session) -> dict[Session, bool | None]:
    """What the peer of each link says of the newcomer: it is itself, it is not, or nothing."""
    answers = await asyncio.gather(*(each.vouches_for(newcomer.control) for each in live))
    return dict(zip(live, answers, strict=True))


def _replaced(newcomer: Session, same: Iterable[Session]) -> list[Session]:
    """The links to the very same peer that the newcomer takes the place of."""
    return [
        other
        for other in same
        if other.is_caller == newcomer.is_caller and other.group == newcomer.group
    ]


def _is_at(other: Session, newcomer: Session) -> bool:
    return newcomer.endpoint is not None and other.endpoint == newcomer.endpoint


def _is_like(other: Session, newcomer: Session) -> bool:
    """Whether they may be one and the same: what a newcomer says of itself is no more than that."""
    return _is_at(other, newcomer) or other.instance == newcomer.instance


def _name_objection(cluster_id: int, certificate: Certificate | None) -> str:
    if certificate is None or not certificate.cluster_ids or cluster_id in certificate.cluster_ids:
        return ""
    ids = ", ".join(map(str, sorted(certificate.cluster_ids)))
    return f"the peer says that it is cluster {cluster_id}, and its certificate is for {ids}"


def _of_another_certificate(cluster_id: int) -> str:
    return (
        f"the cluster id {cluster_id} belongs to another certificate while its link lives: "
        f"name it in the certificate (URI:llm-datadist:cluster:{cluster_id})"
    )


def _belongs(newcomer: Session, others: Iterable[Session]) -> bool:
    """Whether the newcomer's certificate may have their id beside those, or after them."""
    mine = newcomer.certificate
    if mine is None:
        return True
    return all(
        other.cluster_id in mine.cluster_ids
        or (other.certificate is not None and other.certificate.fingerprint == mine.fingerprint)
        for other in others
    )
