"""The demo as a user runs it: five prompts, two processes, the same tokens as one process alone."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
from command_line import COMMAND, figures, run, run_demo

tiny_model = tiny.tiny_model

pytestmark = [pytest.mark.model, pytest.mark.slow]

BLOCK_TOKENS = 16


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The figures of one run on the fastest path, which has to succeed; TCP has its own below."""
    file = tmp_path_factory.mktemp("demo") / "figures.json"
    done = run_demo("--path", "cma", "--max-new-tokens", "8", "--json", str(file))
    assert done.stderr == ""
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "demo: 5/5 identical"
    return figures(file)


def test_every_answer_is_that_of_one_process_alone(answered: dict[str, Any]) -> None:
    assert answered["path"] == "cma"
    assert answered["path_reason"] == ""
    assert answered["num_identical"] == 5
    for request in answered["requests"]:
        assert request["identical"] is True
        assert request["tokens"] == request["plain_tokens"]


def test_the_prompts_go_from_less_than_a_block_to_1500_tokens(answered: dict[str, Any]) -> None:
    lengths = [request["prompt_tokens"] for request in answered["requests"]]
    assert len(set(lengths)) == 5
    assert min(lengths) < BLOCK_TOKENS
    assert max(lengths) >= 1500


def test_exactly_the_blocks_of_a_request_are_moved(answered: dict[str, Any]) -> None:
    #: 30 layers of K and V, 3 heads of 64 float32
    block_nbytes = 30 * 2 * BLOCK_TOKENS * 3 * 64 * 4
    for request in answered["requests"]:
        assert request["blocks"] == -(-request["prompt_tokens"] // BLOCK_TOKENS)
        assert request["kv_bytes"] == request["blocks"] * block_nbytes


def test_the_next_prompt_is_computed_while_the_last_one_is_answered(
    answered: dict[str, Any],
) -> None:
    requests = answered["requests"]
    overlaps = [
        later["submitted_s"] < earlier["finished_s"] for earlier, later in pairwise(requests)
    ]
    assert overlaps == [True] * 4


def test_the_answers_are_about_the_prompts(answered: dict[str, Any]) -> None:
    assert "Paris" in answered["requests"][0]["text"]
    assert "lighthouse" in answered["requests"][1]["text"]


@pytest.mark.long
def test_without_permission_to_read_memory_it_works_over_tcp_and_says_why(
    tiny_model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "figures.json"
    options = ("--model", str(tiny_model), "--max-new-tokens", "8", "--json", str(file))
    done = _run_without_foreign_memory(*options)
    assert done.returncode == 0
    assert "demo: 5/5 identical" in done.stdout
    assert "not the fastest path: cma" in done.stdout
    assert "Operation not permitted" in done.stdout
    assert figures(file)["path"] == "tcp"
    assert "Operation not permitted" in figures(file)["path_reason"]


@pytest.mark.long
def test_a_path_that_is_insisted_on_but_not_permitted_is_an_error_with_the_remedy(
    tiny_model: Path,
) -> None:
    done = _run_without_foreign_memory("--path", "cma", "--model", str(tiny_model))
    assert done.returncode == 1
    assert "try --path auto" in done.stderr
    assert "Operation not permitted" in done.stderr
    assert "Traceback" not in done.stderr


def _run_without_foreign_memory(*options: str) -> Any:
    script = Path(__file__).parents[1] / "sandbox.py"
    return run(sys.executable, str(script), *COMMAND, "demo", *options)


@pytest.mark.long
def test_a_local_folder_can_be_the_model_and_blocks_another_size(
    tiny_model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "figures.json"
    options = ("--block-tokens", "50", "--max-new-tokens", "20", "--json", str(file))
    done = run_demo("--model", str(tiny_model), *options)
    assert done.stderr == ""
    assert done.returncode == 0
    found = figures(file)
    assert (found["model"], found["block_tokens"]) == ("tiny", 50)
    for request in found["requests"]:
        assert request["blocks"] == -(-request["prompt_tokens"] // 50)
        assert len(request["tokens"]) == 20
