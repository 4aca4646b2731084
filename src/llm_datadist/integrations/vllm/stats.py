"""What the connector counts, as vLLM logs and exports it."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.v1.metrics.utils import create_metric_per_engine

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import PromMetric

_SECONDS = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0]
_NBYTES = [float(1 << shift) for shift in range(12, 36, 2)]


class TransferStats(KVConnectorStats):  # type: ignore[misc]  # vLLM is not there to be checked
    """One interval of one worker, or several of many added up."""

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        super().__init__(data=data or {})
        if not self.data:
            self.reset()

    def reset(self) -> None:
        """Starts a new interval."""
        self.data: dict[str, Any] = {
            "pull_s": [],
            "pull_nbytes": [],
            "failed_pulls": 0,
            "expired_leases": 0,
        }

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Adds another's."""
        for name, value in other.data.items():
            self.data[name] += value
        return self

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's log line."""
        seconds, nbytes = self.data["pull_s"], self.data["pull_nbytes"]
        numbers: dict[str, int | float] = {"Num pulls": len(seconds)}
        if seconds:
            numbers |= {
                "Avg pull (ms)": round(fmean(seconds) * 1e3, 3),
                "Max pull (ms)": round(max(seconds) * 1e3, 3),
                "Avg MB per pull": round(fmean(nbytes) / 1e6, 3),
                "Throughput (MB/s)": round(sum(nbytes) / sum(seconds) / 1e6, 3),
            }
        return {
            **numbers,
            "Num failed pulls": self.data["failed_pulls"],
            "Num expired leases": self.data["expired_leases"],
        }

    def is_empty(self) -> bool:
        """Whether nothing happened."""
        return not any(self.data.values())


class TransferMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """The same for Prometheus, among vLLM's own metrics."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetric]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._metrics = {
            "pull_s": self._histogram(
                "pull_seconds",
                "From a pull's order to its end.",
                _SECONDS,
            ),
            "pull_nbytes": self._histogram("pull_bytes", "Bytes of one worker's pull.", _NBYTES),
            "failed_pulls": self._counter("failed_pulls", "Pulls that failed, by worker."),
            "expired_leases": self._counter(
                "expired_leases", "Leases that ended unread, by worker."
            ),
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Adds one interval."""
        for name in ("pull_s", "pull_nbytes"):
            for value in transfer_stats_data[name]:
                self._metrics[name][engine_idx].observe(value)
        for name in ("failed_pulls", "expired_leases"):
            self._metrics[name][engine_idx].inc(transfer_stats_data[name])

    def _histogram(self, name: str, text: str, buckets: list[float]) -> dict[int, PromMetric]:
        metric = self._histogram_cls(
            name=f"vllm:llm_datadist_{name}",
            documentation=text,
            buckets=buckets,
            labelnames=self._labelnames,
        )
        metrics: dict[int, PromMetric] = create_metric_per_engine(
            metric, self.per_engine_labelvalues
        )
        return metrics

    def _counter(self, name: str, text: str) -> dict[int, PromMetric]:
        metric = self._counter_cls(
            name=f"vllm:llm_datadist_{name}", documentation=text, labelnames=self._labelnames
        )
        metrics: dict[int, PromMetric] = create_metric_per_engine(
            metric, self.per_engine_labelvalues
        )
        return metrics
