"""Copies within this process, by address: `process_vm_readv` on ourselves.

The kernel answers EFAULT where a memcpy of ours would crash.
"""

from __future__ import annotations

import errno
import os
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from llm_datadist.core.segments import first_unfinished, iovecs
from llm_datadist.errors import LLMException, LLMStatusCode, invalid
from llm_datadist.memory import native

if TYPE_CHECKING:
    import numpy.typing as npt

    from llm_datadist.core.segments import U64, Segments
    from llm_datadist.running.movers import Call, Movers

_PIECE_NBYTES = 64 * 1024 * 1024


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
    return buffer[: _readv(ours.ctypes.data, window.ctypes.data, len(window))]


def scatter(data: npt.NDArray[np.uint8], vectors: U64) -> int:
    """Copies the data to where the vectors point, in order; how much of it had a place.

    Raises LLMException(LLM_PARAM_INVALID) for memory that is not mapped.
    """
    window = _first(vectors, len(data))
    wanted = int(window[:, 1].sum())
    theirs = _consecutive(data, window)
    if _readv(window.ctypes.data, theirs.ctypes.data, len(window)) != wanted:
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
        window = part.slice(start, start + native.IOV_MAX)
        at = 16 * start
        moved = _readv(dst.ctypes.data + at, src.ctypes.data + at, len(window))
        if moved != window.total_nbytes:
            raise _not_mapped(window, moved)


def _readv(dst_addr: int, src_addr: int, count: int) -> int:
    try:
        return native.process_vm_readv(os.getpid(), dst_addr, src_addr, count)
    except OSError as error:
        if error.errno is None:  # no system call's: a signal's handler raised it
            raise
        if error.errno == errno.EFAULT:
            return 0
        raise LLMException(
            f"the system refuses copies by address: {error.strerror}; in a container, let its "
            "seccomp profile allow process_vm_readv",
            LLMStatusCode.LLM_FAILED,
        ) from error


def _not_mapped(window: Segments, moved: int) -> LLMException:
    at = first_unfinished(window.nbytes, moved)
    return invalid(
        f"the copy of {int(window.nbytes[at])} bytes from {int(window.src[at]):#x} to "
        f"{int(window.dst[at]):#x} met memory that is not mapped"
    )
