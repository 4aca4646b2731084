"""Moves KV blocks from prefill to decode: written for LLM-DataDist, with its documented names only.

What a connector of a serving engine does, in small: it owns the paged KV memory (here numpy, on an
NPU torch), makes it known, and has decode pull the blocks of a request.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    DataType,
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMRole,
    LLMStatusCode,
)

NUM_LAYERS, NUM_BLOCKS, BLOCK_SHAPE = 4, 16, (16, 2, 8)  # tokens, heads, head size


class KvConnector:
    """The KV memory of one worker, and its link to others. `close` it."""

    def __init__(self, role: str, cluster_id: int, listen: str = "") -> None:
        #: K and V of each layer: [tensors, blocks, tokens, heads, head size]
        self.kv = np.zeros((2 * NUM_LAYERS, NUM_BLOCKS, *BLOCK_SHAPE), np.float16)
        config = LLMConfig()
        config.device_id = 0
        config.enable_cache_manager = True
        config.sync_kv_timeout = 5000
        if listen:
            config.listen_ip_info = listen
        self._datadist = LLMDataDist(
            LLMRole.PROMPT if role == "prefill" else LLMRole.DECODER, cluster_id
        )
        self._datadist.init(config.generate_options())
        self._cache = self._datadist.cache_manager.register_blocks_cache(
            CacheDesc(len(self.kv), list(self.kv.shape[1:]), DataType.DT_FLOAT16),
            [tensor.ctypes.data for tensor in self.kv],
            BlocksCacheKey(cluster_id, 0),
        )

    def link(self, cluster_id: int, ip: str, port: int) -> None:
        """Links to a worker that listens there."""
        peer = LLMClusterInfo()
        peer.remote_cluster_id = cluster_id
        peer.append_local_ip_info("127.0.0.1", 0)
        peer.append_remote_ip_info(ip, port)
        status, _ = self._datadist.link_clusters([peer], 5000)
        if status != LLMStatusCode.LLM_SUCCESS:
            raise ConnectionError(f"cannot link to cluster {cluster_id} at {ip}:{port}: {status}")

    def compute(self, blocks: list[int], seed: int) -> npt.NDArray[np.float16]:
        """Stands for the model: fills the blocks, and returns what it wrote."""
        values = np.random.default_rng(seed).random((len(self.kv), len(blocks), *BLOCK_SHAPE))
        self.kv[:, blocks] = values
        return self.kv[:, blocks]

    def fetch(self, cluster_id: int, src_blocks: list[int], dst_blocks: list[int]) -> None:
        """Pulls a request's blocks. Raises LLMException: they then must be computed here."""
        self._datadist.cache_manager.pull_blocks(
            BlocksCacheKey(cluster_id, 0), self._cache, src_blocks, dst_blocks
        )

    def close(self) -> None:
        """Ends all links."""
        self._datadist.cache_manager.unregister_cache(self._cache.cache_id)
        self._datadist.finalize()
