"""Watching a folder: what changes there the kernel says, or it is looked for now and then."""

from __future__ import annotations

import os
import select
import time
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Final

from llm_datadist.directory import files
from llm_datadist.directory.base import DirectoryError
from llm_datadist.directory.complaints import Complaints
from llm_datadist.directory.inotify import Inotify
from llm_datadist.directory.members import MAX_MEMBERS, Members
from llm_datadist.locks import make_lock
from llm_datadist.observe.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterable

    from llm_datadist.directory.base import Changes

#: file systems of one host alone: its kernel knows all that happens there
_LOCAL: Final = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "ramfs", "f2fs", "zfs"})
#: a file that nobody renewed for so many ttl is taken away
_KEPT_TTLS: Final = 20


class FolderWatch:
    """Who has a file there. A `Watch`.

    It waits for the kernel's word, until somebody's ttl is over, whose file alone is looked at
    then. Where others' changes may go unheard it also looks through the folder every `look_s`.
    """

    def __init__(self, folder: str, look_s: float) -> None:
        self._folder = folder
        self._look_s = look_s
        self._members = Members()
        self._seals: dict[int, files.Seal] = {}
        #: files that nobody renews any more, and when they are taken away
        self._stale: dict[int, tuple[files.Seal, float]] = {}
        self._complaints = Complaints(f"the folder {folder}")
        self._inotify: Inotify | None = None
        self._is_open = self._was_open = False
        #: which folder that is: another one may come to be at its path
        self._identity: tuple[int, int] | None = None
        #: when all is looked through; None where the kernel says what changes
        self._look_at: float | None = None
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = make_lock()  # else an interruption could meet another file's number
        self._is_interrupted = False

    def wait(self, timeout_s: float) -> Changes:
        """As `Watch.wait`."""
        end = time.monotonic() + timeout_s
        try:
            while True:
                self._look()
                changes = self._members.take()
                if changes or self._is_interrupted or not self._has_more(end):
                    return changes
        except OSError as error:
            self._shut()
            raise DirectoryError(f"cannot read {self._folder}: {error.strerror}") from error

    def interrupt(self) -> None:
        """As `Watch.interrupt`."""
        with self._lock:
            self._is_interrupted = True
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """As `Watch.close`."""
        self._shut()
        with self._lock:
            if self._wake >= 0:
                os.close(self._wake)
            self._wake = -1

    def _has_more(self, end: float) -> bool:
        """Waits for something to look at; False when the time is over."""
        times = (end, self._members.next_at, self._look_at)
        left_s = min(at for at in times if at is not None) - time.monotonic()
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        if self._inotify is not None:
            poll.register(self._inotify.fd, select.POLLIN)
        is_told = bool(poll.poll(max(0.0, left_s) * 1000 + 1))
        return is_told or time.monotonic() < end

    def _look(self) -> None:
        """A look may take long: each file counts as seen when it was."""
        if self._is_open and self._inotify is not None:
            events = self._inotify.read()
            if events.is_gone or self._identity != _identity_of(self._folder):
                self._shut()
            elif events.is_incomplete:
                self._read(self._names())
            else:
                self._read(events.names)
        if not self._is_open:
            self._open()
        elif self._look_at is not None and time.monotonic() >= self._look_at:
            self._read(self._names())
            self._look_at = time.monotonic() + self._look_s
        self._look_at_overdue()
        self._sweep()

    def _open(self) -> None:
        """From nothing, or after the folder was gone."""
        self._identity = _identity_of(self._folder)
        try:
            self._inotify = Inotify(self._folder)
        except OSError as error:
            get_logger().warning(
                "the kernel does not tell what changes in %s (%s): it is looked through every "
                "%.1f s", self._folder, error.strerror, self._look_s,
            )  # fmt: skip
        is_told = self._inotify is not None and _type_of(self._folder) in _LOCAL
        self._look_at = None if is_told else time.monotonic() + self._look_s
        self._is_open = True
        self._read(self._names())
        if self._was_open:
            self._members.forgive(time.monotonic())
        self._was_open = True

    def _shut(self) -> None:
        self._is_open = False
        if self._inotify is not None:
            self._inotify.close()
        self._inotify = None

    def _read(self, names: Iterable[str]) -> None:
        for name in names:
            cluster_id = files.id_of(name)
            if cluster_id is not None and (
                cluster_id in self._seals or len(self._seals) < MAX_MEMBERS
            ):
                self._read_file(cluster_id)

    def _names(self) -> list[str]:
        """Of so many files that nobody can exhaust our memory with them."""
        with os.scandir(self._folder) as there:
            return [each.name for each in islice(there, 2 * MAX_MEMBERS)]

    def _read_file(self, cluster_id: int) -> None:
        """What is torn, or no record, says nothing: its member has the rest of its ttl."""
        path = self._path(cluster_id)
        known = self._seals.get(cluster_id)
        try:
            if files.seal_of(path) == known:
                return
            seal, entry = files.read(path, cluster_id)
        except FileNotFoundError:
            if self._seals.pop(cluster_id, None) is not None:
                self._members.missing(cluster_id, time.monotonic())
            return
        except OSError as error:
            self._complaints.add(path, str(error.strerror))
            return
        self._seals[cluster_id] = seal
        if isinstance(entry, ValueError):
            self._complaints.add(path, str(entry))
            return
        now = time.monotonic()
        if entry.has_left:
            self._stale[cluster_id] = (seal, now + _KEPT_TTLS * entry.ttl_s)
        self._members.heard(entry, now)

    def _look_at_overdue(self) -> None:
        for cluster_id in self._members.overdue(time.monotonic()):
            before = self._seals.get(cluster_id)
            self._read_file(cluster_id)
            after = self._seals.get(cluster_id)
            if after is not None and after == before:
                kept_s = _KEPT_TTLS * self._members.ttl_s(cluster_id)
                self._stale[cluster_id] = (after, time.monotonic() + kept_s)

    def _sweep(self) -> None:
        """Takes away what a dead member left, long after; who lives writes it again."""
        now = time.monotonic()
        for cluster_id, (seal, at) in tuple(self._stale.items()):
            if now >= at or self._seals.get(cluster_id) != seal:
                del self._stale[cluster_id]
            if now >= at and self._seals.get(cluster_id) == seal:
                with suppress(OSError):
                    path = self._path(cluster_id)
                    if files.seal_of(path) == seal:
                        os.unlink(path)

    def _path(self, cluster_id: int) -> str:
        return os.path.join(self._folder, files.name_of(cluster_id))


def _identity_of(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _type_of(path: str) -> str:
    """The file system's name; empty when the kernel does not say."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
            for line in mounts:
                fields = line.split()
                if len(fields) > 2 and fields[2] == wanted:
                    return fields[fields.index("-") + 1]
    except (OSError, ValueError, IndexError):
        pass
    return ""
