"""This library as a contestant: its public interface between two processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKeyByIdAndIndex,
    DataType,
    LayerSynchronizer,
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMRole,
    LLMStatusCode,
    TransferWithCacheKeyConfig,
)
from llm_datadist.cli.bench.contestant import Job, Puller
from llm_datadist.cli.bench.workload import CacheMemory
from llm_datadist.cli.failure import CommandError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from llm_datadist.cli.bench.workload import Workload

OWNER_ID, READER_ID = 1, 2
KEY = BlocksCacheKey(OWNER_ID, 0)
_TIMEOUT_MS = 60_000


def start(role: LLMRole, cluster_id: int, job: Job, listen: str = "") -> LLMDataDist:
    """An initialised cluster."""
    config = LLMConfig()
    config.enable_cache_manager = True
    config.enable_remote_cache_accessible = job.is_accessible
    config.listen_ip_info = listen
    config.sync_kv_timeout = _TIMEOUT_MS
    config.transfer_path = job.path
    config.verify_transfers = job.verifies
    if job.threads:
        config.transfer_threads = job.threads
    datadist = LLMDataDist(role, cluster_id)
    datadist.init(config.generate_options())
    return datadist


def info(cluster_id: int, port: int) -> LLMClusterInfo:
    """A cluster of this host that listens there."""
    info = LLMClusterInfo()
    info.remote_cluster_id = cluster_id
    info.append_local_ip_info("127.0.0.1", 0)
    info.append_remote_ip_info("127.0.0.1", port)
    return info


def link(datadist: LLMDataDist, cluster_id: int, port: int) -> None:
    status, _ = datadist.link_clusters([info(cluster_id, port)], _TIMEOUT_MS)
    if status is not LLMStatusCode.LLM_SUCCESS:
        raise CommandError(f"the clusters could not be linked: {status}")


def register(
    datadist: LLMDataDist, workload: Workload, memory: CacheMemory, *, as_rows: bool
) -> Cache:
    """The memory as a blocks cache, or as one with a single row that holds all blocks."""
    manager = datadist.cache_manager
    addrs = memory.tensor_addrs
    if as_rows:
        desc = CacheDesc(workload.num_tensors, [1, workload.tensor_nbytes], DataType.DT_INT8)
        return manager.register_cache(desc, addrs)
    dims = [workload.num_blocks, workload.block_nbytes]
    desc = CacheDesc(workload.num_tensors, dims, DataType.DT_INT8)
    return manager.register_blocks_cache(desc, addrs, KEY)


def own(pipe: Connection, job: Job) -> None:
    """The other process: holds the source, or for a push the destination."""
    memory = CacheMemory(job.workload)
    if job.operation in _PULLS:
        memory.fill()
    datadist = start(LLMRole.PROMPT, OWNER_ID, job, "127.0.0.1:0")
    cache = register(datadist, job.workload, memory, as_rows=job.operation == "pull_cache")
    endpoint = datadist.listen_endpoint
    assert endpoint is not None
    pipe.send((endpoint.port, cache.cache_id))
    while True:
        try:
            verb = pipe.recv()
        except EOFError:
            return
        pipe.send(getattr(memory, verb)())


class Ours(Puller):
    """One operation of CacheManager."""

    def __init__(self, job: Job) -> None:
        super().__init__(job, own)
        workload = job.workload
        port, cache_id = self.owner.greeting
        self._datadist = start(LLMRole.DECODER, READER_ID, job)
        link(self._datadist, OWNER_ID, port)
        as_rows = job.operation == "pull_cache"
        self._cache = register(self._datadist, workload, self.memory, as_rows=as_rows)
        self._row = CacheKeyByIdAndIndex(OWNER_ID, cache_id)
        self._blocks = tuple(blocks.tolist() for blocks in workload.blocks())
        self._row_nbytes = workload.num_moved * workload.block_nbytes
        self._manager = self._datadist.cache_manager
        self.move = getattr(self, f"_{job.operation}")
        self.detail = self._datadist.links()[0].path
        if job.operation not in _PULLS:
            self.memory.fill()

    def poison(self) -> None:
        self._at_destination("poison")

    def has_arrived(self) -> bool:
        return bool(self._at_destination("has_arrived"))

    def close(self) -> None:
        self._datadist.finalize()
        super().close()

    def _at_destination(self, verb: str) -> object:
        if self.job.operation in _PULLS:
            return getattr(self.memory, verb)()
        self.owner.pipe.send(verb)
        return self.owner.pipe.recv()

    def _pull_blocks(self) -> None:
        src, dst = self._blocks
        self._manager.pull_blocks(KEY, self._cache, src, dst)

    def _pull_cache(self) -> None:
        self._manager.pull_cache(self._row, self._cache, size=self._row_nbytes)

    def _push_blocks(self) -> None:
        src, dst = self._blocks
        per_layer = self.job.workload.tensors_per_layer
        self._manager.push_blocks(KEY, self._cache, src, dst, tensor_num_per_layer=per_layer)

    def _transfer_cache_async(self) -> None:
        src, dst = self._blocks
        layers = range(-(-self.job.workload.num_tensors // 2))
        config = TransferWithCacheKeyConfig(KEY, layers, layers)
        task = self._manager.transfer_cache_async(self._cache, _AtOnce(), [config], src, dst)
        status = task.synchronize(_TIMEOUT_MS)
        if status is not LLMStatusCode.LLM_SUCCESS:
            raise CommandError(f"the transfer ended with {status}")


class _AtOnce(LayerSynchronizer):
    """Every layer has been computed."""

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return True


_PULLS = ("pull_blocks", "pull_cache")
