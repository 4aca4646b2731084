"""The fleet under load for a minute: `make fleet` does it for ten, with 500 events."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import pytest

from directory.etcd_server import EtcdServer, etcd_program
from fleet.findings import Findings, find
from fleet.run import Played, play
from fleet.stage import Event, Fleet
from fleet.worker import DEADLINE_S, WRONG, Pull, pulls_in

if TYPE_CHECKING:
    from pathlib import Path

SECONDS, EVENTS = 20.0, 16


@pytest.mark.parametrize("directory", [pytest.param("folder", marks=pytest.mark.long), "etcd"])
def test_whoever_is_not_concerned_notices_nothing(tmp_path: Path, directory: str) -> None:
    server = EtcdServer(tmp_path, etcd_program()) if directory == "etcd" else None
    with server or nullcontext(), Fleet(tmp_path, server) as fleet:
        played = play(fleet, SECONDS, EVENTS, seed=3, on_event=lambda _: None)
        findings = find(played, pulls_in(fleet.notes))
    assert len(played.events) == EVENTS
    assert findings.good > 500
    assert findings.is_clean, vars(findings)


# -- that the findings find --

KILLED = Event("killed, restarted elsewhere", 1, 10.0, 12.0, "new")


def pull(began: float, status: str = "LLM_SUCCESS", owner: int = 1, read: str = "new") -> Pull:
    return Pull(began, began + 0.1, 11, "reader", owner, read, status)


def found(*pulls: Pull) -> Findings:
    return find(Played(0.0, [KILLED]), [pull(12.5), *pulls])


def test_a_failure_is_concerned_only_near_an_event_of_its_ends() -> None:
    near, far = pull(11.0, "LLM_NOT_YET_LINK"), pull(40.0, "LLM_NOT_YET_LINK")
    other = pull(11.0, "LLM_NOT_YET_LINK", owner=2)
    findings = found(near, far, other)
    assert findings.unconcerned == [far, other]
    assert findings.kinds[KILLED.kind].concerned == 1
    assert not findings.is_clean
    assert found(near).is_clean


def test_wrong_bytes_are_never_excused_and_late_pulls_are_counted() -> None:
    assert not found(pull(11.0, WRONG)).is_clean
    late = pull(20.0)._replace(ended=20.0 + 2 * DEADLINE_S)
    assert found(late).late == 1


def test_recovery_is_counted_by_the_start_that_came_behind() -> None:
    assert found().kinds[KILLED.kind].recoveries_s == [pytest.approx(0.6)]
    old = find(Played(0.0, [KILLED]), [pull(12.5, read="old")])
    assert old.kinds[KILLED.kind].unrecovered == 1
    assert not old.is_clean
