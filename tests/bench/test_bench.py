"""`llm-datadist bench` moves and verifies; how fast it was is nobody's business here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

SMALL = ("--tensors", "4", "--blocks", "32", "--moved", "16", "--rounds", "2", "--threads", "2")


def bench(*arguments: str, expect: int = 0) -> str:
    command = [sys.executable, "-m", "llm_datadist", "bench", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == expect, done.stderr
    return done.stdout if expect == 0 else done.stderr


def groups_of(file: Path) -> list[list[dict[str, Any]]]:
    groups: list[list[dict[str, Any]]] = json.loads(file.read_text())["groups"]
    return groups


@pytest.mark.parametrize(
    "operation", ["pull_blocks", "push_blocks", "pull_cache", "transfer_cache_async"]
)
@pytest.mark.parametrize("path", ["cma", "tcp"])
def test_every_operation_on_every_path(operation: str, path: str, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    bench(*SMALL, "--operation", operation, "--path", path, "--json", str(file))
    ((ours, ceiling),) = groups_of(file)
    assert (ours["name"], ours["detail"]) == ("llm_datadist", path)
    assert ceiling["name"] == ("memcpy x2" if path == "cma" else "sockets x2")
    for figures in (ours, ceiling):
        assert figures["verified"]
        assert figures["moved_nbytes"] == 4 * 16 * 32 * 1024
        assert len(figures["rounds_s"]) == 2
        assert figures["gb_per_s"] > 0


def test_two_sided_mode(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    bench(*SMALL, "--mode", "two-sided", "--vs", "none", "--json", str(file))
    ((ours,),) = groups_of(file)
    assert ours["is_accessible"] is False


@pytest.mark.long
def test_a_sweep_of_block_sizes_and_its_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")
    file, picture = tmp_path / "figures.json", tmp_path / "sweep.svg"
    bench(*SMALL, "--block-bytes", "4k..16k", "--json", str(file), "--plot", str(picture))
    sizes = [group[0]["workload"]["block_nbytes"] for group in groups_of(file)]
    assert sizes == [4096, 8192, 16384]
    words = words_of(picture)
    for what in ("pull_blocks over cma, remote-accessible", "block size, KiB", "16"):
        assert what in words


@pytest.mark.parametrize("contiguous", [(), ("--contiguous",)])
def test_other_shapes(contiguous: tuple[str, ...]) -> None:
    title, *table = bench("--shape", "one-block", "--rounds", "1", *contiguous).splitlines()
    assert title.startswith("pull_blocks over cma, remote-accessible, one-block: ")
    assert title.endswith(" threads")
    assert "memcpy" in "\n".join(table)


@pytest.mark.long
def test_many_links() -> None:
    said = bench("many-links", "--count", "5", "--path", "tcp")
    assert "link 4 clusters in one call" in said
    assert "one pull among 5 links" in said


@pytest.mark.long
def test_calls() -> None:
    said = bench("calls", "--rounds", "1", "--path", "tcp", "--mode", "two-sided")
    assert "the first pull behind a link" in said
    assert "pulls by 32 threads" in said


@pytest.mark.parametrize("scenario", ["plan", "startup"])
def test_scenarios_that_need_little_memory(scenario: str, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    title, *table = bench(scenario, "--rounds", "1", "--json", str(file)).splitlines()
    assert title == f"{scenario}: rounds 1"
    assert " ms " in "\n".join(table)
    said = json.loads(file.read_text())
    assert (said["scenario"], said["settings"]) == (scenario, {"rounds": 1})
    for figure in said["figures"]:
        assert figure["name"]
        assert figure["unit"]
        assert figure["value"] > 0


SUB_VERBS = ["plan", "startup", "link", "fan-out", "layers", "many-links", "calls"]


@pytest.mark.parametrize("verb", SUB_VERBS)
def test_every_sub_verb_writes_figures_and_pictures(verb: str) -> None:
    assert "choose from" not in bench(verb, "--help")
    for option in ("--json", "--plot"):
        [line] = bench(verb, option, "/no/such/folder/x.svg", expect=2).splitlines()
        assert line == "bench: /no/such/folder/x.svg: there is no such folder"


def words_of(picture: Path) -> str:
    """What is written in an SVG of matplotlib's: it draws letters, and notes them."""
    return " ".join(re.findall("<!-- (.*?) -->", picture.read_text()))


def test_the_picture_of_a_sub_verb(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")
    picture = tmp_path / "plan.svg"
    bench("plan", "--rounds", "1", "--plot", str(picture))
    words = words_of(picture)
    assert "plan: rounds 1" in words
    assert "16,384 segments" in words


def test_the_picture_of_one_size(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")
    picture = tmp_path / "bars.svg"
    bench(*SMALL, "--path", "tcp", "--mode", "two-sided", "--plot", str(picture))
    words = words_of(picture)
    for what in ("pull_blocks over tcp, two-sided", "blocks of 32 KiB", "GB/s", "sockets x2"):
        assert what in words


def test_options_before_a_sub_verb_are_refused() -> None:
    [line] = bench("--rounds", "3", "plan", expect=2).splitlines()
    assert line == "bench: --rounds before plan says nothing to it: write it behind plan"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "gpt"], "choose from llama3-8b"),
        (["--block-bytes", "huge"], "write 4096, 4k or 2m"),
        (["--block-bytes", "100"], "words of 8 bytes"),
        (["--moved", "1000"], "the cache has 512 blocks"),
        (["--vs", "magic"], "choose from memcpy"),
        (["--operation", "push_blocks", "--mode", "two-sided"], "remote-accessible"),
        (["--plot", "picture.txt"], "a .png or .svg"),
        (["--json", "/no/such/folder/x.json"], "no such folder"),
        (["--blocks", "100000000"], "of memory, "),
        (["--blocks", "100000000", "--block-bytes", "8", "--vs", "none"], "of memory, "),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_line(arguments: list[str], message: str) -> None:
    [line] = bench(*arguments, expect=2).splitlines()
    assert line.startswith("bench: ")
    assert message in line


def test_a_missing_extra_is_said_in_a_line() -> None:
    without = "import sys; sys.modules['matplotlib'] = None; import llm_datadist.cli as c; c.app()"
    done = subprocess.run(
        [sys.executable, "-c", without, "bench", "plan", "--plot", "x.png"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "bench: --plot needs matplotlib: pip install matplotlib\n"
