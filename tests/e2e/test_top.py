"""`llm-datadist top`: what running clusters look like from outside."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from rich.console import Console
from typer.testing import CliRunner

from llm_datadist import BlocksCacheKey, LLMRole, LLMStatusCode
from llm_datadist.cli import app
from llm_datadist.cli.top.view import Sample, activities, view
from llm_datadist.core.stats import ClusterStats, Histogram, LinkStats, OperationStats
from llm_datadist.endpoint import Endpoint
from llm_datadist.testing.cluster import Node

if TYPE_CHECKING:
    from llm_datadist.testing.cluster import NodeProcess

KEY = BlocksCacheKey(1, 0)
SHAPE = (2, 8, 4096)
#: the exit code when a cluster did not answer
NO_ANSWER = 3
SECRET = json.dumps({"secret": "a secret of more than sixteen bytes"})


def own_blocks(node: Node) -> int:
    return node.blocks_cache(*SHAPE, seed=1, key=KEY).cache_id


def start(node: Node, peer: NodeProcess, security: str = "") -> list[str]:
    """Two linked clusters, of which cluster 2 pulled from cluster 1; where they listen."""
    port = peer.call(
        Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", link_security=security
    )
    peer.call(own_blocks)
    ours = node.start(
        LLMRole.DECODER, 2, listen_ip_info="127.0.0.1:0", metrics=True, link_security=security,
        mem_pool_cfg='{"memory_size": 1048576}',
    )  # fmt: skip
    assert node.link(port, 1) == LLMStatusCode.LLM_SUCCESS
    node.manager.pull_blocks(KEY, node.blocks_cache(*SHAPE), [1, 4], [0, 2])
    return [f"127.0.0.1:{ours}", f"127.0.0.1:{port}"]


def top(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["top", *arguments])
    assert done.exit_code == code, done.output
    return done.output


def rows(output: str) -> list[list[str]]:
    """The cells of the tables' lines."""
    lines = [line for line in output.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_once_prints_clusters_links_and_what_they_did(node: Node, peer: NodeProcess) -> None:
    ours, theirs = start(node, peer)
    path = node.datadist.links()[0].path
    table = rows(top(ours, theirs, "--once"))
    assert [row[:2] for row in table[:2]] == [[ours, "2"], [theirs, "1"]]
    assert [row[3] for row in table[:2]] == [f"1 {path}", f"1 {path}"]
    assert table[0][8] == "DEVICE pages: 0% of 0.00 GiB"
    assert "LLM_DATADIST_METRICS=1" in table[1][9]
    [pull] = [row for row in table if row[4:5] == ["pull"]]
    assert pull[:4] == ["2", "1", path, "linked"]
    assert float(pull[7]) > 0
    assert pull[10] == "0"
    assert ["1", "2", path, "linked", *["-"] * 7] in table, "a link without figures"


def test_an_unreachable_cluster_is_a_row_that_says_why(node: Node, peer: NodeProcess) -> None:
    ours, theirs = start(node, peer)
    peer.call(Node.stop)
    table = rows(top(theirs, ours, "--once", code=NO_ANSWER))
    assert table[0][:2] == [theirs, "-"]
    assert f"cannot connect to {theirs}" in table[0][9]
    assert table[1][1] == "2"


def test_json_has_all_figures(node: Node, peer: NodeProcess) -> None:
    ours, theirs = start(node, peer)
    peer.call(Node.stop)
    said = json.loads(top(ours, theirs, "--json", code=NO_ANSWER))
    assert len(said["histogram_bounds_s"]) == 22
    first, second = said["clusters"]
    assert (first["address"], first["stats"]["cluster_id"]) == (ours, 2)
    [pull] = [each for each in first["stats"]["operations"] if each["operation"] == "pull"]
    assert (pull["succeeded"], pull["nbytes"]) == (1, 2 * 2 * 4096)
    assert second == {"address": theirs, "problem": second["problem"]}


def test_clusters_with_link_security_want_it(
    node: Node, peer: NodeProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, _ = start(node, peer, SECRET)
    told = rows(top(ours, "--once", code=NO_ANSWER))[0][9]
    assert "link security: the peer has a shared" in told
    monkeypatch.setenv("LLM_DATADIST_LINK_SECURITY", SECRET)
    assert rows(top(ours, "--once"))[0][1] == "2"


@pytest.mark.parametrize("wrong", ["nothing", "1.2.3.4", "1.2.3.4:99999"])
def test_what_is_no_address_is_said_in_a_line(wrong: str) -> None:
    output = top(wrong, "--once", code=2)
    assert output.startswith("top: ")
    assert wrong in output or "65535" in output


@pytest.mark.parametrize("verb", ["top", "doctor", "demo", "bench"])
def test_help_says_what_exit_codes_mean(verb: str) -> None:
    assert "Exit code 0: " in CliRunner().invoke(app, [verb, "--help"]).output


def heed_interrupts() -> None:
    """Whatever runs the tests may have had them ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_it_runs_on_a_terminal_until_ctrl_c(node: Node, peer: NodeProcess) -> None:
    ours, _ = start(node, peer)
    terminal, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "llm_datadist", "top", ours, "--interval", "0.1"],
        stdin=theirs, stdout=theirs, stderr=theirs,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "200"},
        preexec_fn=heed_interrupts,
    )  # fmt: skip
    os.close(theirs)
    try:
        shown = b""
        while shown.count(ours.encode()) < 3:  # drawn anew, and again
            shown += os.read(terminal, 65536)
        process.send_signal(signal.SIGINT)
        with suppress(OSError):  # EIO: nobody writes there any more
            while rest := os.read(terminal, 65536):
                shown += rest
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    assert b"Traceback" not in shown
    assert b"Abort" not in shown


# -- what a hostile cluster might answer; rates --


def operation(nbytes: int, count: int, name: str = "pull") -> OperationStats:
    times = Histogram((count, *[0] * 22), 0.0)
    return OperationStats(name, 1, "tcp", count, (), nbytes, 1, times, times, times, times)


def cluster(uptime_s: float, **fields: object) -> ClusterStats:
    return ClusterStats(2, uptime_s, 1, 0, 0, True, **fields)  # type: ignore[arg-type]


def test_words_of_a_cluster_are_neither_markup_nor_escape_sequences() -> None:
    link = LinkStats(1, "[/red]\x1b]0;title\x07", "[bold")
    stats = cluster(1.0, links=(link,), operations=(operation(1, 1, "\x1b[2J"),))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(view([Sample(Endpoint("127.0.0.1", 1), stats)], {}))
    text = console.export_text()
    assert "\x1b" not in text
    assert "[/red]" in text
    assert "[bold" in text


def test_rates_are_those_of_the_time_between_two_answers() -> None:
    before = cluster(10.0, operations=(operation(1000, 5),))
    now = cluster(12.0, operations=(operation(5000, 9), operation(600, 6, "push")))
    pull, push = activities(now, before)
    assert (pull.nbytes_per_s, pull.per_s) == (2000.0, 2.0)
    assert (push.nbytes_per_s, push.per_s) == (300.0, 3.0)


def test_after_a_restart_rates_are_those_since_then() -> None:
    [pull] = activities(
        cluster(2.0, operations=(operation(1000, 4),)),
        cluster(10.0, operations=(operation(9000, 90),)),
    )
    assert (pull.nbytes_per_s, pull.per_s) == (500.0, 2.0)
