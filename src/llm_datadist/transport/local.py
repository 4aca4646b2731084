"""Copies within this process, by address: `process_vm_readv` on ourselves.

The kernel answers EFAULT where a memcpy of ours would crash.
"""

from __future__ import annotations

import errno
import os
from functools import partial
from typing import TYPE_CHECKING

from llm_datadist.core.segments import first_unfinished, iovecs
from llm_datadist.errors import LLMException, LLMStatusCode, invalid
from llm_datadist.transport import native

if TYPE_CHECKING:
    from llm_datadist.core.segments import Segments
    from llm_datadist.transport.movers import Movers

_PIECE_NBYTES = 64 * 1024 * 1024


def copy(segments: Segments, movers: Movers) -> None:
    """Copies every segment. Raises LLMException(LLM_PARAM_INVALID) for memory that is not mapped.

    Source and destination must not overlap.
    """
    if len(segments):
        parts = segments.bounded(_PIECE_NBYTES).split(movers.parts_of(segments.total_nbytes))
        movers.run([partial(_copy_part, part) for part in parts])


def _copy_part(part: Segments) -> None:
    src, dst = iovecs(part.src, part.nbytes), iovecs(part.dst, part.nbytes)
    for start in range(0, len(part), native.IOV_MAX):
        window = part.slice(start, start + native.IOV_MAX)
        at = 16 * start
        moved = _readv(dst.ctypes.data + at, src.ctypes.data + at, len(window))
        if moved != window.total_nbytes:
            raise _not_mapped(window, moved)


def _readv(dst_addr: int, src_addr: int, count: int) -> int:
    try:
        return native.process_vm_readv(os.getpid(), dst_addr, src_addr, count)
    except OSError as error:
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
