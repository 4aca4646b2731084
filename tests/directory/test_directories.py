"""What every directory does: over a folder whose changes the kernel tells, one where they are
looked for, and etcd."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

from directory.etcd_server import EtcdServer, etcd_program
from directory.records import nothing, record, until
from llm_datadist.directory import (
    EtcdDirectory,
    FolderDirectory,
    Superseded,
    folder_watch,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from llm_datadist.directory import Directory, Watch

TTL_S = 2.0
#: etcd looks for leases that ran out every half second, and counts whole seconds
LEFT_S = 4 * TTL_S


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with EtcdServer(tmp_path_factory.mktemp("etcd"), etcd_program()) as server:
        yield server


@pytest.fixture(params=["inotify", "looks", "etcd"])
def directory(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Directory:
    if request.param == "etcd":
        server: EtcdServer = request.getfixturevalue("server")
        return EtcdDirectory(server.url, f"/{tmp_path.name}")
    if request.param == "looks":
        monkeypatch.setattr(folder_watch, "_LOCAL", frozenset())
        monkeypatch.setattr(folder_watch, "Inotify", _no_inotify)
    return FolderDirectory(tmp_path, look_s=0.1)


def _no_inotify(path: str) -> None:
    raise OSError(24, "too many of them")


@pytest.fixture
def watch(directory: Directory) -> Iterator[Watch]:
    watch = directory.watch()
    yield watch
    watch.close()


def test_who_announces_joins(directory: Directory, watch: Watch) -> None:
    early = directory.announce(record(1), TTL_S)
    assert until(watch, bool).joined == (record(1),)
    late = directory.announce(record(2), TTL_S)
    assert until(watch, bool) == ((record(2),), (), ())
    for each in (early, late):
        each.close()


def test_a_change_is_told_with_what_was_before(directory: Directory, watch: Watch) -> None:
    announcement = directory.announce(record(1), TTL_S)
    until(watch, bool)
    announcement.change(record(1, role="DECODER"))
    assert until(watch, bool) == ((), (), ((record(1), record(1, role="DECODER")),))
    announcement.close()


def test_who_withdraws_has_left_at_once(directory: Directory, watch: Watch) -> None:
    announcement = directory.announce(record(1), 600)
    until(watch, bool)
    announcement.withdraw()
    announcement.withdraw()
    announcement.close()
    assert until(watch, bool) == ((), (record(1),), ())
    late = directory.watch()
    assert nothing(late, 0.5)
    late.close()


def test_who_is_not_renewed_has_left(directory: Directory, watch: Watch) -> None:
    dead, alive = directory.announce(record(1), TTL_S), directory.announce(record(2), TTL_S)
    until(watch, bool)
    end = time.monotonic() + LEFT_S + TTL_S
    changes = None
    while not changes and time.monotonic() < end:
        alive.renew()
        changes = watch.wait(TTL_S / 4)
    assert changes == ((), (record(1),), ())
    for each in (dead, alive):
        each.close()


def test_who_stood_still_and_goes_on_joins_again(directory: Directory, watch: Watch) -> None:
    announcement = directory.announce(record(1), TTL_S)
    until(watch, bool)
    assert until(watch, lambda changes: bool(changes.left), LEFT_S).left == (record(1),)
    announcement.renew()
    assert until(watch, bool).joined == (record(1),)
    announcement.close()


def test_a_new_start_takes_the_place_of_the_old_one(directory: Directory, watch: Watch) -> None:
    old = directory.announce(record(1, incarnation=1), TTL_S)
    until(watch, bool)
    new = directory.announce(record(1, incarnation=2), TTL_S)
    assert until(watch, bool).changed == ((record(1, 1), record(1, 2)),)
    for late in (old.renew, old.withdraw, lambda: old.change(record(1, 1, "MIX"))):
        with pytest.raises(Superseded):
            late()
    new.renew()
    assert nothing(watch, 0.3)
    new.withdraw()
    assert until(watch, bool).left == (record(1, 2),)
    old.renew()  # nobody else has the id by now
    assert until(watch, bool).joined == (record(1, 1),)
    for each in (old, new):
        each.close()


def test_an_interrupted_wait_ends_and_so_does_each_later_one(watch: Watch) -> None:
    ended = threading.Event()

    def wait() -> None:
        watch.wait(60)
        watch.wait(60)
        ended.set()

    waiter = threading.Thread(target=wait, daemon=True)
    waiter.start()
    watch.interrupt()
    watch.interrupt()
    assert ended.wait(5)
    waiter.join()


def test_a_wait_lasts_as_long_as_it_may(watch: Watch) -> None:
    begun = time.monotonic()
    assert not watch.wait(0.3)
    assert 0.25 < time.monotonic() - begun < 2


def test_what_cannot_be_written_is_refused(directory: Directory, watch: Watch) -> None:
    for ttl_s in (0.1, 1e6):
        with pytest.raises(ValueError, match="ttl_s"):
            directory.announce(record(1), ttl_s)
    long = {f"fact {index}": "x" * 256 for index in range(64)}
    with pytest.raises(ValueError, match="bytes at most"):
        directory.announce(record(1, facts=long), TTL_S)
    assert nothing(watch, 0.2)


def test_a_record_comes_as_it_was_said(directory: Directory, watch: Watch) -> None:
    said = record(
        2**64 - 1, role="MIX", listen="[::1]:5", advertised="host.example:6",
        facts={"layout": "LBHNC", "größe": "✓"}, labels={"zone": "a"},
    )  # fmt: skip
    announcement = directory.announce(said, TTL_S)
    assert until(watch, bool).joined == (said,)
    assert said.endpoint == ("host.example", 6)
    announcement.close()
