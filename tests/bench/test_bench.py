"""`llm-datadist bench` moves and verifies; how fast it was is nobody's business here."""

from __future__ import annotations

import json
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


def test_a_sweep_of_block_sizes_and_its_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")
    file, picture = tmp_path / "figures.json", tmp_path / "sweep.svg"
    bench(*SMALL, "--block-bytes", "4k..16k", "--json", str(file), "--plot", str(picture))
    sizes = [group[0]["workload"]["block_nbytes"] for group in groups_of(file)]
    assert sizes == [4096, 8192, 16384]
    assert "<svg" in picture.read_text()


@pytest.mark.parametrize("contiguous", [(), ("--contiguous",)])
def test_other_shapes(contiguous: tuple[str, ...]) -> None:
    table = bench("--shape", "one-block", "--rounds", "1", *contiguous)
    assert "memcpy" in table


def test_many_links() -> None:
    said = bench("many-links", "--count", "5", "--path", "tcp")
    assert "link 4 clusters in one call" in said
    assert "one pull among 5 links" in said


@pytest.mark.parametrize("scenario", ["plan", "startup"])
def test_scenarios_that_need_little_memory(scenario: str) -> None:
    assert "ms" in bench(scenario, "--rounds", "1")


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
    ],
)
def test_what_cannot_be_measured_is_said_in_a_line(arguments: list[str], message: str) -> None:
    assert message in bench(*arguments, expect=2)
