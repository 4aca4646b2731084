"""A folder as a directory: local, on a network file system, or in a volume that pods share."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from llm_datadist.directory import files
from llm_datadist.directory.base import DirectoryError, Superseded
from llm_datadist.directory.folder_watch import FolderWatch
from llm_datadist.directory.place import Place, now_s
from llm_datadist.directory.record import Entry, Record

if TYPE_CHECKING:
    from llm_datadist.directory.base import Announcement, Watch

#: how often a folder is looked through where the kernel does not tell of others' changes
LOOK_S: Final = 2.0


class FolderDirectory:
    """A folder that all members see, each by its own path.

    It must be there: a missing one is a directory that is gone, and is never made, since a mount
    may be missing. `look_s` is for file systems where changes must be looked for.
    """

    def __init__(self, path: str | os.PathLike[str], *, look_s: float = LOOK_S) -> None:
        self.path = os.path.abspath(os.fspath(path))
        self._look_s = look_s

    def __str__(self) -> str:
        return f"the folder {self.path}"

    def announce(self, record: Record, ttl_s: float) -> Announcement:
        """Writes the record's file. As `Directory.announce`."""
        return _File(self.path, Entry(record=record, ttl_s=ttl_s))

    def watch(self) -> Watch:
        """As `Directory.watch`."""
        return FolderWatch(self.path, self._look_s)


class _File:
    """The file of one member. An `Announcement`."""

    def __init__(self, folder: str, entry: Entry) -> None:
        self._folder = folder
        self._entry = entry
        #: kept open: its number is no other file's then
        self._fd = -1
        #: as we left it: who wrote into it since has changed that
        self._seal: files.Seal | None = None
        self._renewed_at = 0.0
        self._place = Place(entry)
        with suppress(OSError):  # to write will say why
            files.sweep(folder, entry.record.cluster_id)
        self._write(entry)

    def renew(self) -> None:
        """Sets the time of our file, or writes it again where it is missing or was written into.

        Also when we were late, as a process that was stopped is, or its file system: others have
        forgotten us, and do not look at the times of files that they know nothing of.
        """
        try:
            if self._is_in_place():
                os.utime(self._fd)
                before, self._seal = self._seal, files.Seal.of(os.fstat(self._fd))
                late_at, self._renewed_at = self._renewed_at + self._entry.ttl_s, now_s()
                is_whole = before is not None and before.nbytes == self._seal.nbytes
                if is_whole and self._renewed_at < late_at:
                    return
        except OSError as error:
            raise self._failed("renew", error) from error
        self._require_place()
        self._write(self._entry)

    def change(self, record: Record) -> None:
        """As `Announcement.change`."""
        self._require_place()
        self._entry = Entry(record=record, ttl_s=self._entry.ttl_s)
        self._write(self._entry)

    def withdraw(self) -> None:
        """Leaves a last word there, which those who watch remove in time."""
        self._require_place()
        record, ttl_s = self._entry.record, self._entry.ttl_s
        self._write(Entry(record=record, ttl_s=ttl_s, has_left=True))

    def close(self) -> None:
        """As `Announcement.close`."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    @property
    def _path(self) -> str:
        return os.path.join(self._folder, files.name_of(self._entry.record.cluster_id))

    def _is_in_place(self) -> bool:
        if self._fd < 0:
            return False
        try:
            return files.Seal.of(os.stat(self._path, follow_symlinks=False)) == self._seal
        except FileNotFoundError:
            os.stat(self._folder)  # raises when it is the folder that is gone
            return False

    def _require_place(self) -> None:
        """Raises Superseded when another start of our id is in the file's place, and lives."""
        seal, there = None, None
        with suppress(OSError):  # nobody is there, or to write will say why not
            seal, entry = files.read(self._path, self._entry.record.cluster_id)
            there = entry if isinstance(entry, Entry) else None
        if rival := self._place.rival(there, seal, now_s()):
            raise Superseded(f"{rival} has announced itself in {self._folder}")

    def _write(self, entry: Entry) -> None:
        try:
            fd = files.write(self._folder, entry)
        except OSError as error:
            raise self._failed("write", error) from error
        self.close()
        self._fd, self._seal = fd, files.Seal.of(os.fstat(fd))
        self._renewed_at = now_s()

    def _failed(self, verb: str, error: OSError) -> DirectoryError:
        return DirectoryError(f"cannot {verb} the record in {self._folder}: {error.strerror}")
