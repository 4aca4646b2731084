"""What a fresh interpreter needs, until the library is imported and until it has a block."""

from __future__ import annotations

import statistics
import subprocess
import sys
from typing import TYPE_CHECKING

from llm_datadist.cli.bench import ours
from llm_datadist.cli.bench.contestant import Job, Owner
from llm_datadist.cli.bench.scenarios import Figure
from llm_datadist.cli.bench.workload import SHAPES

if TYPE_CHECKING:
    from collections.abc import Iterator


def startup(rounds: int) -> Iterator[Figure]:
    """In a fresh interpreter, without its own start: importing, and to have a block of a peer's."""
    program = (
        "import time; begun = time.perf_counter(); import {0}; print(time.perf_counter() - begun)"
    )
    for module in ("llm_datadist", "numpy"):
        yield Figure(f"import {module}", _median_ms(program.format(module), rounds), "ms")
    yield from _first_block(rounds)


def _first_block(rounds: int) -> Iterator[Figure]:
    """From importing the library, in a fresh interpreter, to the first byte of a peer's."""
    job = Job(SHAPES["one-block"], path="cma")
    owner = Owner(ours.own, job)
    try:
        median_ms = _median_ms(_PROGRAM.format(port=owner.greeting[0]), rounds)
    finally:
        owner.close()
    yield Figure("from import to the first block", median_ms, "ms")


def _median_ms(program: str, rounds: int) -> float:
    """Of what the program says of itself, in seconds, in an interpreter of its own each time."""
    command = [sys.executable, "-c", program]
    seconds = [
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for _ in range(max(rounds, 5))
    ]
    return statistics.median(seconds) * 1e3


#: as a program would begin: its memory is there
_PROGRAM = """
import ctypes, time
memory = ctypes.create_string_buffer(64 * 32768)
begun = time.perf_counter()
from llm_datadist import *
config = LLMConfig()
config.enable_cache_manager = config.enable_remote_cache_accessible = True
datadist = LLMDataDist(LLMRole.DECODER, 2)
datadist.init(config.generate_options())
info = LLMClusterInfo()
info.remote_cluster_id = 1
info.append_local_ip_info("127.0.0.1", 0)
info.append_remote_ip_info("127.0.0.1", {port})
status, _ = datadist.link_clusters([info], 5000)
desc = CacheDesc(1, [64, 32768], DataType.DT_INT8)
key = BlocksCacheKey(2, 0)
cache = datadist.cache_manager.register_blocks_cache(desc, [ctypes.addressof(memory)], key)
datadist.cache_manager.pull_blocks(BlocksCacheKey(1, 0), cache, [3], [5])
print(time.perf_counter() - begun)
datadist.finalize()
"""
