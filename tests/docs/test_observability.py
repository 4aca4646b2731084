"""The page on observability: its code runs, and its table has the metrics that there are."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily

from llm_datadist import LLMRole
from llm_datadist.observe.prometheus import Collector

if TYPE_CHECKING:
    from llm_datadist.testing.cluster import Node

PAGE = Path(__file__).parents[2] / "docs" / "observability.md"


def test_the_code_of_the_page_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 3
    switch_on, prometheus, tracing = (block.replace("9464", "0") for block in blocks)
    setting = "datadist = LLMDataDist("
    assert setting in switch_on
    script = tmp_path / "example.py"
    script.write_text(
        switch_on.replace(setting, f"{tracing}{setting}")
        + prometheus
        + "datadist.link_clusters([])\nserver.shutdown()\nserver.server_close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert '"name": "llm_datadist.link"' in done.stdout


def test_the_table_names_the_metrics_that_are_exported(node: Node) -> None:
    node.start(LLMRole.DECODER, 2, metrics=True)
    exported = {
        family.name + "_total" * isinstance(family, CounterMetricFamily)
        for family in Collector(node.datadist).collect()
    }
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `llm_datadist_")]
    listed = {
        "llm_datadist" + name.removeprefix("llm_datadist")
        for row in rows
        for name in re.findall(r"`(llm_datadist_\w+|_\w+)`", row.split("|")[1])
    }
    assert listed == exported
