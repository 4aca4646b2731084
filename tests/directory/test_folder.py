"""A folder as a directory, at its edges: torn and hostile files, full disks, no folder at all."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from directory.records import nothing, record, until
from llm_datadist.directory import DirectoryError, FolderDirectory, Superseded
from llm_datadist.directory.record import MAX_NBYTES
from programs import environment

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from llm_datadist.directory import Record, Watch

TTL_S = 1.0


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Watch]:
    watch = FolderDirectory(tmp_path).watch()
    yield watch
    watch.close()


def _text(cluster_id: int, **other: object) -> str:
    said = {"cluster_id": cluster_id, "incarnation": "0" * 32, "role": "MIX", **other}
    return json.dumps({"record": said, "ttl_s": 5.0})


HOSTILE = {
    "empty": "",
    "torn": _text(7)[:40],
    "no object": "[1, 2]",
    "deep": "[" * 10_000,
    "large": " " * MAX_NBYTES + _text(7),
    "another's": _text(8),
    "an id out of range": _text(7).replace(": 7", f": {2**64}"),
    "a negative id": _text(7).replace(": 7", ": -7"),
    "an id that is no number": _text(7).replace(": 7", ': "7"'),
    "a ttl of no end": _text(7).replace("5.0", "1e308"),
    "a ttl beyond numbers": _text(7).replace("5.0", "1e999"),
    "no ttl": _text(7).replace("5.0", "0"),
    "an escape sequence": _text(7, labels={"name": "\x1b[2J"}),
    "a line break": _text(7, facts={"a\nb": "c"}),
    "half a character": _text(7, labels={"name": "\ud800"}),
    "an address of many": _text(7, listen="10.0.0.1:1 10.0.0.2:1"),
    "an address of an empty part": _text(7, listen="a..b:80"),
    "an address of too long a part": _text(7, advertised="a" * 70 + ":80"),
    "a port out of range": _text(7, listen="10.0.0.1:65536"),
    "an address without a port": _text(7, advertised="10.0.0.1"),
    "no role": _text(7, role="ROOT"),
    "a short incarnation": _text(7, incarnation="00"),
    "many labels": _text(7, labels={str(index): "" for index in range(65)}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_record_is_left_out(tmp_path: Path, watch: Watch, name: str) -> None:
    (tmp_path / "7.json").write_text(HOSTILE[name])
    honest = FolderDirectory(tmp_path).announce(record(1), TTL_S)
    assert until(watch, bool).joined == (record(1),)
    honest.close()


def test_the_text_that_they_are_made_of_is_a_record(tmp_path: Path, watch: Watch) -> None:
    (tmp_path / "7.json").write_text(_text(7))
    assert until(watch, bool).joined[0].cluster_id == 7


def test_what_is_no_file_is_left_out(tmp_path: Path, watch: Watch) -> None:
    os.mkfifo(tmp_path / "7.json")
    (tmp_path / "8.json").mkdir()
    (tmp_path / "secret").write_text(_text(9))
    (tmp_path / "9.json").symlink_to(tmp_path / "secret")
    for name in ("07.json", "-1.json", "7.json.tmp", f"{10**21}.json", "\u0667.json"):
        (tmp_path / name).write_text(_text(7))
    honest = FolderDirectory(tmp_path).announce(record(1), TTL_S)
    assert until(watch, bool).joined == (record(1),)
    honest.close()


def test_many_bad_files_do_not_fill_the_log(
    tmp_path: Path, watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    for cluster_id in range(100):
        (tmp_path / f"{cluster_id}.json").write_text("torn")
    with caplog.at_level(logging.WARNING, "LLM_DATADIST"):
        assert nothing(watch, 0.2)
    assert len(caplog.messages) == 8
    assert "of further ones nothing is said" in caplog.messages[-1]


def test_a_record_that_is_torn_later_keeps_its_ttl(tmp_path: Path, watch: Watch) -> None:
    announcement = FolderDirectory(tmp_path).announce(record(1), TTL_S)
    until(watch, bool)
    (tmp_path / "1.json").write_text("{")
    begun = time.monotonic()
    assert until(watch, bool).left == (record(1),)
    assert time.monotonic() - begun > TTL_S / 2
    announcement.close()


def test_a_writer_that_dies_in_the_middle_leaves_the_old_record(tmp_path: Path) -> None:
    """A process is killed while it writes, again and again: nobody ever reads half a record."""
    script = (
        "import sys\nfrom directory.records import record\n"
        "from llm_datadist.directory import FolderDirectory\n"
        "a = FolderDirectory(sys.argv[1]).announce(record(1), 5.0)\nprint(flush=True)\n"
        "while True: a.change(record(1, labels={'x': 'y' * 200}))\n"
    )
    for _ in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)],
            stdout=subprocess.PIPE,
            env=environment(),
        )
        assert writer.stdout is not None
        writer.stdout.readline()
        for _ in range(50):
            assert json.loads((tmp_path / "1.json").read_text())["record"]["cluster_id"] == 1
        writer.kill()
        writer.communicate()
        (tmp_path / f".1.{'0' * 32}.tmp").touch()  # killed before its name was right
        (tmp_path / ".11.tmp").touch()  # another's
        assert json.loads((tmp_path / "1.json").read_text())["record"]["cluster_id"] == 1
    FolderDirectory(tmp_path).announce(record(1, 2), 5.0).close()
    assert sorted(os.listdir(tmp_path)) == [".11.tmp", "1.json"]


def test_a_start_that_was_replaced_comes_back_when_its_successor_is_dead(tmp_path: Path) -> None:
    directory = FolderDirectory(tmp_path)
    first, second = (directory.announce(record(1, number), TTL_S) for number in (1, 2))
    watch = directory.watch()
    assert until(watch, bool).joined == (record(1, 2),)
    end = time.monotonic() + 3 * TTL_S
    while time.monotonic() < end:
        second.renew()
        with pytest.raises(Superseded, match="has announced itself"):
            first.renew()
        assert nothing(watch, TTL_S / 4)
    died, back = time.monotonic(), None
    while back is None and time.monotonic() < died + 8 * TTL_S:
        with suppress(Superseded):
            first.renew()
        now = watch.wait(TTL_S / 4)
        back = next((each for each in now.joined if each == record(1, 1)), None)
        assert not now.changed, "it had left before"
    assert back is not None
    assert time.monotonic() > died + 2 * TTL_S - TTL_S / 4
    with pytest.raises(Superseded, match="has announced itself"):
        second.renew()
    for each in (first, second, watch):
        each.close()


def test_another_folder_at_its_path_is_watched_from_then_on(tmp_path: Path) -> None:
    path = tmp_path / "fleet"
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    path.symlink_to("one")
    directory = FolderDirectory(path)
    first, watch = directory.announce(record(1), TTL_S), directory.watch()
    assert until(watch, bool).joined == (record(1),)
    (tmp_path / "new").symlink_to("other")
    (tmp_path / "new").rename(path)
    second = directory.announce(record(2), 60)
    joined: tuple[Record, ...] = ()
    end = time.monotonic() + 5 * TTL_S
    while not joined and time.monotonic() < end:
        first.renew()
        changes = watch.wait(TTL_S / 4)
        assert not changes.left
        joined = changes.joined
    assert joined == (record(2),)
    for each in (first, second, watch):
        each.close()


@pytest.mark.skipif(os.getuid() != 0, reason="only root may mount")
def test_a_file_system_that_stood_still_is_no_reason_to_stay_away(tmp_path: Path) -> None:
    image, folder = tmp_path / "image", tmp_path / "fleet"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(16 << 20)
    for command in (f"mkfs.ext4 -q {image}", f"mount -o loop {image} {folder}"):
        if subprocess.run(command.split(), check=False).returncode:
            pytest.skip("no file systems in files here")
    try:
        directory = FolderDirectory(folder)
        announcement, watch = directory.announce(record(1), TTL_S), directory.watch()
        assert until(watch, bool).joined == (record(1),)
        subprocess.run(["fsfreeze", "--freeze", folder], check=True)
        try:
            renewing = threading.Thread(target=announcement.renew)
            renewing.start()
            assert until(watch, bool).left == (record(1),)
            assert renewing.is_alive()
        finally:
            subprocess.run(["fsfreeze", "--unfreeze", folder], check=True)
        renewing.join()
        assert until(watch, bool).joined == (record(1),)
        for each in (announcement, watch):
            each.close()
    finally:
        subprocess.run(["umount", folder], check=True)


def test_times_of_files_are_compared_with_themselves_alone(tmp_path: Path, watch: Watch) -> None:
    """A writer whose clock is in 1970, or in 2100, or goes backwards."""
    announcement = FolderDirectory(tmp_path).announce(record(1), TTL_S)
    until(watch, bool)
    for moment_s in (4_102_444_800, 3600, 1800, 5):
        os.utime(tmp_path / "1.json", (moment_s, moment_s))
        assert nothing(watch, 0.8 * TTL_S)
    assert until(watch, bool).left == (record(1),)
    announcement.close()


def test_a_file_that_somebody_removed_is_written_again(tmp_path: Path, watch: Watch) -> None:
    announcement = FolderDirectory(tmp_path).announce(record(1), TTL_S)
    until(watch, bool)
    (tmp_path / "1.json").unlink()
    assert nothing(watch, TTL_S / 2)
    announcement.renew()
    assert (tmp_path / "1.json").exists()
    assert nothing(watch, TTL_S / 2)
    announcement.close()


def test_a_folder_that_is_gone_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "fleet"
    folder.mkdir()
    directory = FolderDirectory(folder)
    watch, announcement = directory.watch(), directory.announce(record(1), TTL_S)
    dead = directory.announce(record(2), TTL_S)
    assert {each.cluster_id for each in until(watch, bool).joined} == {1, 2}
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(DirectoryError, match="cannot read"):
        watch.wait(5)
    with pytest.raises(DirectoryError, match="cannot renew"):
        announcement.renew()
    assert nothing(watch, 2 * TTL_S)
    folder.mkdir()
    end, left = time.monotonic() + 10, None
    while not left and time.monotonic() < end:
        announcement.renew()
        left = watch.wait(TTL_S / 4)
    assert left == ((), (record(2),), ())
    for each in (watch, announcement, dead):
        each.close()


def test_a_folder_that_is_emptied_changes_nothing(tmp_path: Path, watch: Watch) -> None:
    """As `rm -r` does, file by file, before it is gone."""
    announcement = FolderDirectory(tmp_path).announce(record(1), TTL_S)
    until(watch, bool)
    for file in tmp_path.iterdir():
        file.unlink()
    tmp_path.rmdir()
    assert nothing(watch, 0.5)
    tmp_path.mkdir()
    announcement.renew()
    assert nothing(watch, 1.5 * TTL_S / 2)
    announcement.close()


def test_a_missing_folder_is_never_made(tmp_path: Path) -> None:
    directory = FolderDirectory(tmp_path / "mount")
    with pytest.raises(DirectoryError, match="No such file"):
        directory.announce(record(1), TTL_S)
    watch = directory.watch()
    with pytest.raises(DirectoryError, match="No such file"):
        watch.wait(1)
    assert not (tmp_path / "mount").exists()
    watch.close()


@pytest.mark.skipif(os.getuid() != 0, reason="only root may mount")
def test_a_full_disk_keeps_who_is_there(tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)], check=False
    )
    if mounted.returncode:
        pytest.skip("no mounts here")
    try:
        directory = FolderDirectory(tmp_path)
        first, watch = directory.announce(record(1), TTL_S), directory.watch()
        until(watch, bool)
        with pytest.raises(OSError, match="No space"):
            (tmp_path / "filler").write_bytes(bytes(1 << 20))
        with pytest.raises(DirectoryError, match="No space"):
            directory.announce(record(2), TTL_S)
        with pytest.raises(DirectoryError, match="No space"):
            first.change(record(1, role="MIX"))
        for _ in range(6):
            first.renew()
            assert nothing(watch, TTL_S / 3)
        assert sorted(os.listdir(tmp_path)) == ["1.json", "filler"]
        for each in (watch, first):
            each.close()
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_ten_thousand_members(tmp_path: Path) -> None:
    directory = FolderDirectory(tmp_path)
    for cluster_id in range(10_000):
        (tmp_path / f"{cluster_id}.json").write_text(_text(cluster_id))
    watch = directory.watch()
    assert len(watch.wait(30).joined) == 10_000
    one = directory.announce(record(3), 60)
    begun = time.monotonic()
    assert until(watch, bool).changed[0].now == record(3)
    assert time.monotonic() - begun < 1  # one file is read, and not all
    for each in (one, watch):
        each.close()


def test_a_dead_members_file_is_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llm_datadist.directory import folder_watch

    monkeypatch.setattr(folder_watch, "_KEPT_TTLS", 1)
    directory = FolderDirectory(tmp_path)
    dead, gone = directory.announce(record(1), TTL_S), directory.announce(record(2), TTL_S)
    watch = directory.watch()
    gone.withdraw()
    end = time.monotonic() + 20
    while os.listdir(tmp_path) and time.monotonic() < end:
        watch.wait(0.2)
    assert os.listdir(tmp_path) == []
    for each in (dead, gone, watch):
        each.close()


@pytest.mark.parametrize("name", ["empty", "torn"])
def test_a_file_that_was_written_into_is_written_anew(
    tmp_path: Path, watch: Watch, name: str
) -> None:
    """Not replaced: its number is the same, and no watcher is told."""
    ours = FolderDirectory(tmp_path).announce(record(7), TTL_S)
    assert until(watch, bool).joined == (record(7),)
    (tmp_path / "7.json").write_text(HOSTILE[name])
    ours.renew()
    assert json.loads((tmp_path / "7.json").read_text())["record"]["cluster_id"] == 7
    assert nothing(watch, TTL_S / 2)
    ours.close()


def test_another_start_that_was_written_into_a_file_has_its_place(tmp_path: Path) -> None:
    ours = FolderDirectory(tmp_path).announce(record(7, 1), TTL_S)
    (tmp_path / "7.json").write_text(_text(7))
    with pytest.raises(Superseded, match="has announced itself"):
        ours.renew()
    ours.close()


STOPPED_AT_A_LOOK = """
import os, signal, sys, time
from llm_datadist.directory import FolderDirectory
stops = [signal.SIGSTOP]
def hook(event, args):
    if event == "open" and str(args[0]).endswith("/1.json") and stops:
        os.kill(os.getpid(), stops.pop())
sys.addaudithook(hook)
watch = FolderDirectory(sys.argv[1]).watch()
there, end = set(), time.monotonic() + 3.0
while time.monotonic() < end:
    changes = watch.wait(0.5)
    there |= {record.cluster_id for record in changes.joined}
    there -= {record.cluster_id for record in changes.left}
print(sorted(there))
"""


def test_who_renews_is_seen_however_long_a_look_takes(tmp_path: Path) -> None:
    """The watcher stands still where it opens the file, for longer than a ttl."""
    member = FolderDirectory(tmp_path).announce(record(1), TTL_S)
    command = [sys.executable, "-c", STOPPED_AT_A_LOOK, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as watcher:
        assert watcher.stdout is not None
        os.waitpid(watcher.pid, os.WUNTRACED)
        for renewals in range(25):
            member.renew()
            if renewals == 5:
                os.kill(watcher.pid, signal.SIGCONT)
            with suppress(subprocess.TimeoutExpired):
                watcher.wait(TTL_S / 4)
                break
        assert watcher.stdout.read() == "[1]\n"
    member.close()
