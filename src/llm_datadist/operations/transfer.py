"""The layer-wise transfer: each layer goes out as soon as it is computed. Spec 6.12."""

from __future__ import annotations

import contextvars
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from llm_datadist.cache import Cache
from llm_datadist.cache_task import CacheTask
from llm_datadist.checks import check_sequence, check_type, check_uint64, check_uint64_sequence
from llm_datadist.core import plan
from llm_datadist.core.geometry import CacheKind, Geometry, Layout
from llm_datadist.errors import LLMException, LLMStatusCode, invalid
from llm_datadist.layerwise import LayerSynchronizer, TransferConfig, TransferWithCacheKeyConfig
from llm_datadist.observe.log import get_logger
from llm_datadist.operations.naming import check_row
from llm_datadist.operations.push import guard_of, rows, send
from llm_datadist.types import Placement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_datadist.core.registry import Entry
    from llm_datadist.core.remote import RemoteCache
    from llm_datadist.core.segments import Segments
    from llm_datadist.engine.engine import Engine

Config: TypeAlias = TransferConfig | TransferWithCacheKeyConfig
#: here a layer is always K and V; only the last may have one tensor
_PER_LAYER = 2
_OK = LLMStatusCode.LLM_SUCCESS


@dataclass(frozen=True)
class _Job:
    """What one call of transfer_cache_async asks for, checked."""

    cache: Cache
    synchronizer: LayerSynchronizer
    configs: Sequence[Config]
    layers: Sequence[range]  #: of the source, one range per config
    src_blocks: Sequence[int]
    dst_blocks: Sequence[int]
    block_nbytes: int


def transfer_cache_async(
    engine: Engine,
    src_cache: object,
    layer_synchronizer: object,
    transfer_configs: object,
    src_block_indices: object,
    dst_block_indices: object,
    dst_block_memory_size: object,
) -> CacheTask:
    """See CacheManager.transfer_cache_async."""
    cache = check_type("src_cache", src_cache, Cache)
    if cache.cache_desc.placement == Placement.HOST:
        raise invalid("src_cache is placed on HOST: only a DEVICE cache can be transferred")
    src, dst, nbytes = _check_blocks(src_block_indices, dst_block_indices, dst_block_memory_size)
    synchronizer = check_type("layer_synchronizer", layer_synchronizer, LayerSynchronizer)  # type: ignore[type-abstract]
    kind = TransferWithCacheKeyConfig if engine.options.remote_accessible else TransferConfig
    configs: Sequence[Config] = check_sequence("transfer_configs", transfer_configs, kind)
    if not dst and nbytes:
        raise invalid("dst_block_memory_size is for dst_block_indices, which are not given")
    layers = [_check_config(config, cache, has_blocks=bool(src)) for config in configs]
    task = CacheTask(len(configs), _unfinished_status(engine))
    job = _Job(cache, synchronizer, configs, layers, src, dst, nbytes)
    run = contextvars.copy_context().run  # spans belong to the caller's
    threading.Thread(
        target=run, args=(_run, engine, job, task), name="llm-datadist-transfer"
    ).start()
    return task


def _unfinished_status(engine: Engine) -> LLMStatusCode:
    """What a time-out of the task is called. Spec 6.12; Appendix C for the v1 mode."""
    if engine.options.cache_manager:
        return LLMStatusCode.LLM_TIMEOUT
    return LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT


def _check_blocks(
    src: object, dst: object, block_nbytes: object
) -> tuple[Sequence[int], Sequence[int], int]:
    dst_list = check_uint64_sequence("dst_block_indices", () if dst is None else dst)
    src_list = check_uint64_sequence("src_block_indices", () if src is None else src)
    if block_nbytes is not None:
        check_uint64("dst_block_memory_size", block_nbytes)
    if src_list and not dst_list:
        raise invalid("transfer from blocks to cache is not supported: give dst_block_indices")
    if src_list and len(src_list) != len(dst_list):
        raise invalid(f"{len(src_list)} source blocks do not pair with {len(dst_list)}")
    if dst_list and not src_list and block_nbytes is None:
        raise invalid("dst_block_memory_size is needed to cut a row into dst_block_indices")
    return src_list, dst_list, check_uint64("dst_block_memory_size", block_nbytes or 0)


def _check_config(config: Config, cache: Cache, *, has_blocks: bool) -> range:
    """The layers that a config sends. Spec 6.12, step 8."""
    desc = cache.cache_desc
    num_layers = -(-desc.num_tensors // _PER_LAYER)
    if config.src_layer_range is None:
        config.src_layer_range = range(num_layers)
    layers = config.src_layer_range
    if has_blocks and config.src_batch_index:
        raise invalid(f"src_batch_index {config.src_batch_index} != 0 while src is blocks")
    if not cache.is_blocks_cache and config.src_batch_index >= desc.batch_size:
        raise invalid(
            f"src_batch_index {config.src_batch_index} is out of range: [0, {desc.batch_size})"
        )
    if not 0 <= layers.start < layers.stop <= num_layers:
        raise invalid(
            f"src_layer_range {layers} is out of range: the cache has {num_layers} layers"
        )
    if isinstance(config, TransferConfig):
        tensors = len(_tensors_of(layers, desc.num_tensors))
        if len(config.dst_addrs) != tensors:
            raise invalid(
                f"{len(config.dst_addrs)} dst_addrs for the {tensors} tensors of {layers}"
            )
    elif config.cache_key is None or config.dst_layer_range is None:
        raise invalid("cache_key and dst_layer_range must be set")
    elif len(config.dst_layer_range) != len(layers):
        raise invalid(f"src_layer_range {layers} and dst_layer_range differ in length")
    return layers


def _run(engine: Engine, job: _Job, task: CacheTask) -> None:
    """The transfer's thread: whatever happens, the task gets its results."""
    results: list[LLMStatusCode | None] = [None] * len(job.configs)

    def send_layers() -> Sequence[LLMStatusCode]:
        _send_layers(engine, job, results)
        return [status for status in results if status is not None]

    try:
        engine.transfer(send_layers)
    except BaseException:  # the synchronizer's, or a bug: never success
        get_logger().exception("the transfer of cache %d failed", job.cache.cache_id)
        results = [LLMStatusCode.LLM_FAILED if each is None else each for each in results]
    finally:
        task._complete(results)


def _send_layers(engine: Engine, job: _Job, results: list[LLMStatusCode | None]) -> None:
    """A destination that fails is left out from there on; the others go on."""
    for layer in range(max((layers.stop for layers in job.layers), default=0)):
        wanting = [
            i for i, layers in enumerate(job.layers) if layer in layers and results[i] is None
        ]
        if not wanting:
            continue
        if not job.synchronizer.synchronize_layer(layer, None):
            for i in wanting:
                results[i] = LLMStatusCode.LLM_PARAM_INVALID
            return
        for i in wanting:
            status = _send_layer(engine, job, i, layer)
            if status is not _OK or layer == job.layers[i].stop - 1:
                results[i] = status


def _send_layer(engine: Engine, job: _Job, index: int, layer: int) -> LLMStatusCode:
    config = job.configs[index]
    try:
        with engine.catalog.use(job.cache.cache_id) as entry:
            tensors = _tensors_of(range(layer, layer + 1), entry.layout.geometry.num_tensors)
            src = entry.layout.tensors(tensors)
            at = layer - job.layers[index].start
            if isinstance(config, TransferConfig):
                addrs = config.dst_addrs[_PER_LAYER * at : _PER_LAYER * at + len(tensors)]
                segments = _plan(job, src, config, _layout_at(addrs, job, src), 0)
                engine.push_to_addresses(config.dst_cluster_id, guard_of(entry), segments)
            else:
                _send_to_key(engine, job, config, at, entry, src)
    except LLMException as error:
        get_logger().error(
            "layer %d of cache %d could not be sent to cluster %s: %s",
            layer, job.cache.cache_id, config.dst_cluster_id, error,
        )  # fmt: skip
        return error.status_code
    return _OK


def _send_to_key(
    engine: Engine,
    job: _Job,
    config: TransferWithCacheKeyConfig,
    at: int,
    entry: Entry,
    src: Layout,
) -> None:
    assert config.cache_key is not None
    assert config.dst_layer_range is not None
    dst_layer = config.dst_layer_range.start + at

    def segments(remote: RemoteCache, row: int) -> Segments:
        check_row(remote, row)
        everything = remote.layout.geometry.num_tensors
        tensors = _tensors_of(range(dst_layer, dst_layer + 1), everything)
        if len(tensors) != src.geometry.num_tensors:
            raise invalid(f"dst layer {dst_layer} is out of range: {everything} remote tensors")
        return _plan(job, src, config, remote.layout.tensors(tensors), row)

    send(engine, config.cache_key, entry, segments)


def _plan(job: _Job, src: Layout, config: Config, dst: Layout, dst_row: int) -> Segments:
    if job.src_blocks:
        if job.block_nbytes not in (0, src.geometry.row_nbytes):
            raise invalid(
                f"dst_block_memory_size {job.block_nbytes} is not our block size, "
                f"{src.geometry.row_nbytes}"
            )
        plan.check_blocks(src.geometry, job.src_blocks, "source")
        plan.check_blocks(dst.geometry, job.dst_blocks, "destination")
        return plan.blocks_to_blocks(src, job.src_blocks, dst, job.dst_blocks)
    if job.dst_blocks:
        plan.check_blocks(dst.geometry, job.dst_blocks, "destination")
        if job.block_nbytes != dst.geometry.row_nbytes:
            raise invalid(
                f"dst_block_memory_size is {job.block_nbytes}, the destination's blocks have "
                f"{dst.geometry.row_nbytes} bytes"
            )
        return plan.row_to_blocks(src, config.src_batch_index, dst, job.dst_blocks)
    return rows(src, config.src_batch_index, dst, dst_row)


def _layout_at(addrs: Sequence[int], job: _Job, src: Layout) -> Layout:
    """A destination known by its addresses alone, as large as the transfer needs it."""
    if not job.dst_blocks:
        geometry = Geometry(CacheKind.CONTINUOUS, len(addrs), 1, src.geometry.row_nbytes)
    else:
        nbytes = src.geometry.row_nbytes if job.src_blocks else job.block_nbytes
        if not nbytes:
            raise invalid("dst_block_memory_size must be greater than 0")
        geometry = Geometry(CacheKind.BLOCKS, len(addrs), max(job.dst_blocks) + 1, nbytes)
    return Layout.at(geometry, addrs)


def _tensors_of(layers: range, num_tensors: int) -> range:
    stop = min(_PER_LAYER * layers.stop, num_tensors)
    return range(min(_PER_LAYER * layers.start, stop), stop)
