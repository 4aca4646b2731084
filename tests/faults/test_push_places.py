"""A push that its receiver has no thread for, and whose sender is gone, keeps nobody waiting."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from wire import linked_caller

from edges.scarce import become_nobody, lift_limit, limit_threads
from edges.user import SENT, SMALL, SUCCESS, User, start_owner, status_of, values_of
from llm_datadist.core import messages as m

if TYPE_CHECKING:
    from llm_datadist.testing.cluster import Node, NodeProcess

OWNER = 23475
#: some of the senders are gone before they could be told
SENDERS = 40


def start_poor_owner(node: Node) -> int:
    become_nobody(OWNER)
    return start_owner(node, "tcp", shape=SMALL)


def be_poor(_: Node) -> None:
    limit_threads()


def be_rich_again(_: Node) -> None:
    lift_limit()


def test_a_push_whose_refusal_finds_nobody_has_no_place(node: Node, victim: NodeProcess) -> None:
    port = victim.call(start_poor_owner)
    user = User(node, "tcp", port, 2000, SMALL)
    with linked_caller(port, is_remote_accessible=True) as caller:
        stream = caller.attach()
        stream.send(m.ListCaches())
        info = stream.expect(m.Caches).infos[0]
        addr = np.frombuffer(info.addrs, dtype="<u8")[0]
        block = np.array([0x1000, addr, SMALL[2]], dtype="<u8").tobytes()
        push = m.Fetch(info.cache_id, info.generation, 1, 1, 8, 600_000, 1e11, block)
        victim.call(be_poor)
        for _ in range(SENDERS):
            sender = caller.attach()
            with pytest.raises(EOFError):
                sender.hang_up(m.encode(push), hard=True)
        stream.send(m.ListCaches())  # what came before has been looked at when this is answered
        stream.expect(m.Caches)
        victim.call(be_rich_again)
    assert status_of(user.push) == SUCCESS
    assert SENT in victim.call(values_of)
