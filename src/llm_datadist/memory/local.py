"""Copies within this process, by address: `process_vm_readv` on ourselves, or through a pipe.

Either way the kernel answers EFAULT where a memcpy of ours would crash.
"""

from __future__ import annotations

import errno
import os
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from llm_datadist.core.segments import first_unfinished, iovecs
from llm_datadist.errors import LLMException, LLMStatusCode, invalid
from llm_datadist.memory import native, pipe
from llm_datadist.system_errors import pass_on_handlers

if TYPE_CHECKING:
    import numpy.typing as npt

    from llm_datadist.core.segments import U64, Segments
    from llm_datadist.running.movers import Call, Movers

_PIECE_NBYTES = 64 * 1024 * 1024
#: what a seccomp profile or a sandbox's kernel says to a system call that it does not want
_REFUSALS = (errno.EPERM, errno.EACCES, errno.ENOSYS)


def copy(segments: Segments, movers: Movers) -> None:
    """Copies every segment. Raises LLMException(LLM_PARAM_INVALID) for memory that is not mapped.

    Source and destination must not overlap.
    """
    if len(segments):
        parts = segments.bounded(_PIECE_NBYTES).split(movers.parts_of(segments.total_nbytes))
        movers.run([partial(_copy_part, part) for part in parts])


def gather(vectors: U64, buffer: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The first bytes that the vectors point to, in the buffer; none when the first is bad."""
    window = _first(vectors, len(buffer))
    ours = _consecutive(buffer, window)
    return buffer[: _moved(ours, window)]


def scatter(data: npt.NDArray[np.uint8], vectors: U64) -> int:
    """Copies the data to where the vectors point, in order; how much of it had a place.

    Raises LLMException(LLM_PARAM_INVALID) for memory that is not mapped.
    """
    window = _first(vectors, len(data))
    wanted = int(window[:, 1].sum())
    theirs = _consecutive(data, window)
    if _moved(window, theirs) != wanted:
        raise invalid(
            "a local address of the transfer is not mapped memory: "
            "was the tensor freed after it was registered?"
        )
    return wanted


def _first(vectors: U64, max_nbytes: int) -> U64:
    """The first vectors up to so many bytes, the last of them cut; no more than a call takes."""
    window = vectors[: native.IOV_MAX].copy()
    ends = np.cumsum(window[:, 1])
    count = int(np.searchsorted(ends, np.uint64(max_nbytes), side="left")) + 1
    if count <= len(window):
        window = window[:count]
        window[-1, 1] -= ends[count - 1] - np.uint64(max_nbytes)
    return window


def _consecutive(data: npt.NDArray[np.uint8], window: U64) -> U64:
    """Vectors as long as those of the window, one behind the other in the data."""
    ends = np.cumsum(window[:, 1])
    return iovecs(ends - window[:, 1] + np.uint64(data.ctypes.data), window[:, 1])


def _copy_part(part: Segments, call: Call) -> None:
    src, dst = iovecs(part.src, part.nbytes), iovecs(part.dst, part.nbytes)
    for start in range(0, len(part), native.IOV_MAX):
        call.require()
        stop = start + native.IOV_MAX
        window = part.slice(start, stop)
        moved = _moved(dst[start:stop], src[start:stop])
        if moved != window.total_nbytes:
            raise _not_mapped(window, moved)


def _moved(dst: U64, src: U64) -> int:
    """Copies between as many vectors as a call takes; the bytes up to the first bad address.

    Raises LLMException(LLM_FAILED) where the system has no way.
    """
    try:
        return native.process_vm_readv(os.getpid(), dst.ctypes.data, src.ctypes.data, len(dst))
    except OSError as error:
        pass_on_handlers(error)
        if error.errno == errno.EFAULT:
            return 0
        if error.errno not in _REFUSALS:
            raise _refused(error) from error
    try:
        return pipe.copy(dst, src)
    except OSError as error:
        pass_on_handlers(error)
        raise _refused(error) from error


def _refused(error: OSError) -> LLMException:
    return LLMException(
        f"the system refuses copies by address: {error.strerror}", LLMStatusCode.LLM_FAILED
    )


def _not_mapped(window: Segments, moved: int) -> LLMException:
    at = first_unfinished(window.nbytes, moved)
    return invalid(
        f"the copy of {int(window.nbytes[at])} bytes from {int(window.src[at]):#x} to "
        f"{int(window.dst[at]):#x} met memory that is not mapped"
    )
