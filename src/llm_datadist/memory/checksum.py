"""Checksums of memory by address: XXH3, from the package xxhash (the extra `integrity`)."""

from __future__ import annotations

import time
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from llm_datadist.core.segments import iovecs
from llm_datadist.errors import LLMException, LLMStatusCode, invalid
from llm_datadist.memory.local import Walk

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_datadist.core.segments import U64

_CHUNK_NBYTES = 1024 * 1024


def require_checksums() -> None:
    """Raises LLMException(LLM_FEATURE_NOT_ENABLED) where the package is missing."""
    if find_spec("xxhash") is None:
        raise LLMException(
            "verify_transfers needs xxhash: pip install xxhash",
            LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
        )


class Checksum:
    """The checksum of bytes in order, made bit by bit; by one thread at a time."""

    def __init__(self, addrs: U64, nbytes: U64) -> None:
        """Raises LLMException(LLM_FEATURE_NOT_ENABLED)."""
        require_checksums()
        import xxhash

        self._sum = xxhash.xxh3_64()
        self._walk, self._left_nbytes = Walk(iovecs(addrs, nbytes)), int(nbytes.sum())
        self._buffer = np.empty(_CHUNK_NBYTES, dtype=np.uint8)

    def go_on(self, require: Callable[[], object], for_s: float) -> bool:
        """Whether it is made; for so long it is gone on with.

        `require` is called before each bit, and raises to end it. Raises
        LLMException(LLM_PARAM_INVALID) for memory that is not mapped.
        """
        until = time.monotonic() + for_s
        while self._left_nbytes:
            require()
            data = self._walk.gather(self._buffer)
            if not len(data):
                raise invalid(f"the address {int(self._walk.left()[0, 0]):#x} is not mapped memory")
            self._sum.update(data.data)
            self._left_nbytes -= len(data)
            if time.monotonic() > until:
                break
        return not self._left_nbytes

    @property
    def value(self) -> int:
        """When it is made."""
        return int(self._sum.intdigest())


def digest_of(addrs: U64, nbytes: U64, require: Callable[[], object]) -> int:
    """The checksum of these bytes. Raises what `Checksum` does."""
    checksum = Checksum(addrs, nbytes)
    checksum.go_on(require, float("inf"))
    return checksum.value
