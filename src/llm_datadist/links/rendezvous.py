"""The rendezvous: how members of a rank-table link on one host find each other. Spec 12.3.

Each member listens at a meeting point whose name follows from the link's and from its cluster id,
and then calls at the names of the others. Whoever comes second finds the first: nobody watches or
polls. Such a name is no file (`transport/same_host.py`): it needs no directory that members of
several users, services or containers would share, it ends with its process, and it is seen in one
network namespace alone.

Who is there the name does not say: another job can have the same, a process that stands still, or
somebody who guessed it. So each name stands for some places, of which a member takes the first that
is free; who calls looks at all of them, and the hand-shake tells who is the right one.

Rejected: files that say a port, which cannot be shared by all and outlive their process; names that
nobody can guess, listed by /proc, which a container may not have.
"""

from __future__ import annotations

import errno
import hashlib
from contextlib import suppress
from typing import TYPE_CHECKING

from llm_datadist.core.rank_table import link_of
from llm_datadist.observe.log import get_logger
from llm_datadist.transport.same_host import SameHost

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

#: so many processes of one host can be the same member of links of the same name
PLACES = 32
_ID_NBYTES = 16


def take_place(group: str, cluster_id: int) -> socket.socket | None:
    """A listening socket where members on this host look for this one; None if none is to be had.

    The log says why: members that can call each other by TCP do without.
    """
    reason = f"all {PLACES} places of that name are taken"
    for point in _places(group, cluster_id):
        try:
            return point.listen()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                reason = error.strerror or str(error)
                break
    get_logger().warning(
        "cluster %d cannot be met on this host by its rank table: %s", cluster_id, reason
    )
    return None


def taken_places(group: str, cluster_id: int) -> list[SameHost]:
    """Where somebody listens on this host who may be that member."""
    with suppress(OSError):
        return [point for point in _places(group, cluster_id) if point.is_taken()]
    return []


def _places(group: str, cluster_id: int) -> Iterator[SameHost]:
    for number in range(PLACES):
        text = f"{link_of(group)} {cluster_id} {number}"
        yield SameHost(hashlib.sha256(text.encode()).digest()[:_ID_NBYTES], is_meeting_point=True)
