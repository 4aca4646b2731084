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


class Walk:
    """Memory by address as one sequence of bytes, gone over bit by bit. By one thread at a time."""

    def __init__(self, vectors: U64) -> None:
        self._vectors = vectors
        self._ends = np.cumsum(vectors[:, 1])
        self._done = 0

    def gather(self, buffer: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """The next bytes, in the buffer; none when the first of them is bad, or none is left."""
        here, there = self._next(buffer)
        moved = _moved(here, there)
        self._done += moved
        return buffer[:moved]

    def scatter(self, data: npt.NDArray[np.uint8]) -> int:
        """Copies the data to where the next bytes are to be; how much of it had a place.

        Raises LLMException(LLM_PARAM_INVALID) for memory that is not mapped.
        """
        here, there = self._next(data)
        moved = _moved(there, here)
        if moved != here[0, 1]:
            raise invalid(
                "a local address of the transfer is not mapped memory: "
                "was the tensor freed after it was registered?"
            )
        self._done += moved
        return moved

    def left(self) -> U64:
        """The vectors of what is left."""
        return self._from(self._first())

    def _first(self) -> int:
        return int(self._ends.searchsorted(np.uint64(self._done), "right"))

    def _from(self, first: int, last: int | None = None) -> U64:
        """From the first vector that has bytes left; without those of it that are done."""
        vectors = self._vectors[first:last].copy()
        if len(vectors):
            done = np.uint64(self._done) + vectors[0, 1] - self._ends[first]
            vectors[0, 0] += done
            vectors[0, 1] -= done
        return vectors

    def _next(self, buffer: npt.NDArray[np.uint8]) -> tuple[U64, U64]:
        """The vector of the buffer, and those of as many bytes to come: no more than a call takes.

        Or than there are.
        """
        first, goal = self._first(), self._done + len(buffer)
        last = int(self._ends.searchsorted(np.uint64(goal)))
        last = min(last, first + native.IOV_MAX - 1, len(self._ends) - 1)
        window, nbytes = self._from(first, last + 1), 0
        if len(window):
            end = int(self._ends[last])
            nbytes = min(end, goal) - self._done
            if end > goal:
                window[-1, 1] -= np.uint64(end - goal)
        return np.array(((buffer.ctypes.data, nbytes),), dtype=np.uint64), window


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
    """Copies between vectors of as many bytes, no more than a call takes of either.

    The bytes up to the first bad address.

    Raises LLMException(LLM_FAILED) where the system has no way.
    """
    try:
        return native.process_vm_readv(
            os.getpid(), dst.ctypes.data, src.ctypes.data, len(dst), len(src)
        )
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
