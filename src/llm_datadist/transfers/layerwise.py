"""The layer-wise transfer: each layer goes out as soon as it is computed. Spec 6.12."""

from __future__ import annotations

import contextvars
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeAlias

from llm_datadist.core.layers import PER_LAYER, OneLayer, count_layers, pairs_of
from llm_datadist.core.remote import RemoteRow
from llm_datadist.core.transfer import PushBlocks, PushLayerRow, PushRowIntoBlocks
from llm_datadist.errors import LLMException, LLMStatusCode, invalid
from llm_datadist.layerwise import TransferConfig, TransferWithCacheKeyConfig
from llm_datadist.observe.log import get_logger
from llm_datadist.running.threads import start_thread

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from llm_datadist.cache_task import CacheTask
    from llm_datadist.core.transfer import Push
    from llm_datadist.layerwise import LayerKey, LayerSynchronizer
    from llm_datadist.observe.watch import Watch
    from llm_datadist.running.threads import Errands

Config: TypeAlias = TransferConfig | TransferWithCacheKeyConfig
_OK = LLMStatusCode.LLM_SUCCESS


class Sender(Protocol):
    """Who carries pushes out: the Transfers of a cluster, or those of several devices."""

    @property
    def errands(self) -> Errands:
        """Starts threads where no signal strikes."""
        ...

    def watching(self, operation: str) -> AbstractContextManager[Watch | None]:
        """Watches an operation while `with` lasts."""
        ...

    def run(self, asked: Push) -> None:
        """To the cache of a key. Raises LLMException."""
        ...

    def push_to_addresses(self, asked: Push, tensors: range, addrs: Sequence[int]) -> None:
        """These tensors, to addresses. Raises LLMException."""
        ...


@dataclass(frozen=True, slots=True)
class Destination:
    """Where the layers of a transfer go: to a cache of a key, or to addresses."""

    cluster_id: int
    layers: range  #: of the source
    src_row: int
    key: LayerKey | None  #: None: by address
    dst_start: int  #: the layer of the key's cache that the first one goes to
    addrs: tuple[int, ...]  #: two a layer, of each device

    @classmethod
    def of(cls, config: Config, layers: range) -> Destination:
        """Of a config that was checked."""
        row = config.src_batch_index
        if isinstance(config, TransferConfig):
            return cls(config.dst_cluster_id, layers, row, None, 0, tuple(config.dst_addrs))
        assert config.cache_key is not None
        assert config.dst_layer_range is not None
        start = config.dst_layer_range.start
        return cls(config.cache_key.cluster_id, layers, row, config.cache_key, start, ())


@dataclass(frozen=True, slots=True)
class LayerwiseTransfer:
    """What one call of transfer_cache_async asks for, checked. Keeps no list of the caller's."""

    cache_id: int
    #: the cache, which may be freed when nobody holds it (spec Appendix C)
    held: object
    num_tensors: int
    destinations: tuple[Destination, ...]
    src_blocks: tuple[int, ...]
    dst_blocks: tuple[int, ...]
    block_nbytes: int
    num_devices: int = 1

    def addrs_of(self, to: Destination, layer: int, tensors: range) -> Sequence[int]:
        """Where the tensors of a layer go: for each device as many, one device behind another."""
        first, each = PER_LAYER * (layer - to.layers.start), len(to.addrs) // self.num_devices
        starts = range(first, len(to.addrs), each) if each else ()
        return [addr for at in starts for addr in to.addrs[at : at + len(tensors)]]

    def push_of(self, to: Destination, layer: int) -> Push:
        """The push of one layer to one destination. Raises LLMException for a key of nothing."""
        layers = OneLayer(layer, to.dst_start + layer - to.layers.start)
        place = RemoteRow(to.cluster_id, 0) if to.key is None else RemoteRow.of(to.key)
        named = (to.key, place, self.cache_id, layers)
        if self.src_blocks:
            return PushBlocks(*named, self.src_blocks, self.dst_blocks, self.block_nbytes)
        if self.dst_blocks:
            return PushRowIntoBlocks(*named, to.src_row, self.dst_blocks, self.block_nbytes)
        return PushLayerRow(*named, to.src_row)


def check_config(
    config: Config,
    num_tensors: int,
    batch_size: int | None,
    *,
    has_blocks: bool,
    num_devices: int = 1,
) -> range:
    """The layers that a config sends; fills in all where it names none. Spec 6.12, step 8.

    `batch_size` is None for a blocks cache. Raises LLMException(LLM_PARAM_INVALID).
    """
    num_layers = count_layers(num_tensors)
    if config.src_layer_range is None:
        config.src_layer_range = range(num_layers)
    layers = config.src_layer_range
    if has_blocks and config.src_batch_index:
        raise invalid(f"src_batch_index {config.src_batch_index} != 0 while src is blocks")
    if batch_size is not None and config.src_batch_index >= batch_size:
        raise invalid(
            f"src_batch_index {config.src_batch_index} is out of range: [0, {batch_size})"
        )
    if not 0 <= layers.start < layers.stop <= num_layers:
        raise invalid(
            f"src_layer_range {layers} is out of range: the cache has {num_layers} layers"
        )
    if isinstance(config, TransferConfig):
        tensors = len(pairs_of(layers, num_tensors))
        if len(config.dst_addrs) != tensors * num_devices:
            each = "" if num_devices == 1 else f" on each of {num_devices} devices"
            raise invalid(
                f"{len(config.dst_addrs)} dst_addrs for the {tensors} tensors of {layers}{each}"
            )
    elif config.cache_key is None or config.dst_layer_range is None:
        raise invalid("cache_key and dst_layer_range must be set")
    elif len(config.dst_layer_range) != len(layers):
        raise invalid(f"src_layer_range {layers} and dst_layer_range differ in length")
    return layers


def begin(
    transfers: Sender,
    asked: LayerwiseTransfer,
    synchronizer: LayerSynchronizer,
    task: CacheTask,
) -> None:
    """Sends in a thread of its own, which completes the task whatever happens.

    Not a daemon's: a program that ends behind the call has sent all layers then (spec 6.12), but
    for a call in an exit handler, before which Python has waited. Raises LLMException when no
    thread can be started.
    """
    run = contextvars.copy_context().run  # spans belong to the caller's
    work = partial(run, _run, transfers, asked, synchronizer, task)
    start = partial(start_thread, work, "llm-datadist-transfer", runs_program=True)
    transfers.errands.run(start)


def _run(
    transfers: Sender,
    asked: LayerwiseTransfer,
    synchronizer: LayerSynchronizer,
    task: CacheTask,
) -> None:
    results: list[LLMStatusCode | None] = [None] * len(asked.destinations)
    try:
        with transfers.watching("transfer") as watch:
            _send_layers(transfers, asked, synchronizer, results)
            if watch is not None:
                watch.ended([status for status in results if status is not None])
    except BaseException:  # the synchronizer's, or a bug: never success
        get_logger().exception("the transfer of cache %d failed", asked.cache_id)
        results = [LLMStatusCode.LLM_FAILED if each is None else each for each in results]
    finally:
        task._complete(results)


def _send_layers(
    transfers: Sender,
    asked: LayerwiseTransfer,
    synchronizer: LayerSynchronizer,
    results: list[LLMStatusCode | None],
) -> None:
    """A destination that fails is left out from there on; the others go on."""
    every = asked.destinations
    for layer in range(max((to.layers.stop for to in every), default=0)):
        wanting = [i for i, to in enumerate(every) if layer in to.layers and results[i] is None]
        if not wanting:
            continue
        if not synchronizer.synchronize_layer(layer, None):
            for i in wanting:
                results[i] = LLMStatusCode.LLM_PARAM_INVALID
            return
        for i in wanting:
            status = _send_layer(transfers, asked, every[i], layer)
            if status is not _OK or layer == every[i].layers.stop - 1:
                results[i] = status


def _send_layer(
    transfers: Sender, asked: LayerwiseTransfer, to: Destination, layer: int
) -> LLMStatusCode:
    try:
        push = asked.push_of(to, layer)
        if to.key is not None:
            transfers.run(push)
        else:
            tensors = pairs_of(range(layer, layer + 1), asked.num_tensors)
            transfers.push_to_addresses(push, tensors, asked.addrs_of(to, layer, tensors))
    except LLMException as error:
        get_logger().error(
            "layer %d of cache %d could not be sent to cluster %s: %s",
            layer, asked.cache_id, to.cluster_id, error,
        )  # fmt: skip
        return error.status_code
    return _OK
