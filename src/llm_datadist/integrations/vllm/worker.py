"""One worker: its cluster, its memory, and both sides of a hand-over."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

import msgspec

from llm_datadist import LLMConfig, LLMDataDist, LLMRole
from llm_datadist.integrations.vllm.addresses import place_of
from llm_datadist.integrations.vllm.board import Board
from llm_datadist.integrations.vllm.fleet import Fleet
from llm_datadist.integrations.vllm.handover import cluster_id_of
from llm_datadist.integrations.vllm.loading import ConsumerWorker
from llm_datadist.integrations.vllm.memory import Memory
from llm_datadist.integrations.vllm.producer import ProducerWorker
from llm_datadist.integrations.vllm.producers import Producers
from llm_datadist.integrations.vllm.records import Records, RemoteRecords, words_of
from llm_datadist.integrations.vllm.sealing import Sealing
from llm_datadist.integrations.vllm.shapes import RecordsShape
from llm_datadist.options import read_link_security

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from llm_datadist.integrations.vllm.addresses import Place
    from llm_datadist.integrations.vllm.forms import Form
    from llm_datadist.integrations.vllm.groups import Group
    from llm_datadist.integrations.vllm.settings import Settings
    from llm_datadist.integrations.vllm.step import Step

#: caches of a worker by model id; the regions of its KV come after
_BOARD, _FACTS, _RECORDS, _FIRST_REGION = range(4)
#: so many prompts can be read while they are computed; others, when one of these is through
_NUM_RECORDS = 64

_ROLES = {
    "kv_producer": LLMRole.PROMPT,
    "kv_consumer": LLMRole.DECODER,
    "kv_both": LLMRole.MIX,
}


class Worker:
    """Owns a cluster from construction to `close`.

    `Worker` raises as `LLMDataDist.init` does, ValueError as `place_of` and `Memory`, and
    ConnectionError when a producer cannot be reached where its readers are told to dial it.
    """

    def __init__(
        self,
        settings: Settings,
        rank: int,
        facts: dict[str, Any],
        kv_caches: Mapping[str, torch.Tensor],
        num_blocks: int,
        groups: Sequence[Group],
        forms: Mapping[str, Form] | None = None,
        num_ranks: int = 1,
        max_tokens: int = 0,
    ) -> None:
        """Worker number `rank`; each stage of the model has `num_ranks` of them.

        `max_tokens`: of the longest prompt that is read while it is computed.
        """
        extra = settings.extra
        place = place_of(settings, rank) if settings.is_producer else None
        #: which start of the worker this is, for a directory
        self.incarnation = secrets.token_hex(16) if extra.directory else ""
        cluster_id = _cluster_id(settings, place, rank, self.incarnation)
        #: what readers are told to dial; a mere reader has none
        self.advertised_host = place and place.advertised.host
        self._fleet: Fleet | None = None
        self._datadist = LLMDataDist(_ROLES[settings.role], cluster_id)
        config = LLMConfig()
        config.enable_cache_manager = True
        config.enable_remote_cache_accessible = True
        config.sync_kv_timeout = int(extra.pull_timeout_s * 1000)
        if place:
            config.listen_ip_info = str(place.listen)
        for name, value in extra.llm_config.items():
            setattr(config, name, value)
        options = config.generate_options()
        self._datadist.init(options)
        security = read_link_security(options)
        try:
            if place:
                place.check_dialled(cluster_id, security, extra.link_timeout_s)
            manager = self._datadist.cache_manager
            memory = Memory(
                manager, cluster_id, _FIRST_REGION, kv_caches, num_blocks, groups, forms or {},
                num_ranks, by_layer=extra.overlap and settings.is_consumer,
            )  # fmt: skip
            told = _records_shape(settings, groups, max_tokens)
            words = words_of(manager, cluster_id, _RECORDS, told)
            board = Board(manager, cluster_id, _BOARD, extra.max_leases)
            if extra.directory:
                self._fleet = Fleet(self._datadist, settings, rank, place and place.advertised)
            producers = Producers(
                self._datadist,
                _FACTS,
                rank % num_ranks,
                facts,
                msgspec.structs.replace(memory.shape, records=told),
                extra.link_timeout_s,
                extra.link_timeout_s + extra.pull_timeout_s,
                security,
                self._fleet.endpoint if self._fleet else None,
            )
            self._consumer = ConsumerWorker(
                memory,
                board,
                producers,
                RemoteRecords(words),
                extra.pull_timeout_s,
                extra.overlap_timeout_s,
            )
        except BaseException:
            self._datadist.finalize()
            raise
        sealing = None
        if told:
            sealing = Sealing(Records(words, told), told.num_records, memory.shape.layers)
        #: the KV caches
        self.memory = memory
        self._producer = ProducerWorker(board, extra.kv_lease_duration, sealing)

    def apply(self, step: Step) -> None:
        """Does what the scheduler says; nothing of it blocks."""
        self._producer.apply(step)
        self._consumer.apply(step)

    def layer_saved(self, layer: str) -> None:
        """That layer is computed of all that the step computes."""
        self._producer.layer_saved(layer)

    def all_saved(self) -> None:
        """All layers are."""
        self._producer.all_saved()

    def take_sent(self) -> set[str]:
        """Requests whose blocks may be freed here."""
        return self._producer.take_sent()

    def take_received(self) -> set[str]:
        """Requests whose blocks are here, or could not be had."""
        return self._consumer.take_received()

    def take_failed(self) -> set[str]:
        """Of the requests that `take_received` has told of, those whose blocks are of no use."""
        return self._consumer.outcomes.take_failed()

    def take_counts(self) -> dict[str, Any]:
        """What happened since the last call."""
        pulls, num_failed = self._consumer.outcomes.take_counts()
        return {
            "pull_s": [seconds for seconds, _ in pulls],
            "pull_nbytes": [nbytes for _, nbytes in pulls],
            "failed_pulls": num_failed,
            "expired_leases": self._producer.take_num_expired(),
        }

    def paths(self) -> list[str]:
        """By which path each linked engine's memory is read."""
        return [link.path for link in self._datadist.links()]

    def close(self) -> None:
        """Ends all links, and waits for what runs. The KV memory is the engine's again."""
        if self._fleet:
            self._fleet.leave()
        try:
            self._consumer.close()
        finally:
            self._datadist.finalize()


def _records_shape(
    settings: Settings, groups: Sequence[Group], max_tokens: int
) -> RecordsShape | None:
    """None where prompts are handed over when they are computed: by a setting, or a window or state
    of the model, which is only then as it will be read."""
    is_on = settings.is_producer and settings.extra.overlap
    if not is_on or not all(group.keeps_all for group in groups):
        return None
    return RecordsShape(_NUM_RECORDS, [group.num_blocks(max_tokens) for group in groups])


def _cluster_id(settings: Settings, place: Place | None, worker: int, incarnation: str) -> int:
    """Readers find a producer by what its hand-overs say; nobody asks for a mere reader."""
    if place is None:
        return secrets.randbits(56)
    if incarnation:
        return cluster_id_of(settings.engine_id, incarnation, worker)
    return cluster_id_of(settings.engine_id, *place.advertised)
