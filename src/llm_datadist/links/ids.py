"""Cluster ids: whose one is.

An id belongs to whoever has it on a live link. Who comes with it meanwhile says that it is the same
cluster, and may be another: a second instance by mistake, a successor, a stranger. What it says of
itself proves nothing, since all of it was said to others before. So the one on the live link is
asked, on that link, whether the newcomer's connection is one of its own (`Vouch`), by a name that
only the ends of that connection have (core/connection_names.py):

- it is: a cluster that lost its end, or that links in the other direction, too. It is let in.
- it is not: the newcomer is refused.
- it does not answer, and stands still or has not answered for long (links/vouching.py says when):
  whoever had the id is gone. The newcomer takes over, a warning says so, and the old link is cut.
- it has not answered yet: the newcomer is refused, and may come again.

A link that has ended is no live one, so a process that was restarted gets in at once.

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

from llm_datadist.endpoint import Endpoint
from llm_datadist.links.vouching import SILENCE_S, Answer
from llm_datadist.observe.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from llm_datadist.links.control import Control
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
            if not _belongs(newcomer.certificate, live):  # whatever they would say of it
                return Verdict(_of_another_certificate(cluster_id))
            answers = await _ask(live, newcomer.control)
            if same := [other for other in live if answers[other] is Answer.OURS]:
                _warn_of_another_host(newcomer, same)
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
        is_meant = named == cluster_id and _belongs(newcomer.certificate, others)
        asked = [each for each in others if not is_meant or _is_like(each, newcomer)]
        answers = await _ask(asked, newcomer.control)
        same = [other for other in asked if answers[other] is Answer.OURS]
        gone = [
            other for other in asked if answers[other] is Answer.GONE and _is_like(other, newcomer)
        ]
        rest = [other for other in others if other not in same and other not in gone]
        for other in rest:
            if _is_at(other, newcomer):
                return Verdict(
                    f"{newcomer.endpoint} leads to two clusters: {other.cluster_id}, which is "
                    f"linked and {_state(other, answers[other])}, and {cluster_id}, which answered "
                    "now; give each an address of its own"
                )
        if not same and not is_meant:
            verdict = _judge(newcomer, cluster_id, {other: answers[other] for other in rest})
            return Verdict(verdict.objection, [*gone, *verdict.displaced])
        for other in rest if is_meant and not same else ():
            get_logger().warning(
                "two peers have the cluster id %d: that at %s, which is used from here on, and one "
                "%s", cluster_id, newcomer.endpoint, other.whereabouts,
            )  # fmt: skip
        return Verdict("", [*_replaced(newcomer, same), *gone])

    async def forgotten_by(self, control: Control, instance: bytes) -> list[Session]:
        """The links to that instance whose peer says that it has forgotten them on a connection.

        Nobody is asked in the name of a certificate that may not have their id.
        """
        certificate = control.shield.peer_certificate
        named = [each for each in self._links.with_instance(instance) if not each.is_closed]
        allowed = [each for each in named if _belongs(certificate, [each])]
        answers = await _ask(allowed, control)
        return [each for each in allowed if answers[each] is Answer.OURS]


def _judge(newcomer: Session, cluster_id: int, answers: Mapping[Session, Answer]) -> Verdict:
    """On a newcomer that is none of those who have the id."""
    for other, answer in answers.items():
        if answer is not Answer.GONE:
            return Verdict(
                f"the cluster id {cluster_id} is in use: a peer {other.whereabouts} has it, and is "
                f"{_state(other, answer)}; give each cluster an id of its own"
            )
    silent = [other for other in answers if not other.is_closed]
    if not _belongs(newcomer.certificate, silent):
        return Verdict(_of_another_certificate(cluster_id))
    for other in silent:
        get_logger().warning(
            "a newcomer takes over the cluster id %d: the peer %s did not answer within %.1f s",
            cluster_id, other.whereabouts, other.silence_s,
        )  # fmt: skip
    return Verdict("", silent)


def _state(other: Session, answer: Answer) -> str:
    """How the peer of a live link is."""
    if answer is Answer.OTHERS:
        return "alive"
    return (
        f"busy: it has not answered for {other.silence_s:.1f} s (after {SILENCE_S:.0f} s it is "
        "taken for gone, so a successor may call again)"
    )


def _live(sessions: Iterable[Session], newcomer: Session) -> list[Session]:
    return [each for each in sessions if not each.is_closed and each is not newcomer]


async def _ask(live: Sequence[Session], newcomer: Control) -> dict[Session, Answer]:
    """What the peer of each link says of a newcomer's connection."""
    answers = await asyncio.gather(*(each.vouches_for(newcomer) for each in live))
    return dict(zip(live, answers, strict=True))


def _replaced(newcomer: Session, same: Iterable[Session]) -> list[Session]:
    """The links to the very same peer that the newcomer takes the place of."""
    return [
        other
        for other in same
        if other.is_caller == newcomer.is_caller and other.group == newcomer.group
    ]


def _warn_of_another_host(newcomer: Session, same: Iterable[Session]) -> None:
    """It may have several addresses; or somebody passes on all that it says, and has one of his."""
    now = newcomer.control.at
    for other in same:
        was = other.control.at
        if isinstance(now, Endpoint) and isinstance(was, Endpoint) and now.host != was.host:
            get_logger().warning(
                "cluster %d linked anew from %s, and was at %s: it says itself that it did",
                other.cluster_id, now.host, was.host,
            )  # fmt: skip


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


def _belongs(mine: Certificate | None, others: Iterable[Session]) -> bool:
    """Whether the certificate may have their id beside those, or after them."""
    if mine is None:
        return True
    return all(
        other.cluster_id in mine.cluster_ids
        or (other.certificate is not None and other.certificate.fingerprint == mine.fingerprint)
        for other in others
    )
