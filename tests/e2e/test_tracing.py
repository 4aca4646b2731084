"""OpenTelemetry: one span for each public operation."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from llm_datadist import (
    BlocksCacheKey,
    LayerSynchronizer,
    LLMException,
    LLMRole,
    LLMStatusCode,
    TransferWithCacheKeyConfig,
)
from llm_datadist.testing.cluster import Node
from programs import environment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.sdk.trace import ReadableSpan

    from llm_datadist.testing.cluster import NodeProcess

KEY = BlocksCacheKey(1, 0)
SHAPE = (4, 8, 4096)


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> Iterator[InMemorySpanExporter]:
    yield exporter
    exporter.clear()


def own_blocks(node: Node) -> int:
    return node.blocks_cache(*SHAPE, seed=1, key=KEY).cache_id


@pytest.fixture
def traced(node: Node, peer: NodeProcess, spans: InMemorySpanExporter) -> Node:
    """Cluster 2, linked to cluster 1."""
    settings: dict[str, Any] = {"enable_remote_cache_accessible": True}
    port = peer.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **settings)
    peer.call(own_blocks)
    node.start(LLMRole.DECODER, 2, tracing=True, **settings)
    assert node.link(port, 1) == LLMStatusCode.LLM_SUCCESS
    return node


def only(spans: InMemorySpanExporter, name: str) -> ReadableSpan:
    [span] = [span for span in spans.get_finished_spans() if span.name == f"llm_datadist.{name}"]
    return span


def test_link_pull_push_and_copy_have_a_span_each(
    traced: Node, spans: InMemorySpanExporter
) -> None:
    cache = traced.blocks_cache(*SHAPE)
    with trace.get_tracer("test").start_as_current_span("a request") as request:
        traced.manager.pull_blocks(KEY, cache, [1, 4], [0, 2])
    traced.manager.push_blocks(KEY, cache, [1], [0])
    traced.manager.copy_blocks(cache, {1: [2]})
    names = [span.name for span in spans.get_finished_spans()]
    assert names == [
        "llm_datadist.link", "llm_datadist.pull", "a request", "llm_datadist.push",
        "llm_datadist.copy",
    ]  # fmt: skip
    pull = only(spans, "pull")
    assert dict(pull.attributes or {}) == {
        "llm_datadist.cluster_id": "2",
        "llm_datadist.peer": "1",
        "llm_datadist.path": traced.datadist.links()[0].path,
        "llm_datadist.status": "LLM_SUCCESS",
        "llm_datadist.nbytes": 4 * 2 * 4096,
        "llm_datadist.num_segments": 8,
    }
    assert pull.parent is not None
    assert pull.parent.span_id == request.get_span_context().span_id
    assert only(spans, "push").parent is None


def test_a_failure_is_an_error_of_its_span(traced: Node, spans: InMemorySpanExporter) -> None:
    cache = traced.blocks_cache(*SHAPE)
    with pytest.raises(LLMException):
        traced.manager.pull_blocks(KEY, cache, [99], [0])
    pull = only(spans, "pull")
    assert (pull.attributes or {})["llm_datadist.status"] == "LLM_PARAM_INVALID"
    assert pull.status.status_code is trace.StatusCode.ERROR
    assert "99" in (pull.status.description or "")


class AtOnce(LayerSynchronizer):
    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return True


def test_a_transfer_has_one_span_below_its_callers_and_its_layers_none(
    traced: Node, spans: InMemorySpanExporter
) -> None:
    cache = traced.blocks_cache(*SHAPE)
    config = TransferWithCacheKeyConfig(KEY, range(2), range(2))
    with trace.get_tracer("test").start_as_current_span("a request") as request:
        task = traced.manager.transfer_cache_async(cache, AtOnce(), [config], [1], [2])
        assert task.synchronize() == LLMStatusCode.LLM_SUCCESS
    transfer = only(spans, "transfer")
    assert transfer.parent is not None
    assert transfer.parent.span_id == request.get_span_context().span_id
    assert not [span for span in spans.get_finished_spans() if span.name.endswith("push")]


def test_a_cluster_without_tracing_has_no_spans(node: Node, spans: InMemorySpanExporter) -> None:
    node.start(LLMRole.DECODER, 2, metrics=True)
    cache = node.blocks_cache(*SHAPE)
    node.manager.copy_blocks(cache, {1: [2]})
    assert spans.get_finished_spans() == ()


def test_without_the_package_init_says_what_to_install() -> None:
    program = """
import sys
sys.modules["opentelemetry"] = None
from llm_datadist import LLMDataDist, LLMException, LLMRole
try:
    LLMDataDist(LLMRole.DECODER, 1).init({"llm_datadist.Tracing": "1"})
except LLMException as error:
    print(error.status_code, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(),
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "LLM_FEATURE_NOT_ENABLED" in done.stdout
    assert "pip install opentelemetry-api" in done.stdout
