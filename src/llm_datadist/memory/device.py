"""The door for memory that is no process memory, such as a GPU's.

All code between the user and a transport treats an address as a number that only the memory's
*space* can make sense of. What must touch the bytes asks the space's Device, and a transport is
only told of memory in the spaces that it reaches. So far there is one space, the process's own
memory: "device" caches lie in it as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from llm_datadist.core.segments import Segments

#: the space of this process's own memory
HOST: Final = "host"


class Reservation(Protocol):
    """A range of memory to allocate from."""

    #: where it begins
    addr: int

    def view(self, addr: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """`nbytes` at an address of it, as an array that keeps it; process memory only."""
        ...

    def close(self) -> None:
        """Gives the memory back, when the last view is gone. May be called again."""
        ...


class Device(Protocol):
    """What a kind of memory can do. Thread-safe."""

    #: the name of its space: "host", or a device such as "cuda:0"
    space: str

    def reserve(self, nbytes: int) -> Reservation:
        """A range of at least so many bytes. Raises LLMException(LLM_OUT_OF_MEMORY)."""
        ...

    def copy(self, segments: Segments) -> None:
        """Copies within the space, or between it and process memory.

        Raises LLMException(LLM_PARAM_INVALID) for memory that is not there.
        """
        ...

    def export(self, addr: int, nbytes: int) -> bytes:
        """What another process on this host needs to `open` this memory."""
        ...

    def open(self, exported: bytes) -> int:
        """The address here of memory that a peer exported. Raises LLMException."""
        ...
