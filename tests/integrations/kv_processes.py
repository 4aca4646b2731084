"""Two engines in processes of their own, as the tests of the vLLM connector need them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from kv_engine import Engine

from llm_datadist.testing.process import ObjectProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kv_engine import Blocks

PROMPT = list(range(100, 118))  # five blocks, the last half full
THEIRS, OURS, MORE = [9, 3, 20, 4, 17], [1, 2, 30, 5, 8], [11, 12, 13, 14, 15]

EngineProcess: TypeAlias = "ObjectProcess[Engine]"
Processes: TypeAlias = "tuple[EngineProcess, EngineProcess]"


@contextmanager
def two_processes() -> Iterator[Processes]:
    """For all tests of a module that do not harm them."""
    with ObjectProcess(Engine) as one, ObjectProcess(Engine) as other:
        yield one.ready(), other.ready()


@contextmanager
def opened(process: EngineProcess, *args: object, **settings: object) -> Iterator[EngineProcess]:
    process.call(Engine.open, *args, **settings)
    try:
        yield process
    finally:
        process.call(Engine.close)


def hand_over(
    prefill: EngineProcess,
    request_id: str = "r",
    tokens: list[int] = PROMPT,
    blocks: Blocks = THEIRS,
) -> dict[str, Any]:
    """What the decode request of a prompt carries that prefill has computed."""
    params = prefill.call(Engine.prefill, request_id, tokens, blocks)
    assert params is not None
    return params
