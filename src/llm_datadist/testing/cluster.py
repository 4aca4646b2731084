"""Clusters in processes of their own, driven from a test.

A `Node` is one cluster with memory that a test can fill and look at. It lives in the test's own
process, or in a `NodeProcess`, which runs its methods, and plain functions, on its node:

    with NodeProcess() as prefill:
        prefill.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0")
        cache_id = prefill.call(Node.add_blocks, num_blocks=8, block_nbytes=64, seed=1)
"""

from __future__ import annotations

import errno
import socket
from contextlib import ExitStack, suppress
from random import SystemRandom
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llm_datadist.cluster_info import LLMClusterInfo
from llm_datadist.config import LLMConfig
from llm_datadist.datadist import LLMDataDist
from llm_datadist.testing.process import ObjectProcess
from llm_datadist.types import CacheDesc, DataType, LLMRole, Placement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_datadist.cache import Cache
    from llm_datadist.cache_manager import CacheManager
    from llm_datadist.errors import LLMStatusCode
    from llm_datadist.keys import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex

Bytes = npt.NDArray[np.uint8]
#: below those that Linux gives to connections
_PORTS, _MOST_TRIES = range(20_000, 32_000), 100


class Node:
    """A cluster and its caches' memory, as numpy arrays of bytes by cache id.

    Caches stay in their process: `add_blocks`, `add_rows`, `array_of`, `pull_blocks` and
    `pull_cache` name them by id, for a test that drives the node from another process.
    """

    def __init__(self) -> None:
        self._datadist: LLMDataDist | None = None
        self.arrays: dict[int, Bytes] = {}
        self.caches: dict[int, Cache] = {}

    @property
    def datadist(self) -> LLMDataDist:
        """The cluster. `start` comes first."""
        assert self._datadist is not None, "call start first"
        return self._datadist

    @property
    def manager(self) -> CacheManager:
        """Its cache manager."""
        return self.datadist.cache_manager

    def start(self, role: LLMRole, cluster_id: int, **settings: object) -> int:
        """Initialises the cluster with LLMConfig properties; the port it listens on, or 0."""
        config = LLMConfig()
        config.enable_cache_manager = True
        for name, value in settings.items():
            setattr(config, name, value)
        self._datadist = LLMDataDist(role, cluster_id)
        self._datadist.init(config.generate_options())
        endpoint = self._datadist.listen_endpoint
        return endpoint.port if endpoint else 0

    def stop(self) -> None:
        """Finalizes the cluster, if there is one, and forgets its caches."""
        if self._datadist is not None:
            self._datadist.finalize()
        self._datadist = None
        self.arrays.clear()
        self.caches.clear()

    def blocks_cache(
        self,
        num_tensors: int = 2,
        num_blocks: int = 8,
        block_nbytes: int = 64,
        seed: int | None = None,
        key: BlocksCacheKey | None = None,
        placement: Placement = Placement.DEVICE,
        remote_accessible: bool | None = None,
    ) -> Cache:
        """Registers a blocks cache over an array [tensors, blocks, bytes], random or zeros."""
        desc = CacheDesc(num_tensors, [num_blocks, block_nbytes], DataType.DT_INT8, placement)
        array = make_array((num_tensors, num_blocks, block_nbytes), seed)
        cache = self.manager.register_blocks_cache(desc, addrs_of(array), key, remote_accessible)
        return self._keep(cache, array)

    def rows_cache(
        self,
        num_tensors: int = 2,
        num_rows: int = 4,
        row_nbytes: int = 256,
        seed: int | None = None,
        keys: Sequence[CacheKey] = (),
        placement: Placement = Placement.DEVICE,
        remote_accessible: bool | None = None,
    ) -> Cache:
        """Registers a continuous cache over an array [tensors, rows, bytes], random or zeros."""
        desc = CacheDesc(num_tensors, [num_rows, row_nbytes], DataType.DT_INT8, placement)
        array = make_array((num_tensors, num_rows, row_nbytes), seed)
        cache = self.manager.register_cache(desc, addrs_of(array), keys, remote_accessible)
        return self._keep(cache, array)

    def add_blocks(
        self,
        num_tensors: int = 2,
        num_blocks: int = 8,
        block_nbytes: int = 64,
        seed: int | None = None,
        key: BlocksCacheKey | None = None,
    ) -> int:
        """As `blocks_cache`; the cache id."""
        return self.blocks_cache(num_tensors, num_blocks, block_nbytes, seed, key).cache_id

    def add_rows(
        self,
        num_tensors: int = 2,
        num_rows: int = 4,
        row_nbytes: int = 256,
        seed: int | None = None,
        keys: Sequence[CacheKey] = (),
    ) -> int:
        """As `rows_cache`; the cache id."""
        return self.rows_cache(num_tensors, num_rows, row_nbytes, seed, keys).cache_id

    def array_of(self, cache_id: int) -> Bytes:
        """The memory of a cache that this node registered: [tensors, blocks or rows, bytes]."""
        return self.arrays[cache_id]

    def pull_blocks(
        self,
        src_cache_key: CacheKey | CacheKeyByIdAndIndex | BlocksCacheKey,
        cache_id: int,
        src_blocks: Sequence[int] = (),
        dst_blocks: Sequence[int] = (),
    ) -> None:
        """`CacheManager.pull_blocks` into a cache of this node. Raises as that does."""
        self.manager.pull_blocks(src_cache_key, self.caches[cache_id], src_blocks, dst_blocks)

    def pull_cache(
        self, cache_key: CacheKey | CacheKeyByIdAndIndex, cache_id: int, batch_index: int = 0
    ) -> None:
        """`CacheManager.pull_cache` into a cache of this node. Raises as that does."""
        self.manager.pull_cache(cache_key, self.caches[cache_id], batch_index)

    def link(
        self, port: int, cluster_id: int | None = None, timeout: int = 3000, host: str = "127.0.0.1"
    ) -> LLMStatusCode:
        """Links to the node that listens on `port`; the status, LLM_SUCCESS when it is linked."""
        return self.datadist.link_clusters([cluster_info(port, cluster_id, host)], timeout)[1][0]

    def unlink(
        self, port: int, cluster_id: int, timeout: int = 3000, *, force: bool = False
    ) -> LLMStatusCode:
        """Ends the link to a node; the status."""
        infos = [cluster_info(port, cluster_id)]
        return self.datadist.unlink_clusters(infos, timeout, force)[1][0]

    def _keep(self, cache: Cache, array: Bytes) -> Cache:
        self.arrays[cache.cache_id] = array
        self.caches[cache.cache_id] = cache
        return cache


class NodeProcess(ObjectProcess[Node]):
    """A process with a node. A context manager; leaving it ends the process, whatever its state."""

    def __init__(self) -> None:
        super().__init__(Node)


def cluster_info(
    port: int, cluster_id: int | None = None, host: str = "127.0.0.1"
) -> LLMClusterInfo:
    """How to reach a node."""
    info = LLMClusterInfo()
    if cluster_id is not None:
        info.remote_cluster_id = cluster_id
    info.append_local_ip_info("127.0.0.1", 0)
    info.append_remote_ip_info(host, port)
    return info


def free_port(count: int = 1) -> int:
    """A port of 127.0.0.1 that nobody has: for programs that do not take 0.

    The first of `count` in a row, for those that count on. Somebody else may take them before the
    caller does; connections do not, since the system gives those others. Raises OSError.
    """
    firsts = _PORTS[: max(0, len(_PORTS) - count + 1)]
    for port in SystemRandom().sample(firsts, min(len(firsts), _MOST_TRIES)):
        with ExitStack() as servers, suppress(OSError):
            for each in range(port, port + count):
                servers.enter_context(socket.create_server(("127.0.0.1", each)))
            return port
    raise OSError(errno.EADDRINUSE, f"{count} free port(s) in a row were not found")


def make_array(shape: tuple[int, ...], seed: int | None) -> Bytes:
    """Random bytes of a seed, the same in every process; zeros without one."""
    if seed is None:
        return np.zeros(shape, dtype=np.uint8)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def addrs_of(array: Bytes) -> list[int]:
    """The address of each tensor of an array whose first dimension counts them."""
    return [int(tensor.ctypes.data) for tensor in array]
