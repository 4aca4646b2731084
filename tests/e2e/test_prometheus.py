"""Prometheus: a cluster's stats as metrics, and the dashboard that draws them."""

from __future__ import annotations

import json
import re
import socket
import threading
from importlib.resources import files
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from llm_datadist import BlocksCacheKey, CacheDesc, CacheKey, DataType, LLMRole, LLMStatusCode
from llm_datadist.observe.prometheus import Collector, serve
from llm_datadist.testing.cluster import Node
from llm_datadist.testing.timing import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llm_datadist.testing.cluster import NodeProcess

KEY = BlocksCacheKey(1, 0)
SHAPE = (2, 8, 4096)


def own_blocks(node: Node) -> int:
    return node.blocks_cache(*SHAPE, seed=1, key=KEY).cache_id


@pytest.fixture
def busy(node: Node, peer: NodeProcess) -> Node:
    """Cluster 2, which has pulled four segments once, and failed to once."""
    port = peer.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0")
    peer.call(own_blocks)
    node.start(LLMRole.DECODER, 2, metrics=True, mem_pool_cfg='{"memory_size": 1048576}')
    node.manager.allocate_cache(CacheDesc(1, [1, 64], DataType.DT_INT8), [CacheKey(1, 7)])
    assert node.link(port, 1) == LLMStatusCode.LLM_SUCCESS
    cache = node.blocks_cache(*SHAPE)
    node.manager.pull_blocks(KEY, cache, [1, 4], [0, 2])
    with pytest.raises(RuntimeError):
        node.manager.pull_blocks(KEY, cache, [99], [0])
    return node


@pytest.fixture
def registry(busy: Node) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(Collector(busy.datadist))
    return registry


def test_what_was_counted_is_exported(busy: Node, registry: CollectorRegistry) -> None:
    path = busy.datadist.links()[0].path

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"llm_datadist_{name}", {"cluster": "2", **labels})

    pull = {"operation": "pull", "peer": "1", "path": path}
    assert value("operations_total", **pull, status="LLM_SUCCESS") == 1
    assert value("operations_total", **pull, status="LLM_PARAM_INVALID") == 1
    assert value("bytes_total", **pull) == 2 * 2 * 4096
    assert value("segments_total", **pull) == 4
    assert value("operation_seconds_count", **pull) == 2
    assert value("operation_seconds_bucket", **pull, le="+Inf") == 2
    assert value("phase_seconds_count", **pull, phase="plan") == 1
    assert value("links", path=path, state="linked") == 1
    assert value("links_made_total", path=path) == 1
    assert value("keys") == 1
    assert value("pool_used_bytes", placement="DEVICE", part="pages") == 65536
    age_s = value("oldest_key_age_seconds")
    assert age_s is not None
    assert age_s > 0


def test_a_finalized_cluster_is_down_and_says_nothing_else(
    busy: Node, registry: CollectorRegistry
) -> None:
    assert registry.get_sample_value("llm_datadist_up") == 1
    busy.datadist.finalize()
    assert [metric.name for metric in registry.collect()] == ["llm_datadist_up"]
    assert registry.get_sample_value("llm_datadist_up") == 0


def test_without_metrics_there_is_the_state(node: Node) -> None:
    node.start(LLMRole.DECODER, 2)
    registry = CollectorRegistry()
    registry.register(Collector(node.datadist))
    assert registry.get_sample_value("llm_datadist_caches", {"cluster": "2"}) == 0
    names = {metric.name for metric in registry.collect()}
    assert "llm_datadist_operations" not in names


def test_one_call_serves_them(busy: Node) -> None:
    server, thread = serve(busy.datadist, 0)
    try:
        with urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    families = {family.name for family in text_string_to_metric_families(text)}
    assert {"llm_datadist_up", "llm_datadist_bytes", "llm_datadist_operation_seconds"} <= families


def test_a_silent_connection_keeps_no_thread(busy: Node, capfd: pytest.CaptureFixture[str]) -> None:
    before = threading.active_count()
    server, thread = serve(busy.datadist, 0)
    try:
        with socket.create_connection(("127.0.0.1", server.server_port)) as silent:
            assert eventually(lambda: threading.active_count() > before + 1)
            silent.settimeout(20)
            assert silent.recv(1) == b""
        assert eventually(lambda: threading.active_count() <= before + 1)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert "Traceback" not in capfd.readouterr().err


# -- the dashboard --


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    text = (files("llm_datadist.observe") / "grafana.json").read_text()
    return dict(json.loads(text))


def queries(dashboard: dict[str, Any]) -> Iterator[str]:
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield target["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]["query"]


def test_every_panel_of_the_dashboard_has_a_place_and_a_query(dashboard: dict[str, Any]) -> None:
    assert dashboard["title"] == "llm-datadist"
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"]) > 5
    for panel in dashboard["panels"]:
        assert set(panel["gridPos"]) == {"h", "w", "x", "y"}
        assert panel["targets"], panel["title"]


def test_the_dashboard_asks_for_metrics_that_are_exported_with_the_labels_they_have(
    dashboard: dict[str, Any], busy: Node
) -> None:
    exported: dict[str, set[str]] = {}
    for family in Collector(busy.datadist).collect():
        labels = {name for sample in family.samples for name in sample.labels}
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
        for suffix in suffixes.get(family.type, [""]):
            exported[family.name + suffix] = labels | set(getattr(family, "_labelnames", ()))
    for query in queries(dashboard):
        names = re.findall(r"llm_datadist_\w+", query)
        assert names, query
        assert set(names) <= set(exported), query
        known = set.union(*(exported[name] for name in names))
        by = {
            label for each in re.findall(r"by \(([\w, ]+)\)", query) for label in each.split(", ")
        }
        matched = set(re.findall(r"(\w+)=?[=~!]~?\"", query))
        assert by | matched <= known | {"le"}, query
