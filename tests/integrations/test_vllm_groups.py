"""The vLLM connector with several KV cache groups: which blocks matter, and that only they move."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("torch")

from kv_engine import Engine, Request
from kv_processes import EngineProcess, Processes, hand_over, opened, two_processes

from llm_datadist.integrations.vllm.groups import Group
from llm_datadist.integrations.vllm.request import leave_last_token
from llm_datadist.testing.cluster import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

#: a full group, windows of 6 tokens, chunks of 8, states of everything so far
FULL = Group(("full",), 4)
WINDOW = Group(("window.0", "window.1"), 4, "window", 6)
CHUNK = Group(("chunk",), 4, "chunk", 8)
STATE = Group(("state.0", "state.1"), 16, "state")
GROUPS = (FULL, WINDOW, CHUNK, STATE)
#: without the last, who goes on needs blocks 0 to 4; 3 and 4; 4; the second state
PROMPT = list(range(100, 119))
THEIRS = [[1, 2, 3, 4, 5], [0, 0, 0, 6, 7], [0, 0, 0, 0, 8], [0, 9]]
OURS = [[21, 22, 23, 24, 25], [0, 0, 0, 26, 27], [0, 0, 0, 0, 28], [0, 29]]


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with two_processes() as both:
        yield both


@pytest.fixture
def prefill(processes: Processes) -> Iterator[EngineProcess]:
    with opened(processes[0], "p", "kv_producer", free_port(), groups=GROUPS) as engine:
        yield engine


@pytest.fixture
def decode(processes: Processes) -> Iterator[EngineProcess]:
    with opened(processes[1], "d", "kv_consumer", groups=GROUPS) as engine:
        yield engine


def positions_seen(group: Group, num_tokens: int) -> set[int]:
    """What the next token looks at, in the plainest words; of a state, its last token."""
    if group.kept == "window":
        return set(range(max(0, num_tokens + 1 - group.span_tokens), num_tokens))
    if group.kept == "chunk":
        return {at for at in range(num_tokens) if at // group.span_tokens == num_tokens // 8}
    return {num_tokens - 1} if group.kept == "state" else set(range(num_tokens))


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.kept)
@pytest.mark.parametrize("num_tokens", range(1, 70))
def test_what_is_needed_is_what_the_next_token_sees(group: Group, num_tokens: int) -> None:
    places = range(group.first_block(num_tokens), group.num_blocks(num_tokens))
    blocks = list(range(1, 1 + group.num_blocks(num_tokens)))
    assert group.needed(blocks, num_tokens) == [blocks[place] for place in places]
    seen = {position // group.block_tokens for position in positions_seen(group, num_tokens)}
    assert seen <= set(places)
    if seen:
        assert min(seen) == places.start
    assert places.stop == -(-num_tokens // group.block_tokens)


@pytest.mark.parametrize(
    ("group", "blocks"), [(FULL, [1, 2, 3, 4]), (FULL, []), (WINDOW, [1, 2, 3, 0, 5])]
)
def test_blocks_that_are_kept_no_more_are_not_handed_over(group: Group, blocks: list[int]) -> None:
    with pytest.raises(LookupError, match="are not all there"):
        group.needed(blocks, 18)


def test_where_all_blocks_are_kept_the_first_one_is_a_block_like_others() -> None:
    assert FULL.needed([1, 2, 0, 4, 5], 18) == [1, 2, 0, 4, 5]


def test_of_what_is_here_already_nothing_is_read_but_the_state() -> None:
    assert FULL.pairs([1, 2, 3, 4, 5], OURS[0], 18, 8) == ([3, 4, 5], [23, 24, 25])
    assert WINDOW.pairs([6, 7], OURS[1], 18, 8) == ([6, 7], [26, 27])
    assert WINDOW.pairs([6, 7], OURS[1], 18, 16) == ([7], [27])
    assert STATE.pairs([9], OURS[3], 18, 16) == ([9], [29])
    assert CHUNK.pairs([], [0, 0, 0, 0], 16, 8) == ([], [])


def test_blocks_of_another_size_are_paired_by_the_tokens_in_them() -> None:
    assert FULL.token_pairs(8, [1, 2, 3], OURS[0], 18, 0) == ([1, 2, 3], OURS[0], range(18))
    assert FULL.token_pairs(8, [1, 2, 3], OURS[0], 18, 12) == ([2, 3], [24, 25], range(12, 18))
    assert FULL.token_pairs(2, list(range(1, 10)), OURS[0], 18, 12) == (
        [7, 8, 9],
        [24, 25],
        range(12, 18),
    )
    # the window of token 18 begins with token 13: blocks 1 and 2 of 8 tokens, our blocks 3 and 4
    assert WINDOW.token_pairs(8, [6, 7], OURS[1], 18, 0) == ([6, 7], [26, 27], range(12, 18))
    assert WINDOW.token_pairs(8, [6, 7], OURS[1], 18, 16) == ([7], [27], range(16, 18))
    with pytest.raises(LookupError, match=r"the hand-over has 3 blocks of window\.0, not 2"):
        WINDOW.token_pairs(8, [5, 6, 7], OURS[1], 18, 0)


@pytest.mark.parametrize(
    ("handed", "ours", "said"),
    [
        ([7], OURS[1], "the hand-over has 1 blocks of window.0, not 2"),
        ([5, 6, 7], OURS[1], "the hand-over has 3 blocks of window.0, not 2"),
        ([6, 7], [0, 0, 0, 0, 27], "blocks of window.0 are not all there"),
        ([6, 7], [0, 0, 0, 26], "blocks of window.0 are not all there"),
    ],
)
def test_lists_that_are_not_what_is_needed_are_refused(
    handed: list[int], ours: list[int], said: str
) -> None:
    with pytest.raises(LookupError, match=said):
        WINDOW.pairs(handed, ours, 18, 0)


@pytest.mark.parametrize("path", ["cma", "tcp"])
def test_only_the_blocks_that_are_needed_move(
    prefill: EngineProcess, processes: Processes, path: str
) -> None:
    by_path = {"llm_config": {"transfer_path": path}}
    with opened(processes[1], "d", "kv_consumer", groups=GROUPS, **by_path) as decode:
        params = hand_over(prefill, "r", PROMPT, THEIRS)
        assert params["remote_block_ids"] == [[1, 2, 3, 4, 5], [6, 7], [8], [9]]
        assert params["remote_num_tokens"] == len(PROMPT) - 1
        assert decode.call(Engine.read, "d", PROMPT, params, OURS) == "right"
        assert decode.call(Engine.touched_blocks) == set(range(21, 30))
        assert prefill.call(Engine.step_until_sent, "r")
        block, state = 2 * 4 * 8 * 4, 2 * 16 * 8 * 4
        moved = 5 * block + 2 * 2 * block + block + 2 * state
        assert decode.call(Engine.counts)["pull_nbytes"] == [moved]


def test_groups_may_lie_in_one_memory(processes: Processes) -> None:
    """As vLLM has it: a block is one group's at a time."""
    groups = (FULL, Group(("window.0",), 4, "window", 6))
    with (
        opened(processes[0], "p", "kv_producer", free_port(), groups=groups, share=True) as prefill,
        opened(processes[1], "d", "kv_consumer", groups=groups, share=True) as decode,
    ):
        params = hand_over(prefill, "r", PROMPT, THEIRS[:2])
        assert decode.call(Engine.read, "d", PROMPT, params, OURS[:2]) == "right"


def test_the_first_tokens_may_be_here(prefill: EngineProcess, decode: EngineProcess) -> None:
    params = hand_over(prefill, "r", PROMPT, THEIRS)
    decode.call(Engine.arrive, "d", PROMPT, params)
    assert decode.call(Engine.schedule, "d", OURS, 16) == 2
    assert decode.call(Engine.step_until_received, "d")
    assert decode.call(Engine.touched_blocks) == {25, 27, 28, 29}


def test_engines_whose_groups_differ_are_refused(processes: Processes) -> None:
    theirs = (*GROUPS[:1], Group(WINDOW.layers, 4, "window", 7), *GROUPS[2:])
    with (
        opened(processes[0], "p", "kv_producer", free_port(), groups=theirs) as prefill,
        opened(processes[1], "d", "kv_consumer", groups=GROUPS) as decode,
    ):
        params = hand_over(prefill, "r", PROMPT, THEIRS)
        assert decode.call(Engine.read, "d", PROMPT, params, OURS) == "failed"
        assert "it does not fit: KV cache groups: " in decode.call(Engine.log_text)
        assert decode.call(Engine.touched_blocks) == set()


def test_a_block_that_is_not_there_any_more_is_not_handed_over(prefill: EngineProcess) -> None:
    gone = [*THEIRS[:3], [0, 0]]
    assert prefill.call(prefill_without_writing, gone) is None
    assert "the blocks of state.0 are not all there" in prefill.call(Engine.log_text)
    prefill.call(Engine.step)
    assert prefill.call(Engine.prefill, "s", PROMPT, THEIRS) is not None


def prefill_without_writing(engine: Engine, blocks: list[list[int]]) -> Any:
    assert engine.producer
    request = Request("r", list(PROMPT), {"do_remote_decode": True})
    engine.producer.arrived(request)
    engine.producer.scheduled(request)
    engine.step()
    request.num_computed_tokens = request.num_prompt_tokens
    request.status = type(request.status).FINISHED_LENGTH_CAPPED
    return engine.producer.finished(request, blocks)


def test_a_prompt_is_computed_without_its_last_token() -> None:
    tokens = [1, 2, 3]
    request = Request("r", tokens, {"do_remote_decode": True})
    assert leave_last_token(request)
    assert (request.prompt_token_ids, request.num_prompt_tokens) == ([1, 2], 2)
    assert (request._all_token_ids, request.max_tokens) == ([1, 2], 1)
    assert tokens == [1, 2, 3], "the list is the client's, too"


@pytest.mark.parametrize(
    ("tokens", "more"), [([1], {}), (None, {}), ([1, 2], {"skip_reading_prefix_cache": True})]
)
def test_a_prompt_that_must_stay_whole_is_not_handed_over(
    prefill: EngineProcess, tokens: list[int] | None, more: dict[str, Any]
) -> None:
    request = Request("r", tokens, {"do_remote_decode": True}, **more)
    assert not leave_last_token(request)
    assert request.prompt_token_ids == tokens
    if tokens:
        assert prefill.call(Engine.prefill, "r", tokens, [[1], [2], [3], [4]], **more) is None
        assert "its last token is needed here" in prefill.call(Engine.log_text)
