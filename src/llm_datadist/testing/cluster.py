"""Clusters in processes of their own, driven from a test.

A `Node` is one cluster with memory that a test can fill and look at. It lives in the test's own
process, or in a `NodeProcess`, which runs plain functions on its node:

    def register(node: Node) -> int:
        return node.blocks_cache(num_tensors=2, num_blocks=8, block_nbytes=64, seed=1).cache_id

    with NodeProcess() as prefill:
        prefill.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0")
        cache_id = prefill.call(register)
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import traceback
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from llm_datadist.cluster_info import LLMClusterInfo
from llm_datadist.config import LLMConfig
from llm_datadist.datadist import LLMDataDist
from llm_datadist.types import CacheDesc, DataType, LLMRole, Placement

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.connection import Connection

    from typing_extensions import Self

    from llm_datadist.cache import Cache
    from llm_datadist.cache_manager import CacheManager
    from llm_datadist.errors import LLMStatusCode
    from llm_datadist.keys import BlocksCacheKey, CacheKey

T = TypeVar("T")
Bytes = npt.NDArray[np.uint8]

_CALL_S = 60.0


class Node:
    """A cluster and its caches' memory, as numpy arrays of bytes by cache id."""

    def __init__(self) -> None:
        self._datadist: LLMDataDist | None = None
        self.arrays: dict[int, Bytes] = {}
        self.caches: dict[int, Cache] = {}

    @property
    def datadist(self) -> LLMDataDist:
        assert self._datadist is not None, "call start first"
        return self._datadist

    @property
    def manager(self) -> CacheManager:
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

    def link(
        self, port: int, cluster_id: int | None = None, timeout: int = 3000, host: str = "127.0.0.1"
    ) -> LLMStatusCode:
        return self.datadist.link_clusters([cluster_info(port, cluster_id, host)], timeout)[1][0]

    def unlink(
        self, port: int, cluster_id: int, timeout: int = 3000, *, force: bool = False
    ) -> LLMStatusCode:
        infos = [cluster_info(port, cluster_id)]
        return self.datadist.unlink_clusters(infos, timeout, force)[1][0]

    def _keep(self, cache: Cache, array: Bytes) -> Cache:
        self.arrays[cache.cache_id] = array
        self.caches[cache.cache_id] = cache
        return cache


class NodeProcess:
    """A process with a node. A context manager; leaving it ends the process, whatever its state."""

    def __init__(self) -> None:
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def call(self, function: Callable[..., T], *args: object, **kwargs: object) -> T:
        """Runs `function(node, *args)` there; its result, or the exception it raised."""
        self.begin(function, *args, **kwargs)
        result: T = self.result()  # type: ignore[assignment]  # what the function returned
        return result

    def begin(self, function: Callable[..., object], *args: object, **kwargs: object) -> None:
        """Starts a call whose outcome `result` waits for."""
        self._pipe.send((function, args, kwargs))

    def result(self, timeout_s: float = _CALL_S) -> object:
        if not self._pipe.poll(timeout_s):
            raise TimeoutError(f"node process {self.pid} did not answer within {timeout_s} s")
        result, error, trace = self._pipe.recv()
        if error is not None:
            error.add_note(trace) if hasattr(error, "add_note") else None
            raise error
        return result

    def pause(self) -> None:
        """SIGSTOP, waited for: the process stands still, its connections stay open."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitpid(self.pid, os.WUNTRACED)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, waited for. May be called again."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


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


def make_array(shape: tuple[int, ...], seed: int | None) -> Bytes:
    """Random bytes of a seed, the same in every process; zeros without one."""
    if seed is None:
        return np.zeros(shape, dtype=np.uint8)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def addrs_of(array: Bytes) -> list[int]:
    """The address of each tensor of an array whose first dimension counts them."""
    return [int(tensor.ctypes.data) for tensor in array]


def _serve(pipe: Connection) -> None:
    node = Node()
    while True:
        try:
            function, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((function(node, *args, **kwargs), None, ""))
        except BaseException as error:  # the test gets it
            pipe.send((None, error, traceback.format_exc()))
