"""A NIXL agent: the few calls of its bindings that the transport needs, with our errors.

The bindings, not NIXL's class around them: that one leaves no choice but a progress thread that
takes a whole core when nothing happens.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_datadist.errors import LLMException, LLMStatusCode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from llm_datadist.core.segments import U64, Segments

#: the wheels by CUDA version; without a GPU any of them does
_PACKAGES = ("nixl_cu13", "nixl_cu12", "nixl_rocm")
_BACKEND = "UCX"
#: how long the progress thread of an owner sleeps when nothing wakes it
_PROGRESS_US = 10_000
#: a transfer is asked for so often in a row, and from then on at this interval
_EAGER_POLLS = 100
_POLL_S = 20e-6


def package() -> str | None:
    """The installed package with NIXL's bindings, if any; nothing is imported."""
    return next((name for name in _PACKAGES if importlib.util.find_spec(name)), None)


def _bindings() -> Any:  # noqa: ANN401  # NIXL has no types
    """Raises LLMException where the installed package cannot be used."""
    try:
        return importlib.import_module(f"{package()}._bindings")
    except ImportError as error:
        raise LLMException(
            f"NIXL is installed and cannot be imported: {error}", LLMStatusCode.LLM_FAILED
        ) from error


class Agent:
    """One agent with UCX. For one thread at a time, where `serves` is false."""

    def __init__(self, name: str, *, threads: int = 0, serves: bool) -> None:
        """`serves`: peers read our memory, which takes a thread that answers. Raises LLMException.

        `threads` help with large transfers that this agent makes.
        """
        self.name = name
        nixl = self._nixl = _bindings()
        config = nixl.nixlAgentConfig()
        config.useProgThread, config.pthrDelay = serves, _PROGRESS_US
        config.useListenThread = False
        config.syncMode = nixl.NIXL_THREAD_SYNC_STRICT if serves else nixl.NIXL_THREAD_SYNC_NONE
        with self._errors("starting"):
            self._agent = nixl.nixlAgent(name, config)
            settings = {"num_threads": str(threads)} if threads > 1 else {}
            self._agent.createBackend(_BACKEND, settings)

    def register(self, addrs: Iterable[int], nbytes: int) -> object:
        """Makes memory known to this agent; what `deregister` needs. Raises LLMException."""
        nixl = self._nixl
        memory = nixl.nixlRegDList(nixl.DRAM_SEG, [(addr, nbytes, 0, b"") for addr in addrs])
        with self._errors("registering memory (is `ulimit -l` large enough?)"):
            self._agent.registerMem(memory, [])
        return memory

    def deregister(self, memory: object) -> None:
        with self._errors("giving memory back"):
            self._agent.deregisterMem(memory, [])

    def address(self) -> bytes:
        """How other agents reach this one, and nothing of its memory."""
        nixl = self._nixl
        with self._errors("describing itself"):
            found: bytes = self._agent.getLocalPartialMD(
                nixl.nixlRegDList(nixl.DRAM_SEG, []), True, []
            )
        return found

    def metadata(self) -> bytes:
        """The address, and all memory registered now."""
        with self._errors("describing its memory"):
            found: bytes = self._agent.getLocalMD()
        return found

    def load(self, metadata: bytes) -> str:
        """Makes another agent known by its address or metadata; its name."""
        with self._errors("reaching the peer's agent"):
            name: bytes = self._agent.loadRemoteMD(metadata)
        return name.decode()

    def read(self, peer: str, segments: Segments, go_on: Callable[[], object]) -> None:
        """Copies the peer's `src` to our `dst`; `go_on` raises when nobody waits any more.

        After any error the read may still be under way: only `close` ends it for good. So nothing
        here but `self._agent` may name the agent: a traceback would keep it alive.
        """
        nixl = self._nixl
        nbytes = segments.nbytes
        local, remote = _descriptors(segments.dst, nbytes), _descriptors(segments.src, nbytes)
        with self._errors("a read"):
            handle = self._agent.createXferReq(
                nixl.NIXL_READ,
                nixl.nixlXferDList(nixl.DRAM_SEG, local),
                nixl.nixlXferDList(nixl.DRAM_SEG, remote),
                peer,
                "",
                [],
            )
            try:
                state = self._agent.postXferReq(handle, "")
                polls = 0
                while state == nixl.NIXL_IN_PROG:
                    go_on()
                    time.sleep(0.0 if polls < _EAGER_POLLS else _POLL_S)
                    polls += 1
                    state = self._agent.getXferStatus(handle)
            finally:
                with suppress(Exception):  # one that cannot be ended ends with the agent
                    self._agent.releaseXferReq(handle)
        if state != nixl.NIXL_SUCCESS:
            raise LLMException(f"NIXL: a read ended as {state}", LLMStatusCode.LLM_FAILED)

    def close(self) -> None:
        """Ends the agent, its connections, and with them every read that has not come to an end."""
        self._agent = None

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """NIXL's exceptions as ours."""
        nixl = self._nixl
        try:
            yield
        except nixl.nixlRemoteDisconnectError as error:
            raise LLMException(
                f"NIXL: {what}: the peer is gone ({error})", LLMStatusCode.LLM_NOT_YET_LINK
            ) from error
        except nixl.nixlNotFoundError as error:
            raise LLMException(
                f"NIXL: {what}: memory at one of the ends is not registered ({error})",
                LLMStatusCode.LLM_PARAM_INVALID,
            ) from error
        except LLMException:
            raise
        except Exception as error:  # its other exceptions have no common base
            raise LLMException(
                f"NIXL: {what} failed: {type(error).__name__}: {error}", LLMStatusCode.LLM_FAILED
            ) from error


def _descriptors(addrs: U64, nbytes: U64) -> U64:
    """NIXL's rows of address, length and device."""
    rows = np.zeros((len(addrs), 3), dtype=np.uint64)
    rows[:, 0], rows[:, 1] = addrs, nbytes
    return rows
