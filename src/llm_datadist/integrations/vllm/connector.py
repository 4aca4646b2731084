"""The class that vLLM loads: its calls, and whom they go to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm import __version__ as vllm_version
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from llm_datadist.integrations.vllm.consumer import ConsumerScheduler
from llm_datadist.integrations.vllm.facts import facts_of
from llm_datadist.integrations.vllm.producer import ProducerScheduler
from llm_datadist.integrations.vllm.scheduled import chunks_of
from llm_datadist.integrations.vllm.settings import settings_of
from llm_datadist.integrations.vllm.specs import forms_of, groups_of
from llm_datadist.integrations.vllm.stats import TransferMetrics, TransferStats
from llm_datadist.integrations.vllm.step import Step
from llm_datadist.integrations.vllm.versions import check_version
from llm_datadist.integrations.vllm.worker import Worker

if TYPE_CHECKING:
    import torch
    from vllm.config import KVTransferConfig, VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import PromMetric
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from llm_datadist.integrations.vllm.settings import Settings


class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]  # vLLM is not there to be checked
    """A step on its way to the workers."""

    def __init__(self, step: Step) -> None:
        self.step = step


@dataclass
class WorkerHost(KVConnectorHandshakeMetadata):  # type: ignore[misc]  # as above
    """Where a worker is dialled, and which start it is, on their way to the scheduler."""

    host: str
    incarnation: str


class LLMDataDistConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Hands KV blocks of finished prefill requests to decode engines. See the guide With vLLM.

    vLLM makes two: one in its scheduler, one in each worker. Raises ValueError at the start for
    what it does not do: context parallelism, layers that it does not know, memory that is not the
    CPU's.
    """

    _cache_hit_source = CacheHitSource.P2P

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        _refuse_unsupported(vllm_config)
        self._groups = groups_of(kv_cache_config)
        parallel = vllm_config.parallel_config
        tp_size, pp_size = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
        check_version(vllm_version)
        first_rank = parallel.data_parallel_index * tp_size * pp_size
        self._settings = self._read_settings(self._kv_transfer_config, first_rank)
        self._producer: ProducerScheduler | None = None
        self._consumer: ConsumerScheduler | None = None
        self._registered: Worker | None = None
        if role is KVConnectorRole.SCHEDULER:
            if self._settings.is_producer:
                self._producer = ProducerScheduler(self._settings, self._groups, tp_size, pp_size)
            if self._settings.is_consumer:
                keeps_all = all(group.keeps_all for group in self._groups)
                self._consumer = ConsumerScheduler(
                    has_directory=bool(self._settings.extra.directory),
                    overlaps=self._settings.extra.overlap and keeps_all,
                )

    # -- the scheduler's -------------------------------------------------------------------------

    def on_new_request(self, request: Request) -> None:
        if self._consumer:
            self._consumer.arrived(request)
        if self._producer:
            self._producer.arrived(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int, bool]:
        if self._consumer is None:
            return 0, False
        count = self._consumer.num_matched_tokens(request, num_computed_tokens)
        return count, count > 0

    def get_loaded_kv_cache_group_ids(self, request: Request) -> tuple[int, ...]:
        ids: tuple[int, ...] = self._kv_cache_config.transfer_group_ids
        return ids

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        if self._consumer:
            block_ids = blocks.get_block_ids(group_ids=self._kv_cache_config.transfer_group_ids)
            self._consumer.allocated(request, block_ids, num_external_tokens)
        if self._producer:
            self._producer.scheduled(request)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> StepMetadata:
        step = Step()
        if self._consumer:
            self._consumer.fill(step)
        if self._producer:
            self._producer.preempted(scheduler_output.preempted_req_ids or ())
            for request_id, blocks, num_tokens in chunks_of(scheduler_output):
                moved = blocks and self._kv_cache_config.select_transfer_block_ids(blocks)
                self._producer.computes(request_id, moved, num_tokens)
            self._producer.fill(step)
        return StepMetadata(step)

    def set_xfer_handshake_metadata(
        self, metadata: dict[int, KVConnectorHandshakeMetadata]
    ) -> None:
        if self._producer:
            # behind vLLM's MultiConnector also what other connectors say
            said = {
                number: each for number, each in metadata.items() if isinstance(each, WorkerHost)
            }
            self._producer.told_of_workers({number: each.host for number, each in said.items()})
            self._producer.told_of_starts(
                {number: each.incarnation for number, each in said.items()}
            )

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        tp_size = self._vllm_config.parallel_config.tensor_parallel_size
        self.set_xfer_handshake_metadata(
            {stage * tp_size + rank: said for (stage, rank), said in metadata.items()}
        )

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        if self._consumer:
            self._consumer.received(connector_output.finished_recving or ())
        if self._producer:
            self._producer.sent(connector_output.finished_sending or ())

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        if self._consumer:
            self._consumer.finished(request)
        params = None
        if self._producer:
            moved = self._kv_cache_config.select_transfer_block_ids(block_ids)
            params = self._producer.finished(request, moved)
        return params is not None, params

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    # -- the workers' ----------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        config = self._vllm_config
        backends = sorted(each.get_name() for each in get_current_attn_backends(config))
        rank, num_ranks = (
            get_tensor_model_parallel_rank(),
            config.parallel_config.tensor_parallel_size,
        )
        self._registered = Worker(
            self._settings,
            get_pp_group().rank_in_group * num_ranks + rank,
            facts_of(config, backends),
            kv_caches,
            self._kv_cache_config.num_blocks,
            self._groups,
            forms_of(config, self._kv_cache_config, rank),
            num_ranks,
            config.model_config.max_model_len,
        )

    def unregister_kv_caches(self) -> None:
        """Before the engine sleeps, by vLLM from 0.33 on; loads meanwhile fail."""
        if self._registered is not None:
            self._registered.memory.unregister()

    def restore_kv_caches(self) -> None:
        """Behind it, with the memory where it was."""
        if self._registered is not None:
            self._registered.memory.register()

    def get_handshake_metadata(self) -> WorkerHost | None:
        host = self._registered and self._registered.advertised_host
        return WorkerHost(host, self._worker.incarnation) if host else None

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: object) -> None:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepMetadata)
        self._worker.apply(metadata.step)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: a request runs when all of its blocks are there."""

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: object,
    ) -> None:
        """Readers come for the blocks; some wait for those of this layer."""
        self._worker.layer_saved(layer_name)

    def wait_for_save(self) -> None:
        """As above, for those of layers that `save_kv_layer` is not called for, too."""
        self._worker.all_saved()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        # in this order: those that failed are told of with what was received
        sent, received = self._worker.take_sent(), self._worker.take_received()
        return KVConnectorTransferResults(sent, received, self._worker.take_failed())

    def get_kv_connector_stats(self) -> TransferStats | None:
        if self._registered is None:
            return None
        stats = TransferStats(self._worker.take_counts())
        return None if stats.is_empty() else stats

    def shutdown(self) -> None:
        if self._registered is not None:
            self._registered.close()

    # -- the class's -----------------------------------------------------------------------------

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: KVTransferConfig) -> bool:
        return True

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> TransferStats:
        return TransferStats(data)

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetric]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> TransferMetrics:
        return TransferMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # --------------------------------------------------------------------------------------------

    @classmethod
    def _read_settings(cls, config: KVTransferConfig, first_rank: int) -> Settings:
        return settings_of(config, first_rank)

    @property
    def _worker(self) -> Worker:
        assert self._registered is not None, "called before register_kv_caches"
        return self._registered


def _refuse_unsupported(vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    reasons = {
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
    }
    if found := [reason for reason, is_there in reasons.items() if is_there]:
        raise ValueError(f"LLMDataDistConnector does not move {'; '.join(found)}")
