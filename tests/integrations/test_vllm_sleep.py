"""The vLLM connector: an engine that sleeps has no KV memory, and has it again when it wakes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

pytest.importorskip("torch")

from kv_engine import Engine
from kv_processes import (
    OURS,
    PROMPT,
    THEIRS,
    EngineProcess,
    Processes,
    hand_over,
    opened,
    two_processes,
)

from llm_datadist.testing.cluster import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with two_processes() as both:
        yield both


@pytest.fixture
def prefill(processes: Processes) -> Iterator[EngineProcess]:
    with opened(processes[0], "prefill", "kv_producer", free_port()) as engine:
        yield engine


@pytest.fixture(params=[False, True], ids=["whole", "by-layer"])
def decode(processes: Processes, request: pytest.FixtureRequest) -> Iterator[EngineProcess]:
    settings = {"pull_timeout_s": 3.0, "overlap": request.param}
    with opened(processes[1], "decode", "kv_consumer", **settings) as engine:
        yield engine


def sleep(engine: Engine) -> None:
    engine.worker.memory.unregister()


def wake(engine: Engine) -> None:
    engine.worker.memory.register()


@pytest.mark.parametrize("sleeper", ["prefill", "decode"])
def test_loads_of_an_engine_that_sleeps_fail_and_are_right_when_it_is_awake(
    prefill: EngineProcess, decode: EngineProcess, sleeper: str
) -> None:
    engine = prefill if sleeper == "prefill" else decode
    params = [hand_over(prefill, f"r{number}", PROMPT, THEIRS) for number in range(3)]
    assert decode.call(Engine.read, "r0", PROMPT, params[0], OURS) == "right"
    for _ in range(2):  # vLLM may say so twice
        engine.call(sleep)
    assert decode.call(Engine.read, "r1", PROMPT, params[1], OURS) == "failed"
    for _ in range(2):
        engine.call(wake)
    assert decode.call(Engine.read, "r2", PROMPT, params[2], OURS) == "right"
