"""The workers' clusters, their link, and their pools of blocks."""

from __future__ import annotations

import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from llm_datadist import (
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
)
from llm_datadist.cli.demo.failure import DemoError, SetupError
from llm_datadist.cli.demo.messages import Linked
from llm_datadist.cli.demo.settings import LinkPath
from llm_datadist.integrations.transformers import KVPool

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llm_datadist.cli.demo.settings import Settings
    from llm_datadist.integrations.transformers import KVShape

PREFILL_CLUSTER: Final = 1
DECODE_CLUSTER: Final = 2

_HOST = "127.0.0.1"
_TIMEOUT_MS = 10_000
#: room for the demo's longest prompt, and for shorter ones beside it
_NUM_PROMPT_TOKENS = 4096


@contextmanager
def prefill_cluster(settings: Settings) -> Iterator[LLMDataDist]:
    """The cluster that listens. Raises SetupError when it cannot have its port."""
    config = _config(settings)
    config.listen_ip_info = f"{_HOST}:{settings.port}"
    cluster = LLMDataDist(LLMRole.PROMPT, PREFILL_CLUSTER)
    try:
        cluster.init(config.generate_options())
    except LLMException as error:
        raise SetupError(
            f"prefill cannot listen on port {settings.port} of {_HOST}: {error}\n"
            "Choose another port with --port, or leave it out: the system then picks a free one."
        ) from error
    try:
        yield cluster
    finally:
        cluster.finalize()


def listening_port(cluster: LLMDataDist) -> int:
    """The port that `prefill_cluster` really has."""
    endpoint = cluster.listen_endpoint
    assert endpoint is not None
    return endpoint.port


@contextmanager
def decode_cluster(settings: Settings) -> Iterator[LLMDataDist]:
    """The cluster that links and pulls."""
    cluster = LLMDataDist(LLMRole.DECODER, DECODE_CLUSTER)
    cluster.init(_config(settings).generate_options())
    try:
        yield cluster
    finally:
        cluster.finalize()


def make_pool(
    cluster: LLMDataDist, shape: KVShape, seed: int, num_answer_tokens: int = 0
) -> KVPool:
    """A pool that holds a few of the demo's prompts at a time, and as long an answer to one.

    A pool that has served requests for a while hands out numbers all over the place. This one does
    so from the start, so that every transfer of the demo is the scattered one of real life.
    """
    num_blocks = shape.num_blocks(_NUM_PROMPT_TOKENS) + shape.num_blocks(num_answer_tokens)
    pool = KVPool(cluster, shape, num_blocks)
    caches = [pool.new_cache() for _ in range(num_blocks)]
    for cache in caches:
        cache.reserve(1)
    random.Random(seed).shuffle(caches)
    for cache in caches:
        cache.release()
    return pool


@contextmanager
def linked_to_prefill(cluster: LLMDataDist, settings: Settings, port: int) -> Iterator[Linked]:
    """A link from decode to the prefill that listens on `port`. Raises DemoError when it fails."""
    prefill = LLMClusterInfo()
    prefill.remote_cluster_id = PREFILL_CLUSTER
    prefill.append_local_ip_info(_HOST, 0)
    prefill.append_remote_ip_info(_HOST, port)
    status, _ = cluster.link_clusters([prefill], timeout=_TIMEOUT_MS)
    if status != LLMStatusCode.LLM_SUCCESS:
        raise DemoError(_link_failure(status, settings, port))
    try:
        [link] = cluster.links()
        yield Linked(link.path, link.path_reason)
    finally:
        cluster.unlink_clusters([prefill], timeout=_TIMEOUT_MS)


def _config(settings: Settings) -> LLMConfig:
    config = LLMConfig()
    config.device_id = 0
    config.enable_cache_manager = True
    config.enable_remote_cache_accessible = True
    config.sync_kv_timeout = _TIMEOUT_MS
    config.transfer_path = settings.path.value
    return config


def _link_failure(status: LLMStatusCode, settings: Settings, port: int) -> str:
    text = f"decode cannot link to prefill at {_HOST}:{port}: {status.name}."
    if settings.path is LinkPath.CMA:
        text += (
            " --path cma reads the other process's memory, which this system may not permit: "
            "try --path auto, which falls back to TCP and says why."
        )
    return text
