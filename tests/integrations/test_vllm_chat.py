"""The vLLM connector in conversations: prefill reads of decode what decode has answered."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("torch")

from kv_engine import Engine
from kv_processes import (
    OURS,
    PROMPT,
    THEIRS,
    EngineProcess,
    hand_over,
    opened,
    two_processes,
)

from llm_datadist.testing.cluster import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

ANSWER = [201, 202, 203]
#: of the second turn: with the answer 21 tokens, of which decode has the KV of 20
QUESTION = [301, 302]
#: they continue those of the first turn
LATER = [*THEIRS, 18]
BOTH = {"do_remote_prefill": True, "do_remote_decode": True}


@pytest.fixture
def engines() -> Iterator[tuple[EngineProcess, EngineProcess]]:
    with (
        two_processes() as (one, other),
        opened(one, "prefill", "kv_both", free_port()) as prefill,
        opened(other, "decode", "kv_both", free_port()) as decode,
    ):
        yield prefill, decode


def answered(prefill: EngineProcess, decode: EngineProcess) -> dict[str, Any]:
    """The first turn; what the next turn's prefill request carries."""
    params = hand_over(prefill) | BOTH
    assert decode.call(Engine.read, "d", PROMPT, params, OURS) == "right"
    assert prefill.call(Engine.step_until_sent, "r")
    back = decode.call(Engine.answer, "d", ANSWER, OURS)
    assert back is not None
    decode.call(Engine.step)
    return back | BOTH


def test_prefill_reads_the_answer_and_is_left_with_the_new_tokens(
    engines: tuple[EngineProcess, EngineProcess],
) -> None:
    prefill, decode = engines
    back = answered(prefill, decode)
    had = len(PROMPT + ANSWER) - 1
    assert back["remote_num_tokens"] == had
    prefill.call(Engine.arrive, "r2", PROMPT + ANSWER + QUESTION, back, max_tokens=1)
    assert prefill.call(Engine.schedule, "r2", LATER) == had
    assert prefill.call(Engine.step_until_received, "r2")
    assert not prefill.call(Engine.has_failed, "r2")
    assert prefill.call(Engine.has, (PROMPT + ANSWER)[:had], LATER)
    assert decode.call(Engine.step_until_sent, "d"), "prefill has let go of the blocks"
    again = prefill.call(Engine.finish, "r2", LATER)
    assert again is not None, "and it goes on to decode"
    assert again["remote_num_tokens"] == len(PROMPT + ANSWER + QUESTION)


def test_an_answer_that_is_read_as_other_tokens_is_computed(
    engines: tuple[EngineProcess, EngineProcess],
) -> None:
    """As when a chat template leaves out what a model has thought."""
    prefill, decode = engines
    back = answered(prefill, decode)
    prefill.call(Engine.arrive, "r2", PROMPT + ANSWER[1:] + QUESTION, back)
    assert prefill.call(Engine.schedule, "r2", LATER) == 0
    assert "read as other tokens" in prefill.call(Engine.log_text)
