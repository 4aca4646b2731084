"""Several sequences in one cache: a batch, beams, several answers; here and handed over."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny_models import (  # noqa: E402  (imports torch)
    BLOCK_TOKENS,
    CONFIGS,
    Prefill,
    generate,
    generate_batch,
    make_model,
    make_prompt,
    pad,
)

from llm_datadist import LLMException, LLMRole, LLMStatusCode  # noqa: E402
from llm_datadist.integrations.transformers import (  # noqa: E402
    KVHandle,
    KVPool,
    KVShape,
    OutOfBlocks,
    cache_argument,
)
from llm_datadist.testing.process import ObjectProcess  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llm_datadist.testing.cluster import Node

NUM_BLOCKS = 48
PROMPTS = [make_prompt(9), make_prompt(4)[::-1], make_prompt(6)]
BATCH = pad(PROMPTS)


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


@pytest.fixture
def pool(node: Node, model: Any) -> KVPool:
    return make_pool(node, model)


def make_pool(
    node: Node, model: Any, num_blocks: int = NUM_BLOCKS, block_tokens: int = BLOCK_TOKENS
) -> KVPool:
    node.start(LLMRole.MIX, 2)
    return KVPool(node.datadist, KVShape.of(model, block_tokens), num_blocks)


# -- the same tokens as without --


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "how",
    [
        pytest.param({}, id="a batch"),
        pytest.param({"num_beams": 3}, id="beams"),
        pytest.param({"num_beams": 4, "num_return_sequences": 2}, id="the best beams"),
        pytest.param({"do_sample": True, "num_return_sequences": 3}, id="several answers"),
    ],
)
def test_a_padded_batch_gives_the_tokens_that_it_gives_without(
    node: Node, kind: str, how: dict[str, Any]
) -> None:
    model = make_model(kind)
    pool = make_pool(node, model, 96)
    answers = []
    for cache in (pool.new_cache(), None):
        torch.manual_seed(5)
        answers.append(generate_batch(model, *BATCH, 12, cache, **how))
    assert torch.equal(*answers)
    assert pool.num_free_blocks < 96


def test_beams_part_and_leave_no_block_behind(pool: KVPool, model: Any) -> None:
    with pool.new_cache() as cache:
        generate_batch(model, *BATCH, 8, cache, num_beams=3)
        blocks = cache.blocks
        assert len(cache.sequences) == 9
        assert len(set(blocks)) == len(blocks) == NUM_BLOCKS - pool.num_free_blocks
    assert pool.num_free_blocks == NUM_BLOCKS


def test_sequences_can_be_repeated_selected_and_gone_on_with(pool: KVPool, model: Any) -> None:
    cache = pool.new_cache()
    ids, mask = BATCH
    ids = generate_batch(model, ids, mask, 1, cache)
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    order = [0, 2, 2, 0]
    answer = generate_batch(model, ids[order], mask[order], 5, cache)
    assert torch.equal(answer, generate_batch(model, *BATCH, 6)[order])
    cache.batch_select_indices(torch.tensor([False, True, False, False]))
    assert len(cache.sequences) == 1
    assert pool.num_free_blocks == NUM_BLOCKS - len(cache.blocks)


def test_several_prompts_go_on_from_one_beginning(pool: KVPool, model: Any) -> None:
    begin = make_prompt(6)
    cache = pool.new_cache()
    generate(model, begin, 1, cache)
    cache.batch_repeat_interleave(2)
    ids = torch.tensor([[*begin, 3, 4], [*begin, 5, 6]])
    mask = torch.ones_like(ids)
    answer = generate_batch(model, ids, mask, 5, cache)
    assert torch.equal(answer, generate_batch(model, ids, mask, 5))


def test_an_empty_cache_takes_any_number_also_after_another(pool: KVPool, model: Any) -> None:
    cache = pool.new_cache()
    cache.reserve(10, 5)
    assert pool.num_free_blocks == NUM_BLOCKS - 5 * 3
    assert torch.equal(generate_batch(model, *BATCH, 3, cache), generate_batch(model, *BATCH, 3))
    cache.reset()
    assert pool.num_free_blocks == NUM_BLOCKS
    assert generate(model, PROMPTS[0], 3, cache) == generate(model, PROMPTS[0], 3)


# -- what is refused --


def test_without_free_blocks_nothing_is_changed(node: Node, model: Any) -> None:
    pool = make_pool(node, model, num_blocks=8)
    cache = pool.new_cache()
    tokens = generate(model, PROMPTS[0], 1, cache)
    for change in (partial(cache.batch_repeat_interleave, 3), partial(cache.reserve, 33)):
        with pytest.raises(OutOfBlocks, match="6 more blocks"):
            change()
    empty = pool.new_cache()
    with pytest.raises(OutOfBlocks):
        generate_batch(model, *BATCH, 1, empty)
    with pytest.raises(OutOfBlocks):
        empty.reserve(1, 6)
    assert (empty.sequences, pool.num_free_blocks) == ([[]], 5)
    assert generate(model, tokens, 4, cache) == generate(model, PROMPTS[0], 5)


def test_a_cache_of_another_number_of_sequences_is_refused(pool: KVPool, model: Any) -> None:
    cache = pool.new_cache()
    tokens = generate(model, PROMPTS[0], 1, cache)
    with pytest.raises(LLMException, match=r"holds 1 sequences, .* was given 3") as caught:
        model.generate(
            torch.tensor([tokens]), max_new_tokens=1, num_beams=3, **cache_argument(cache)
        )
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    with pytest.raises(LLMException, match="holds 1 sequences"):
        cache.reserve(20, 2)
    assert generate(model, tokens, 4, cache) == generate(model, PROMPTS[0], 5)


def test_published_sequences_stay_in_their_order(pool: KVPool, model: Any) -> None:
    with pool.new_cache() as cache:
        generate_batch(model, *BATCH, 1, cache)
        pool.publish(cache)
        for change in (
            partial(cache.batch_repeat_interleave, 2),
            partial(cache.batch_select_indices, torch.tensor([0])),
            partial(cache.reorder_cache, torch.tensor([2, 1, 0])),
        ):
            with pytest.raises(LLMException, match="is published, so its sequences stay") as caught:
                change()
            assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


@pytest.mark.parametrize("number", [0, -1, 3])
def test_a_handle_has_as_many_blocks_for_each_sequence(number: int) -> None:
    handle = KVHandle(1, 5, 7, (3, 1, 0, 2), KVShape(2, 2, 12, "float32", 4), 2)
    assert handle.sequences == [(3, 1), (0, 2)]
    assert KVHandle.from_json(handle.to_json()) == handle
    with pytest.raises(LLMException, match=f"{number} times 7 tokens in 4 blocks"):
        replace(handle, num_sequences=number)


def test_a_handle_of_an_older_release_has_one_sequence() -> None:
    handle = KVHandle(1, 5, 7, (3, 1), KVShape(2, 2, 12, "float32", 4))
    text = handle.to_json().replace(',"num_sequences":1', "")
    assert "num_sequences" not in text
    assert KVHandle.from_json(text) == handle


# -- from prefill in another process --


@pytest.fixture(scope="module")
def prefill_process() -> Iterator[ObjectProcess[Prefill]]:
    with ObjectProcess(Prefill) as process:
        yield process


@pytest.fixture
def prefill(prefill_process: ObjectProcess[Prefill]) -> Iterator[ObjectProcess[Prefill]]:
    yield prefill_process
    prefill_process.call(Prefill.stop)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("block_tokens", [BLOCK_TOKENS, 3])
def test_a_batch_is_handed_over(
    prefill: ObjectProcess[Prefill], node: Node, kind: str, block_tokens: int
) -> None:
    model = make_model(kind)
    port = prefill.call(Prefill.start, kind=kind)
    pool = make_pool(node, model, block_tokens=block_tokens)
    assert node.link(port, 1) is LLMStatusCode.LLM_SUCCESS
    text, tokens = prefill.call(Prefill.compute_batch, PROMPTS)
    with pool.fetch(KVHandle.from_json(text)) as cache:
        answer = generate_batch(model, torch.tensor(tokens), BATCH[1], 8, cache)
    assert torch.equal(answer, generate_batch(model, *BATCH, 9))
    assert pool.num_free_blocks == NUM_BLOCKS


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_beam_search_at_decode_begins_with_what_prefill_computed(
    prefill: ObjectProcess[Prefill], node: Node, kind: str
) -> None:
    model = make_model(kind)
    port = prefill.call(Prefill.start, kind=kind)
    pool = make_pool(node, model)
    assert node.link(port, 1) is LLMStatusCode.LLM_SUCCESS
    text, _ = prefill.call(Prefill.compute_batch, PROMPTS)
    cache = pool.fetch(KVHandle.from_json(text))
    cache.crop(-1)  # the beams part at the first token: the last of the prompt is computed anew
    cache.batch_repeat_interleave(3)
    answer = generate_batch(model, *BATCH, 8, cache, num_beams=3)
    assert torch.equal(answer, generate_batch(model, *BATCH, 8, num_beams=3))


def test_a_batch_without_room_takes_no_block(
    prefill: ObjectProcess[Prefill], node: Node, model: Any
) -> None:
    port = prefill.call(Prefill.start)
    pool = make_pool(node, model, num_blocks=8)
    assert node.link(port, 1) is LLMStatusCode.LLM_SUCCESS
    text, _ = prefill.call(Prefill.compute_batch, PROMPTS)
    with pytest.raises(OutOfBlocks):
        pool.fetch(KVHandle.from_json(text))
    assert pool.num_free_blocks == 8
