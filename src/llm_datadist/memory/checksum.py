"""Checksums of memory by address: XXH3, from the package xxhash (the extra `integrity`)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from llm_datadist.core.segments import iovecs, skip_bytes
from llm_datadist.errors import LLMException, LLMStatusCode, invalid
from llm_datadist.memory import native
from llm_datadist.memory.local import gather

if TYPE_CHECKING:
    from llm_datadist.core.segments import U64
    from llm_datadist.running.deadline import Deadline

_CHUNK_NBYTES = 1024 * 1024


def require_checksums() -> None:
    """Raises LLMException(LLM_FEATURE_NOT_ENABLED) where the package is missing."""
    if find_spec("xxhash") is None:
        raise LLMException(
            "verify_transfers needs xxhash: pip install xxhash",
            LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
        )


def digest_of(addrs: U64, nbytes: U64, deadline: Deadline) -> int:
    """The checksum of these bytes, in order.

    Raises LLMException: LLM_PARAM_INVALID for memory that is not mapped, LLM_TIMEOUT, and
    LLM_FEATURE_NOT_ENABLED.
    """
    require_checksums()
    import xxhash

    checksum = xxhash.xxh3_64()
    vectors, buffer = iovecs(addrs, nbytes), np.empty(_CHUNK_NBYTES, dtype=np.uint8)
    while len(vectors):
        deadline.require("the checksum of a transfer")
        data = gather(vectors, buffer)
        if not len(data) and int(vectors[0, 1]):
            raise invalid(f"the address {int(vectors[0, 0]):#x} is not mapped memory")
        checksum.update(data.data)
        vectors = skip_bytes(vectors, len(data), native.IOV_MAX)
    return int(checksum.intdigest())
