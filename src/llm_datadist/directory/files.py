"""Records as files of a folder: reading what anybody may have put there, and writing in one step.

The file `7.json` is cluster 7's; a new start replaces it. To renew is to set its time of change,
which takes no room on a full disk, wakes no watcher, and is compared with itself alone.
"""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from llm_datadist.directory.record import MAX_NBYTES, decode, encode

if TYPE_CHECKING:
    from llm_datadist.directory.record import Entry

_NAME: Final = re.compile(r"(0|[1-9][0-9]{0,19})\.json")
#: what is in the folder's place is not followed, and nobody waits for a pipe's other end
_READ: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_WRITE: Final = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_CREAT | os.O_EXCL


#: how what is being written is named, behind the cluster's id and its incarnation
_ASIDE: Final = ".tmp"


class Seal(NamedTuple):
    """What differs when a file was written anew, or renewed."""

    device: int
    inode: int
    changed_ns: int
    nbytes: int

    @classmethod
    def of(cls, status: os.stat_result) -> Seal:
        """That of a file."""
        return cls(status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)


def id_of(name: str) -> int | None:
    """The cluster id that a file is named by; None for a file of other names."""
    found = _NAME.fullmatch(name)
    return None if found is None else int(found[1])


def name_of(cluster_id: int) -> str:
    """The reverse of `id_of`."""
    return f"{cluster_id}.json"


def seal_of(path: str) -> Seal:
    """How the file is now. Raises OSError.

    It is opened: only so does a network file system ask its server, and not its own memory.
    """
    fd = os.open(path, _READ)
    try:
        return Seal.of(os.fstat(fd))
    finally:
        os.close(fd)


def read(path: str, cluster_id: int) -> tuple[Seal, Entry | ValueError]:
    """What the file says, or why that is no record of that cluster. Raises OSError."""
    fd = os.open(path, _READ)
    try:
        status = os.fstat(fd)
        seal = Seal.of(status)
        if not stat.S_ISREG(status.st_mode):
            return seal, ValueError("it is no plain file")
        data = os.read(fd, MAX_NBYTES + 1)
    finally:
        os.close(fd)
    try:
        entry = decode(data)
        if entry.record.cluster_id != cluster_id:
            raise ValueError(f"it is cluster {entry.record.cluster_id}'s")
    except ValueError as error:
        return seal, error
    return seal, entry


def write(folder: str, entry: Entry) -> int:
    """Puts the entry in its place, in one step; the open file, which its writer keeps.

    Raises OSError, and leaves what was there before.
    """
    data = encode(entry)
    record = entry.record
    path = os.path.join(folder, name_of(record.cluster_id))
    aside = os.path.join(folder, f".{record.cluster_id}.{record.incarnation}{_ASIDE}")
    with suppress(FileNotFoundError):
        os.unlink(aside)
    fd = os.open(aside, _WRITE, 0o644)
    try:
        _write_all(fd, data)
        os.fsync(fd)  # a full disk says so here
        os.rename(aside, path)
    except BaseException:
        os.close(fd)
        with suppress(OSError):
            os.unlink(aside)
        raise
    return fd


def sweep(folder: str, cluster_id: int) -> None:
    """Takes away what starts of that id were writing when they were killed. Raises OSError.

    One that lives, and writes just now, fails and writes again.
    """
    begin = f".{cluster_id}."
    with os.scandir(folder) as there:
        for each in there:
            if each.name.startswith(begin) and each.name.endswith(_ASIDE):
                os.unlink(each.path)


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
