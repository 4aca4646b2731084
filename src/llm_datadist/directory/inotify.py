"""What happens to the names in one folder, as the kernel says it (inotify)."""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Final, NamedTuple

_ATTRIB_SELF_GONE: Final = 0x400 | 0x800  # IN_DELETE_SELF, IN_MOVE_SELF
_MOVED: Final = 0x40 | 0x80  # IN_MOVED_FROM, IN_MOVED_TO
_DELETED: Final = 0x200
_OVERFLOW, _UNMOUNT, _IGNORED = 0x4000, 0x2000, 0x8000
_ONLY_A_FOLDER: Final = 0x01000000
_HEADER: Final = struct.Struct("iIII")
_READ_NBYTES: Final = 64 * 1024


class Events(NamedTuple):
    """What was heard."""

    names: frozenset[str]  #: came, were replaced, or went
    is_incomplete: bool = False  #: there were too many to tell
    is_gone: bool = False  #: the folder itself was moved, deleted or unmounted


class Inotify:
    """Watches a folder for names that come and go. Raises OSError."""

    def __init__(self, path: str) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.fd = _checked(libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC), path)
        try:
            mask = _MOVED | _DELETED | _ATTRIB_SELF_GONE | _ONLY_A_FOLDER
            encoded = os.fsencode(path)
            _checked(libc.inotify_add_watch(self.fd, encoded, ctypes.c_uint32(mask)), path)
        except BaseException:
            self.close()
            raise

    def read(self) -> Events:
        """What has happened since the last time; does not wait."""
        names: set[str] = set()
        is_incomplete = is_gone = False
        try:
            data = os.read(self.fd, _READ_NBYTES)
        except BlockingIOError:
            return Events(frozenset())
        at = 0
        while at < len(data):
            _, mask, _, length = _HEADER.unpack_from(data, at)
            at += _HEADER.size
            name = data[at : at + length].rstrip(b"\0")
            at += length
            is_incomplete |= bool(mask & _OVERFLOW)
            is_gone |= bool(mask & (_ATTRIB_SELF_GONE | _UNMOUNT | _IGNORED))
            if name:
                names.add(os.fsdecode(name))
        return Events(frozenset(names), is_incomplete, is_gone)

    def close(self) -> None:
        """May be called again."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


def _checked(result: int, path: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return result
