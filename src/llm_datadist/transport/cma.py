"""Same host: `process_vm_readv`, one copy from the peer's memory to ours, without its doing.

Which process the peer is, the kernel says (`same_host.py`), and never the peer.

Needs the same host, network and PID namespace and user, and under Yama a ptracer grant. Whether it
works is found out by reading the peer's nonce, not by guessing from such facts; they only serve to
say why.
"""

from __future__ import annotations

import errno
import mmap
import os
import signal
from array import array
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llm_datadist.core.calls import MOST_WASTE_NBYTES, calls_of
from llm_datadist.core.combs import Combs
from llm_datadist.core.generations import WORD_NBYTES
from llm_datadist.core.segments import FEW, first_unfinished, iovecs, joined
from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.memory import native
from llm_datadist.running.movers import MIN_PART_NBYTES
from llm_datadist.system_errors import pass_on_handlers, refusals_ignored
from llm_datadist.transport.base import (
    AllMemory,
    Channel,
    PathUnavailable,
    StaleCache,
    Streams,
)

if TYPE_CHECKING:
    from llm_datadist.core.combs import Pieces
    from llm_datadist.core.remote import Guard
    from llm_datadist.core.segments import U64, Segments
    from llm_datadist.running.deadline import Deadline
    from llm_datadist.running.movers import Call, Movers
    from llm_datadist.transport.same_host import Process

#: one system call moves at most this much, so that a deadline is looked at in time
_CALL_NBYTES = 64 * 1024 * 1024
_PTRACE_SCOPE = Path("/proc/sys/kernel/yama/ptrace_scope")


class CmaTransport(AllMemory):
    """Cross-memory attach, as Linux calls it."""

    name = "cma"
    asks_owner = False
    may_wait = False

    def __init__(self, movers: Movers) -> None:
        self._movers = movers

    def offer(self) -> bytes | None:
        if ptrace_scope() in (1, None):
            with refusals_ignored():  # the peer's probe then fails and says why
                native.allow_tracing_by_same_user()
        return b""  # where we are to be met is the link's to say

    def open(self, offer: bytes, streams: Streams) -> Channel:
        process = streams.process
        if process is None:
            raise PathUnavailable("the ends did not meet on one host")
        if process.pid == 0:
            raise PathUnavailable(
                "the peer is in another PID namespace: let the containers share one (--pid)"
            )
        # what a peer names is read with our rights, whatever program it may have become meanwhile
        if objection := process.objection:
            raise PathUnavailable(objection)
        return CmaChannel(process, self._movers)

    def close(self) -> None:
        pass


class CmaChannel:
    """Reads one peer's memory."""

    def __init__(self, process: Process, movers: Movers) -> None:
        self._pid = process.pid
        #: the very process that made the connection, which others may have by now
        self._pidfd = _pidfd(process)
        self._movers = movers
        self._is_closed = False

    def read(self, pieces: Pieces, guard: Guard, deadline: Deadline) -> None:
        if len(pieces) <= FEW and self._read_few(pieces.flat(), guard):
            return
        if pieces.total_nbytes < 2 * MIN_PART_NBYTES:  # not worth another thread
            self._read_part(pieces, guard, deadline, None)
            return
        parts = pieces.bounded(_CALL_NBYTES).split(self._movers.parts_of(pieces.total_nbytes))
        tasks = [partial(self._read_part, part, guard, deadline) for part in parts]
        self._movers.run(tasks, deadline.token)

    def close(self) -> None:
        self._is_closed = True
        if self._pidfd is not None:
            # a thread that looks at it still is about to fail anyway
            pidfd, self._pidfd = self._pidfd, None
            os.close(pidfd)

    def _read_few(self, segments: Segments, guard: Guard) -> bool:
        """Reads in one call; False when it is too much, or anything went wrong: read again then."""
        words = array("Q", (0, 0))
        word_addr = words.buffer_info()[0]
        local, remote = [word_addr, WORD_NBYTES], [guard.word_addr, WORD_NBYTES]
        total_nbytes = 2 * WORD_NBYTES
        for src, dst, nbytes in zip(*segments.lists, strict=True):
            local += dst, nbytes
            remote += src, nbytes
            total_nbytes += nbytes
        if total_nbytes > MIN_PART_NBYTES:
            return False
        local += word_addr + WORD_NBYTES, WORD_NBYTES
        remote += guard.word_addr, WORD_NBYTES
        ours, theirs = array("Q", local), array("Q", remote)
        if self._is_closed:
            return False
        try:
            moved = native.process_vm_readv(
                self._pid, ours.buffer_info()[0], theirs.buffer_info()[0], len(local) // 2
            )
        except OSError as error:
            pass_on_handlers(error)
            return False
        is_right = moved == total_nbytes and words[0] == words[1] == guard.generation
        return is_right and not _has_ended(self._pidfd) and not self._is_closed

    def _read_part(self, part: Pieces, guard: Guard, deadline: Deadline, call: Call | None) -> None:
        if isinstance(part, Combs):
            self._read_combs(part, guard, deadline, call)
            return
        words = np.zeros(2, dtype=np.uint64)
        addr = words.ctypes.data
        ours, behind = (addr, WORD_NBYTES), (addr + WORD_NBYTES, WORD_NBYTES)
        theirs = guard.word_addr, WORD_NBYTES
        # the word goes in front of each call's vectors, and behind the last one's
        windows = part.windows(native.IOV_MAX - 2, _CALL_NBYTES)
        following = next(windows, None)
        while (window := following) is not None:
            self._require(deadline, call)
            following = next(windows, None)
            last = following is None
            local = iovecs(window.dst, window.nbytes, [ours], [behind] * last)
            remote = iovecs(window.src, window.nbytes, [theirs], [theirs] * last)
            nbytes = int(local[:, 1].sum())
            if nbytes < mmap.PAGESIZE * len(local):
                remote = joined(remote)
            self._call(local, remote, nbytes, guard)
            if words[0] != guard.generation:  # nothing more is read of what is stale
                raise StaleCache(guard)
        if words[1] != guard.generation:
            raise StaleCache(guard)
        if _has_ended(self._pidfd):  # its number may be another process's by now
            raise self._gone()

    def _read_combs(self, part: Combs, guard: Guard, deadline: Deadline, call: Call | None) -> None:
        """The same; the word behind all is read by a call of its own."""
        word = np.zeros(1, dtype=np.uint64)
        ours, theirs = (word.ctypes.data, WORD_NBYTES), (guard.word_addr, WORD_NBYTES)
        waste = np.empty(MOST_WASTE_NBYTES, dtype=np.uint8)
        calls = calls_of(part, native.IOV_MAX, _CALL_NBYTES, waste.ctypes.data)
        for sources, destinations in calls:
            sources[:, 0], destinations[:, 0] = theirs, ours
            nbytes = int(destinations[0, :, 1].sum())
            for local, remote in zip(destinations, sources, strict=True):
                self._require(deadline, call)
                self._call(local, remote, nbytes, guard)
                if word[0] != guard.generation:
                    raise StaleCache(guard)
        self._call(destinations[0, :1], sources[0, :1], WORD_NBYTES, guard)
        if word[0] != guard.generation:
            raise StaleCache(guard)
        if _has_ended(self._pidfd):
            raise self._gone()

    def _require(self, deadline: Deadline, call: Call | None) -> None:
        """Raises LLMException when nothing more is to be read."""
        deadline.require("the transfer")
        if self._is_closed:
            raise LLMException("the link was cut", LLMStatusCode.LLM_NOT_YET_LINK)
        if call is not None:
            call.require()

    def _call(self, local: U64, remote: U64, nbytes: int, guard: Guard) -> None:
        try:
            moved = native.process_vm_readv(
                self._pid, local.ctypes.data, remote.ctypes.data, len(local), len(remote)
            )
        except OSError as error:
            pass_on_handlers(error)
            raise self._explain(error, local, remote, guard) from error
        if moved != nbytes:
            raise self._bad_address(moved, local, remote, guard)

    def _explain(self, error: OSError, local: U64, remote: U64, guard: Guard) -> LLMException:
        if error.errno == errno.ESRCH:
            return self._gone()
        if error.errno == errno.EFAULT:
            return self._bad_address(0, local, remote, guard)
        if error.errno in (errno.EPERM, errno.EACCES, errno.ENOSYS):
            return LLMException(
                f"process_vm_readv of process {self._pid}: {error.strerror}; " + _why_denied(),
                LLMStatusCode.LLM_FAILED,
            )
        return LLMException(
            f"process_vm_readv of process {self._pid}: {error}", LLMStatusCode.LLM_FAILED
        )

    def _gone(self) -> LLMException:
        return LLMException(
            f"process {self._pid} of the peer is gone", LLMStatusCode.LLM_NOT_YET_LINK
        )

    def _bad_address(self, moved: int, local: U64, remote: U64, guard: Guard) -> LLMException:
        """Why the kernel stopped behind so many bytes: a stale cache, our address or the peer's."""
        word = np.zeros(1, dtype=np.uint64)
        if not self._can_read(self._pid, guard.word_addr, WORD_NBYTES, word):
            return StaleCache(guard)
        if word[0] != guard.generation:
            return StaleCache(guard)
        addr, nbytes = local[first_unfinished(local[:, 1], moved)].tolist()
        landing = np.zeros(nbytes, dtype=np.uint8)
        if not self._can_read(os.getpid(), addr, nbytes, landing):
            return _not_mapped("local", addr, nbytes)
        addr, nbytes = remote[first_unfinished(remote[:, 1], moved)].tolist()
        return _not_mapped("remote", addr, nbytes)

    def _can_read(self, pid: int, addr: int, nbytes: int, landing: npt.NDArray[Any]) -> bool:
        vectors = np.array([[landing.ctypes.data, nbytes], [addr, nbytes]], dtype=np.uint64)
        base = vectors.ctypes.data
        try:
            return native.process_vm_readv(pid, base, base + 16, 1) == nbytes
        except OSError as error:
            pass_on_handlers(error)
            return False


def _pidfd(process: Process) -> int | None:
    """What stands for a process even when its number is another's. Raises PathUnavailable."""
    try:
        pidfd = process.open_pidfd()
    except OSError as error:
        pass_on_handlers(error)
        if error.errno in (errno.ESRCH, errno.EINVAL):
            raise PathUnavailable(f"process {process.pid} of the peer is gone") from error
        raise PathUnavailable(f"process {process.pid} of the peer: {error.strerror}") from error
    if pidfd is not None and _has_ended(pidfd):
        os.close(pidfd)
        raise PathUnavailable(f"process {process.pid} of the peer is gone")
    return pidfd


def _has_ended(pidfd: int | None) -> bool:
    """Whether its number may be another's by now, or it runs another user's program."""
    if pidfd is None:
        return False
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except OSError as error:
        pass_on_handlers(error)
        return error.errno in (errno.ESRCH, errno.EPERM, errno.EBADF)
    return False


def ptrace_scope() -> int | None:
    """Yama's restriction on reading other processes: 0 none, 1 by grant, 2 root only, 3 never.

    None where there is no Yama, or no /proc/sys that would tell (a service's ProcSubset=pid).
    """
    try:
        return int(_PTRACE_SCOPE.read_text())
    except OSError as error:
        pass_on_handlers(error)
        return None
    except ValueError:
        return None


def _not_mapped(side: str, addr: int, nbytes: int) -> LLMException:
    return LLMException(
        f"the {side} address {addr:#x} (+{nbytes} bytes) is not mapped memory: "
        "was the tensor freed after it was registered?",
        LLMStatusCode.LLM_PARAM_INVALID,
    )


def _why_denied() -> str:
    scope = ptrace_scope() or 0
    if scope >= 3:
        return (
            "kernel.yama.ptrace_scope is 3, which stays so until the next boot: set it to 1 in "
            "/etc/sysctl.d, and boot"
        )
    if scope == 2:
        return "lower kernel.yama.ptrace_scope to 1, or grant CAP_SYS_PTRACE"
    if scope == 1:
        return (
            "kernel.yama.ptrace_scope is 1, and the peer's process has not said, or says no more, "
            "that others may read it: was the scope 0 when it started? Start it again"
        )
    return "in a container, allow it (--cap-add SYS_PTRACE, or a seccomp profile that does)"
