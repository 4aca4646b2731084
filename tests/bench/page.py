"""The main rows of docs/performance.md in one run: its table, and its picture.

    python tests/bench/page.py --picture docs/pictures/performance.svg

Each command of `llm-datadist bench` is run once, one after the other, and nothing is chosen
afterwards. It takes some ten minutes, on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from rich.console import Console

from llm_datadist.cli.bench.plots import draw_findings
from llm_datadist.cli.bench.report import Findings
from llm_datadist.cli.bench.scenarios import Figure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Said = dict[str, Any]

_PACKAGES: Final = ("llm_datadist", "numpy", "nixl-cu12", "mooncake-transfer-engine-non-cuda")

SAME_HOST: Final = "--vs memcpy,readv,two-sided,nixl --rounds 11"
TCP: Final = "--path tcp --vs socket,nixl,mooncake --rounds 7"
BLOCK: Final = "--shape one-block --vs two-sided,nixl --rounds 15"
BLOCK_TCP: Final = "--shape one-block --path tcp --mode two-sided --vs socket,nixl --rounds 15"


class Row(NamedTuple):
    """One line of the table, and what it takes of the figures."""

    what: str
    target: float
    measure: Callable[[Said], float]
    is_most: bool = False  #: the target is the most that it may be, and not the least

    def cells(self, said: Said) -> tuple[str, ...]:
        value = self.measure(said)
        is_met = value <= self.target if self.is_most else value >= self.target
        shown = f"{value:.3g}" if is_met else f"**{value:.3g}, missed**"
        return self.what, f"{'≤' if self.is_most else '≥'} {self.target:g}", shown


def at_most(what: str, target: float, measure: Callable[[Said], float]) -> Row:
    return Row(what, target, measure, is_most=True)


def against(rival: str) -> Callable[[Said], float]:
    """How many times as fast ours was as that one, in the better of its configurations."""
    return lambda said: min(
        each["ours_times_as_fast"] for each in said["groups"][0] if rival in each["name"]
    )


def figure(name: str) -> Callable[[Said], float]:
    """The one of a sub-verb that is called so."""
    return lambda said: next(
        float(each["value"]) for each in said["figures"] if each["name"] == name
    )


_FIRST = figure("the first takes as long as")
_TOGETHER, _SLOWEST = figure("together, of one thread's"), figure("the slowest thread, of the mean")
ROWS: Final[dict[str, tuple[Row, ...]]] = {
    SAME_HOST: (
        Row("same host, against a C loop of memcpy", 0.95, against("memcpy")),
        Row("… against a bare loop of `process_vm_readv`", 0.98, against("readv")),
        Row("… against NIXL", 2.5, against("nixl")),
        at_most("… two-sided: its time by remote-accessible's", 1.08, against("two-sided")),
    ),
    TCP: (
        Row("TCP on loopback, against raw sockets", 0.9, against("sockets")),
        Row("… against NIXL over TCP", 2.5, against("nixl")),
        Row("… against Mooncake over TCP", 2.5, against("mooncake")),
    ),
    BLOCK: (
        Row("one 32 KiB block, same host: NIXL's time by ours", 1.0, against("nixl")),
        at_most("… two-sided: its time by remote-accessible's", 2.5, against("two-sided")),
    ),
    BLOCK_TCP: (
        Row(
            "one 32 KiB block, TCP, two-sided: raw sockets' time by ours", 0.75, against("sockets")
        ),
        Row("… NIXL's time by ours", 0.5, against("nixl")),
    ),
    "--shape llama3-70b-tp8 --vs memcpy,readv --rounds 9": (
        Row("blocks of 4 KiB (llama3-70b-tp8), against `process_vm_readv`", 0.98, against("readv")),
    ),
    "--shape deepseek-mla --vs memcpy,readv --rounds 9": (
        Row("blocks of 18 KiB (deepseek-mla), against `process_vm_readv`", 0.98, against("readv")),
    ),
    "--contiguous --vs memcpy,readv --rounds 9": (
        Row("contiguous blocks, against `process_vm_readv`", 0.98, against("readv")),
    ),
    "--vs verified --rounds 9": (
        at_most("same host, `verify_transfers`: times as long", 2.0, against("verified")),
    ),
    "plan": (
        at_most("planning 16,384 segments, ms", 1.0, figure("plan 16,384 segments")),
        at_most("… 262,144: times as long", 18.0, figure("16 times as many segments take")),
    ),
    "fan-out": (
        Row(
            "one prefill, 8 decode processes at once, against memcpy",
            0.9,
            figure("8 readers together, of memcpy's speed"),
        ),
        Row("… the slowest against the mean", 0.6, figure("the slowest reader, of the mean")),
    ),
    "layers": (
        at_most(
            "32 layers pushed as they are computed: left then, layers", 1.5, figure("in layers")
        ),
    ),
    "link": (
        at_most("link_clusters, same host, ms", 5.0, figure("link one cluster")),
        at_most("… 64 clusters in one call: times as long", 16.0, figure("64 take as long as")),
    ),
    "many-links --count 1024 --path tcp": (
        at_most(
            "1,024 links: one pull, by one with one link", 1.2, figure("… of one with one link")
        ),
    ),
    "calls": (
        at_most("one block: the first pull behind a link, by a later one", 2.0, _FIRST),
        Row("… 32 threads on one link: calls a second, by one thread's", 1.5, _TOGETHER),
        Row("… the slowest thread, by the mean", 0.5, _SLOWEST),
    ),
    "calls --path tcp --mode two-sided": (
        at_most("one block, TCP, two-sided: the first pull, by a later one", 2.0, _FIRST),
        Row("… 32 threads on one link: calls a second, by one thread's", 1.5, _TOGETHER),
        Row("… the slowest thread, by the mean", 0.5, _SLOWEST),
    ),
    "startup": (
        at_most("import llm_datadist, ms", 150.0, figure("import llm_datadist")),
        at_most("from import to a block, ms", 150.0, figure("from import to the first block")),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, help="an .svg or .png")
    parser.add_argument("--only", default="", help="commands that have this in them")
    options = parser.parse_args()
    console = Console(stderr=True)
    said: dict[str, Said] = {}
    for command in ROWS:
        if options.only in command:
            with console.status(command):
                said[command] = run(command)
    sys.stdout.writelines(f"{line}\n" for line in page(said))
    if options.picture:
        figures = list(speeds(said))
        draw_findings(Findings("main rows", {"medians": "of one run"}, figures), options.picture)


def page(said: dict[str, Said]) -> Iterator[str]:
    """The versions, and the table."""
    packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    python = f"{platform.python_implementation()} {platform.python_version()}"
    yield f"{python}, Linux {platform.release()}, {os.cpu_count()} cores; {packages}\n"
    yield "| row | target | measured | command: `llm-datadist bench` … |"
    yield "| -- | -- | -- | -- |"
    for command, figures in said.items():
        shown = f"`{command}`"
        for row in ROWS[command]:
            yield f"| {' | '.join((*row.cells(figures), shown))} |"
            shown = "the same run"


def run(command: str) -> Said:
    """What one command of `bench` measured. Raises CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "said.json"
        words = [sys.executable, "-m", "llm_datadist", "bench", *shlex.split(command)]
        subprocess.run([*words, "--json", str(file)], check=True, stdout=subprocess.DEVNULL)
        said: Said = json.loads(file.read_text())
    return said


def speeds(said: dict[str, Said]) -> Iterator[Figure]:
    """Of everybody in the two large contests, and the times of one block."""
    for where, command in (("same host", SAME_HOST), ("TCP", TCP)):
        for each in said[command]["groups"][0]:
            yield Figure(f"{where}: {each['name']}", each["gb_per_s"], "GB/s")
    for where, command in (("same host", BLOCK), ("TCP", BLOCK_TCP)):
        for each in said[command]["groups"][0]:
            yield Figure(f"one block, {where}: {each['name']}", each["median_s"] * 1e6, "us")


if __name__ == "__main__":
    main()
