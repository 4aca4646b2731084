"""`llm-datadist top`: what running clusters look like from outside."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import termios
from typing import TYPE_CHECKING

import msgspec
import pytest
from rich.console import Console
from typer.testing import CliRunner

from llm_datadist import BlocksCacheKey, LLMRole, LLMStatusCode
from llm_datadist.cli import app
from llm_datadist.cli.top.order import Order
from llm_datadist.cli.top.samples import Sample, activities
from llm_datadist.cli.top.screen import Screen
from llm_datadist.cli.top.view import view
from llm_datadist.core.stats import ClusterStats, FleetStats, Histogram, LinkStats, OperationStats
from llm_datadist.endpoint import Endpoint
from llm_datadist.testing.cluster import Node

if TYPE_CHECKING:
    from rich.console import Group

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
    """The cells of each line."""
    return [re.split(r"\s{2,}", line.strip()) for line in output.splitlines()]


def row_of(first: str, output: str) -> list[str]:
    """The first line that begins with it."""
    return next(row for row in rows(output) if row[0] == first)


def test_once_prints_clusters_links_and_what_they_did(node: Node, peer: NodeProcess) -> None:
    ours, theirs = start(node, peer)
    path = node.datadist.links()[0].path
    output = top(ours, theirs, "--once")
    table = rows(output)
    assert [row_of(at, output)[1] for at in (ours, theirs)] == ["2", "1"]
    assert [row_of(at, output)[3] for at in (ours, theirs)] == [f"1 {path}", f"1 {path}"]
    assert row_of(ours, output)[-1] == "DEVICE pages: 0% of 0.00 GiB"
    assert f"metrics are off (LLM_DATADIST_METRICS=1): {theirs}" in output
    [pull] = [row for row in table if row[4:5] == ["pull"]]
    assert pull[:4] == ["2", "1", path, "linked"]
    assert float(pull[7]) > 0
    assert pull[10] == "0"
    assert ["1", "2", path, "linked", *["-"] * 7] in table, "a link without figures"


def test_an_unreachable_cluster_is_a_row_that_says_why(node: Node, peer: NodeProcess) -> None:
    ours, theirs = start(node, peer)
    peer.call(Node.stop)
    output = top(theirs, ours, "--once", code=NO_ANSWER)
    assert row_of(theirs, output)[:2] == [theirs, "-"]
    assert f"\ncannot connect to {theirs}: Connection refused\n" in output
    assert row_of(ours, output)[1] == "2"


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
    told = top(ours, "--once", code=NO_ANSWER)
    assert "link security: the peer has a shared" in told
    monkeypatch.setenv("LLM_DATADIST_LINK_SECURITY", SECRET)
    assert row_of(ours, top(ours, "--once"))[1] == "2"


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


@pytest.mark.parametrize("ending", ["ctrl-c", "q", "q while nobody answers"])
def test_it_runs_on_a_terminal_until_told(node: Node, peer: NodeProcess, ending: str) -> None:
    ours, _ = start(node, peer)
    silent = socket.create_server(("127.0.0.1", 0))
    others = [f"127.0.0.1:{silent.getsockname()[1]}"] if "nobody" in ending else []
    terminal, theirs = pty.openpty()
    env = {"PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "80", "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-m", "llm_datadist", "top", ours, "--interval", "0.1", *others],
        stdin=theirs, stdout=theirs, stderr=theirs,
        env=os.environ | env, preexec_fn=heed_interrupts,
    )  # fmt: skip
    try:
        shown = b""
        times = 0 if others else 3  # drawn anew, and again
        while shown.count(ours.encode()) < times or b"q quit" not in shown:
            shown += os.read(terminal, 65536)
        if ending == "ctrl-c":
            process.send_signal(signal.SIGINT)
        else:
            os.write(terminal, b"jsq")
        while select.select([terminal], [], [], 0.1)[0] or process.poll() is None:
            shown += os.read(terminal, 65536) if select.select([terminal], [], [], 0)[0] else b""
        assert process.wait(20) == 0
        assert termios.tcgetattr(theirs)[3] & termios.ECHO, "the terminal is as it was"
    finally:
        silent.close()
        os.close(theirs)
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


@pytest.mark.parametrize(
    ("problem", "is_announced", "said"),
    [
        ("", True, "its fleet has 9 others; 3 of 4 members that fit are linked"),
        ("etcd is \x1b[31mgone", True, "linked; its directory: etcd is"),
        ("", False, "it is not announced itself"),
    ],
)
def test_a_fleet_is_a_remark(problem: str, is_announced: bool, said: str) -> None:
    fleet = FleetStats("a folder", problem, is_announced, 9, 4, 3, 1, 2, 3, 4, 5)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(view([Sample(Endpoint("127.0.0.1", 1), cluster(1.0, fleet=fleet))], {}))
    text = console.export_text()
    assert said in text
    assert "\x1b" not in text


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


# -- the screen: what it has room for, what keys do --

#: several paths, so that each peer has a row
BUSY = cluster(
    60.0,
    links=tuple(LinkStats(peer, "tcp", "linked") for peer in range(1, 31)),
    operations=tuple(
        msgspec.structs.replace(operation(peer * 10**9, 100 - peer), peer=peer)
        for peer in range(1, 31)
    ),
)
AT = Endpoint("127.0.0.1", 26000)


def drawn(what: Screen | Group, width: int, height: int = 24) -> list[str]:
    console = Console(width=width, height=height, file=io.StringIO(), record=True)
    console.print(what)
    return [line.rstrip() for line in console.export_text().splitlines()]


@pytest.mark.parametrize(
    ("width", "gone"),
    [
        (200, set()),
        (80, {"state", "pools"}),
        (60, {"state", "pools", "GiB moved", "p50 ms", "caches"}),
        (30, {"state", "pools", "GiB moved", "p50 ms", "caches", "per s", "path", "p99 ms"}),
    ],
)
def test_a_narrow_terminal_shows_what_matters_most(width: int, gone: set[str]) -> None:
    lines = drawn(view([Sample(AT, BUSY)], {}), width)
    assert max(map(len, lines)) <= width
    headings = {word for line in lines for word in re.split(r"\s{2,}", line.strip())}
    assert gone.isdisjoint(headings)
    assert {"address", "operation", "GB/s"} <= headings
    if width == 200:
        assert {"state", "pools", "GiB moved", "p50 ms", "caches"} <= headings


def peers(lines: list[str]) -> list[str]:
    """In the order of their rows."""
    return [row[1] for line in lines if (row := line.split())[:1] == ["2"]]


def test_what_is_busiest_is_first_and_s_and_r_sort_anew() -> None:
    screen = Screen()
    screen.show([Sample(AT, BUSY)])
    assert peers(drawn(screen, 80))[0] == "30"
    screen.press("s")
    assert "links and operations, by rate" in drawn(screen, 80)
    assert peers(drawn(screen, 80))[0] == "1"
    screen.press("r")
    assert peers(drawn(screen, 80))[0] == "30"
    screen.press("s" * (len(Order) - 1))
    assert screen.order is Order.SPEED


def test_links_without_traffic_come_last() -> None:
    idle = msgspec.structs.replace(BUSY, links=(*BUSY.links, LinkStats(99, "tcp", "linked")))
    for is_reversed in (False, True):
        lines = drawn(view([Sample(AT, idle)], {}, is_reversed=is_reversed), 80)
        assert peers(lines)[-1] == "99"


def test_a_screen_is_full_and_no_more_and_its_rows_scroll() -> None:
    screen = Screen()
    assert len(drawn(screen, 80)) == 24
    screen.show([Sample(AT, BUSY)])
    shown = drawn(screen, 80)
    assert len(shown) == 24
    assert shown[1] == "clusters"
    assert "lines 1 to 22 of " in shown[-1]
    for keys, expected in (
        ("j", 2),
        ("k", 1),
        ("\x1b[B\x1b[B", 3),
        ("\x1b[5~", 1),
        ("G", 15),
        ("f", 15),
    ):
        screen.press(keys)
        assert f"lines {expected} to {expected + 21} of 36" in drawn(screen, 80)[-1], keys


def test_a_pause_keeps_the_figures() -> None:
    screen = Screen()
    screen.show([Sample(AT, BUSY)])
    screen.press(" ")
    screen.show([Sample(AT, None, "gone")])
    assert "1 of 1 clusters answer, paused" in drawn(screen, 80)[0]
    screen.press(" q")
    assert screen.is_over


def test_order_of_the_command_line(node: Node, peer: NodeProcess) -> None:
    ours, _ = start(node, peer)
    assert "by latency" in top(ours, "--once", "--sort", "latency")
    assert "Invalid value" in top(ours, "--once", "--sort", "magic", code=2)
