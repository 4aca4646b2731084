"""What a directory of 10,000 members costs: the real code, with a clock of its own.

    cd tests && python -m fleet.simulated

Records are written and read, members kept, plans made as in a follower; nothing is sent, and no
time passes but that of the computation, which is what is measured. docs/scale.md has the figures.
"""

from __future__ import annotations

import random
import time
import tracemalloc
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from directory.records import record
from llm_datadist import LLMRole, Wants
from llm_datadist.directory.members import Members
from llm_datadist.directory.record import Entry, decode, encode
from llm_datadist.following.plan import Link, Plan

if TYPE_CHECKING:
    from llm_datadist.directory import Record

TTL_S = 15.0
FACTS = {"protocol": "1", "remote accessible": "True", "layout": "LBHNC float16 16x128"}
MAX_LINKS = 256


def member(cluster_id: int, incarnation: int) -> Record:
    role = "PROMPT" if cluster_id % 2 else "DECODER"
    return record(cluster_id, incarnation, role, facts=FACTS, labels={"zone": "a"})


def plan_of(count: int) -> Plan:
    wants = Wants([LLMRole.PROMPT], max_links=MAX_LINKS)
    return Plan(count, wants, FACTS, random.Random(1).random)


@dataclass
class OneFollower:
    """What one process pays, in seconds of a core and bytes of memory."""

    record_nbytes: int
    read_s: float  #: all records, for the first time
    plan_s: float
    memory_nbytes: int
    renewals_s: float  #: of everybody, once
    change_s: float  #: one member's


def one_follower(count: int) -> OneFollower:
    texts = [encode(Entry(record=member(each, 1), ttl_s=TTL_S)) for each in range(count)]
    members, plan = Members(), plan_of(count)
    begun = time.perf_counter()
    for text in texts:
        members.heard(decode(text), 0.0)
    read_s = time.perf_counter() - begun
    changes = members.take()
    begun = time.perf_counter()
    plan.told(changes, 0.0)
    links = [action for action in plan.decide(0.0) if isinstance(action, Link)]
    plan_s = time.perf_counter() - begun
    assert links
    begun = time.perf_counter()
    for each in members.overdue(TTL_S):
        members.renewed(each, TTL_S)
    renewals_s = time.perf_counter() - begun
    assert not members.take()
    begun = time.perf_counter()
    for each in range(0, count, 10):
        entry = Entry(record=member(each, 2), ttl_s=TTL_S)
        members.heard(decode(encode(entry)), TTL_S)
        plan.told(members.take(), TTL_S)
        list(plan.decide(TTL_S))
    change_s = (time.perf_counter() - begun) / len(range(0, count, 10))
    nbytes = _memory_of(texts)
    return OneFollower(len(texts[0]), read_s, plan_s, nbytes, renewals_s, change_s)


def _memory_of(texts: list[bytes]) -> int:
    tracemalloc.start()
    members, plan = Members(), plan_of(len(texts))
    for text in texts:
        members.heard(decode(text), 0.0)
    plan.told(members.take(), 0.0)
    nbytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return nbytes


def main() -> None:
    table = Table("one process, of a fleet of", "1,000", "10,000")
    few, many = one_follower(1_000), one_follower(10_000)
    table.add_row("bytes of a record", *(f"{each.record_nbytes}" for each in (few, many)))
    table.add_row("read all, ms", *(f"{each.read_s * 1e3:.0f}" for each in (few, many)))
    table.add_row("plan for all, ms", *(f"{each.plan_s * 1e3:.0f}" for each in (few, many)))
    table.add_row("memory, MiB", *(f"{each.memory_nbytes / 2**20:.1f}" for each in (few, many)))
    table.add_row(
        "all looked at once, ms", *(f"{each.renewals_s * 1e3:.1f}" for each in (few, many))
    )
    table.add_row("a change, µs", *(f"{each.change_s * 1e6:.0f}" for each in (few, many)))
    Console().print(table)


if __name__ == "__main__":
    main()
