"""Who is there, as one watcher sees it, with a clock of the test's."""

from __future__ import annotations

from directory.records import record
from llm_datadist.directory.members import Members
from llm_datadist.directory.record import Entry

#: a directory that counts the time itself, as etcd does
NEVER = 1e12


def test_who_was_here_once_is_forgotten() -> None:
    members = Members()
    for number in range(3000):
        entry = Entry(record=record(number), ttl_s=10.0)
        members.heard(entry, NEVER)
        if number % 2:
            members.heard(Entry(record=entry.record, ttl_s=10.0, has_left=True), NEVER)
        else:
            members.missing(number, 0.0)
            assert list(members.overdue(11.0)) == [number]
        members.take()
    assert not members.ids()
    assert len(members._due) < 300
