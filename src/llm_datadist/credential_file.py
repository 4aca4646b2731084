"""Files that a cluster proves itself with: small, regular, and never waited for."""

from __future__ import annotations

import os
import stat
from typing import Final

from llm_datadist.errors import invalid
from llm_datadist.system_errors import pass_on_handlers

#: the bundle of all public authorities is a quarter of it
_MAX_NBYTES: Final = 1024 * 1024
_KINDS: Final = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def read_credential(name: str, file: str) -> bytes:
    """All that is in it; `name` is what messages call the option.

    Raises LLMException (LLM_PARAM_INVALID) for what is no file that could be meant. Pipes are not
    waited for, endless files not read.
    """
    try:
        data = _read(name, file)
    except FileNotFoundError:
        raise invalid(f"{name}: there is no file {file}") from None
    except OSError as error:
        pass_on_handlers(error)
        raise invalid(f"{name}: {file} cannot be read: {error.strerror}") from None
    except ValueError:
        raise invalid(f"{name}: {file!r} is no path of a file") from None
    if not data.strip():
        raise invalid(f"{name}: {file} is empty")
    return data


def is_public(file: str) -> bool:
    """Whether every user of this host can read it. Raises OSError."""
    return bool(os.stat(file).st_mode & stat.S_IROTH)


def identity_of(file: str) -> tuple[int, ...] | None:
    """What differs when the file was written anew or replaced; None when there is none."""
    try:
        found = os.stat(file)
    except OSError as error:
        pass_on_handlers(error)
        return None
    except ValueError:
        return None
    # with the time of change: tools that copy files set the time of modification back
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _read(name: str, file: str) -> bytes:
    # O_NONBLOCK opens a pipe although nobody writes to it, and so does not wait for that
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            kind = _KINDS.get(stat.S_IFMT(mode), "something else")
            raise invalid(f"{name}: {file} is {kind}; it must be a regular file")
        data = b""
        while piece := os.read(descriptor, _MAX_NBYTES + 1 - len(data)):
            data += piece
    finally:
        os.close(descriptor)
    if len(data) > _MAX_NBYTES:
        raise invalid(f"{name}: {file} has more than {_MAX_NBYTES} bytes; is it the file you mean?")
    return data
