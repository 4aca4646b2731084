"""A request on its way from prefill in another process to decode in this one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny_models import (
    BLOCK_TOKENS,
    CONFIGS,
    Prefill,
    generate,
    make_model,
    make_prompt,
)

from llm_datadist import LLMException, LLMRole, LLMStatusCode
from llm_datadist.integrations.transformers import (
    KVHandle,
    KVPool,
    KVShape,
    OutOfBlocks,
)
from llm_datadist.testing.process import ObjectProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llm_datadist.testing.cluster import Node

NUM_BLOCKS = 16
NOT_EXIST = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST


@pytest.fixture(scope="module")
def prefill_process() -> Iterator[ObjectProcess[Prefill]]:
    with ObjectProcess(Prefill) as process:
        yield process


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


@pytest.fixture
def prefill(prefill_process: ObjectProcess[Prefill]) -> Iterator[ObjectProcess[Prefill]]:
    yield prefill_process
    prefill_process.call(Prefill.stop)


@pytest.fixture
def pool(
    prefill: ObjectProcess[Prefill], node: Node, model: Any, path: str, is_accessible: bool
) -> KVPool:
    """Decode's, linked to prefill."""
    settings = {"transfer_path": path, "enable_remote_cache_accessible": is_accessible}
    return linked_pool(prefill, node, model, **settings)


@pytest.fixture
def any_pool(prefill: ObjectProcess[Prefill], node: Node, model: Any) -> KVPool:
    """The same, for what does not depend on path and mode."""
    return linked_pool(prefill, node, model)


def linked_pool(
    prefill: ObjectProcess[Prefill], node: Node, model: Any, **settings: object
) -> KVPool:
    port = prefill.call(Prefill.start, **settings)
    node.start(LLMRole.DECODER, 2, **settings)
    assert node.link(port, 1) is LLMStatusCode.LLM_SUCCESS
    return KVPool(node.datadist, KVShape.of(model, BLOCK_TOKENS), NUM_BLOCKS)


def handle_of(text: str) -> KVHandle:
    return KVHandle.from_json(text)


# -- the same tokens --


def test_decode_goes_on_as_one_process_would(
    prefill: ObjectProcess[Prefill], pool: KVPool, model: Any
) -> None:
    pool.new_cache().reserve(5)  # so that the block numbers differ on the two sides
    for num_tokens in (1, 4, 17):
        prompt = make_prompt(num_tokens)
        text, tokens = prefill.call(Prefill.compute, prompt)
        with pool.fetch(handle_of(text)) as cache:
            assert cache.get_seq_length() == num_tokens
            assert generate(model, tokens, 8, cache) == generate(model, prompt, 9)


@pytest.mark.parametrize("kind", CONFIGS)
def test_decode_goes_on_with_a_model_of_any_kind(
    prefill: ObjectProcess[Prefill], node: Node, kind: str
) -> None:
    """Keys and values of unequal sizes, one head for all queries, windows in some layers."""
    model, prompt = make_model(kind), make_prompt(10)
    port = prefill.call(Prefill.start, kind=kind)
    node.start(LLMRole.DECODER, 2)
    assert node.link(port, 1) is LLMStatusCode.LLM_SUCCESS
    pool = KVPool(node.datadist, KVShape.of(model, BLOCK_TOKENS), NUM_BLOCKS)
    pool.new_cache().reserve(5)  # so that the block numbers differ on the two sides
    text, tokens = prefill.call(Prefill.compute, prompt)
    with pool.fetch(handle_of(text)) as cache:
        assert generate(model, tokens, 12, cache) == generate(model, prompt, 13)


def test_requests_that_are_fetched_later_are_not_mixed_up(
    prefill: ObjectProcess[Prefill], any_pool: KVPool, model: Any
) -> None:
    prompts = [make_prompt(9), make_prompt(9)[::-1], make_prompt(6)]
    computed = [prefill.call(Prefill.compute, prompt) for prompt in prompts]
    for prompt, (text, tokens) in reversed(list(zip(prompts, computed, strict=True))):
        cache = any_pool.fetch(handle_of(text))
        assert generate(model, tokens, 4, cache) == generate(model, prompt, 5)


def test_what_prefill_adds_after_publishing_does_not_travel(
    prefill: ObjectProcess[Prefill], any_pool: KVPool, model: Any
) -> None:
    prompt = make_prompt(6)
    text, tokens = prefill.call(Prefill.compute, prompt, num_more=5)
    cache = any_pool.fetch(handle_of(text))
    assert cache.get_seq_length() == 6
    assert generate(model, tokens, 8, cache) == generate(model, prompt, 9)


def test_what_decode_has_made_can_go_back(
    prefill: ObjectProcess[Prefill], any_pool: KVPool, model: Any
) -> None:
    prompt = make_prompt(6)
    text, tokens = prefill.call(Prefill.compute, prompt)
    cache = any_pool.fetch(handle_of(text))
    tokens = generate(model, tokens, 4, cache)
    back = any_pool.publish(cache)
    assert prefill.call(Prefill.go_on, back, tokens, 4) == generate(model, prompt, 9)


# -- lifetime --


def test_blocks_are_free_again_on_both_sides(
    prefill: ObjectProcess[Prefill], any_pool: KVPool, model: Any
) -> None:
    for _ in range(NUM_BLOCKS):  # two blocks each
        text, _tokens = prefill.call(Prefill.compute, make_prompt(7))
        any_pool.fetch(handle_of(text)).release()
        assert prefill.call(Prefill.release, handle_of(text)) == NUM_BLOCKS
    assert any_pool.num_free_blocks == NUM_BLOCKS


def test_what_prefill_has_released_is_refused_even_if_another_request_is_there_now(
    prefill: ObjectProcess[Prefill], pool: KVPool, model: Any
) -> None:
    stale, _ = prefill.call(Prefill.compute, make_prompt(7))
    pool.fetch(handle_of(stale)).release()  # decode has seen it
    prefill.call(Prefill.release, handle_of(stale))
    for _ in range(NUM_BLOCKS // 2):
        other, tokens = prefill.call(Prefill.compute, make_prompt(7)[::-1])
    with pytest.raises(LLMException) as caught:
        pool.fetch(handle_of(stale))
    assert caught.value.status_code is NOT_EXIST
    assert pool.num_free_blocks == NUM_BLOCKS
    cache = pool.fetch(handle_of(other))
    assert generate(model, tokens, 3, cache) == generate(model, make_prompt(7)[::-1], 4)


def test_a_handle_from_before_a_restart_is_refused(
    prefill: ObjectProcess[Prefill], node: Node, model: Any
) -> None:
    linked_pool(prefill, node, model)
    old, _ = prefill.call(Prefill.compute, make_prompt(7))
    node.stop()
    prefill.call(Prefill.stop)
    pool = linked_pool(prefill, node, model)
    prefill.call(Prefill.compute, make_prompt(7))
    with pytest.raises(LLMException) as caught:
        pool.fetch(handle_of(old))
    assert caught.value.status_code is NOT_EXIST


def test_a_fetch_without_room_takes_nothing_and_works_later(
    prefill: ObjectProcess[Prefill], any_pool: KVPool, model: Any
) -> None:
    text, tokens = prefill.call(Prefill.compute, make_prompt(7))
    with any_pool.new_cache() as other:
        other.reserve(15 * BLOCK_TOKENS)
        with pytest.raises(OutOfBlocks, match="2 more blocks"):
            any_pool.fetch(handle_of(text))
        assert any_pool.num_free_blocks == 1
    cache = any_pool.fetch(handle_of(text))
    assert generate(model, tokens, 3, cache) == generate(model, make_prompt(7), 4)


def test_a_handle_is_released_once(prefill: ObjectProcess[Prefill], any_pool: KVPool) -> None:
    text, _ = prefill.call(Prefill.compute, make_prompt(7))
    with pytest.raises(LLMException, match="no cache is published here as"):
        any_pool.release(handle_of(text))
    prefill.call(Prefill.release, handle_of(text))
    with pytest.raises(LLMException, match="it was released before") as caught:
        prefill.call(Prefill.release, handle_of(text))
    assert caught.value.status_code is NOT_EXIST


def test_what_is_published_can_neither_be_cropped_nor_emptied(any_pool: KVPool, model: Any) -> None:
    cache = any_pool.new_cache()
    tokens = generate(model, make_prompt(6), 1, cache)
    any_pool.publish(cache)
    generate(model, tokens, 3, cache)
    cache.crop(-3)
    for change in (partial(cache.crop, -1), cache.reset):
        with pytest.raises(LLMException, match="6 tokens of this PagedCache are published"):
            change()
    cache.release()


def test_only_a_filled_cache_of_the_pool_can_be_published(node: Node, model: Any) -> None:
    node.start(LLMRole.MIX, 1)
    one, other = (KVPool(node.datadist, KVShape.of(model), 4) for _ in range(2))
    with pytest.raises(LLMException, match="is empty"):
        one.publish(one.new_cache())
    with pytest.raises(LLMException, match="is another pool's"):
        one.publish(other.new_cache())


def test_a_closed_pool_publishes_nothing_more_and_fetches_nothing(
    prefill: ObjectProcess[Prefill], any_pool: KVPool, model: Any
) -> None:
    text, _ = prefill.call(Prefill.compute, make_prompt(7))
    cache = any_pool.new_cache()
    generate(model, make_prompt(7), 1, cache)
    any_pool.publish(cache)
    any_pool.close()
    assert any_pool.num_free_blocks == NUM_BLOCKS
    with pytest.raises(LLMException) as caught:
        any_pool.fetch(handle_of(text))
    assert caught.value.status_code is NOT_EXIST


def test_a_published_cache_can_be_released_after_the_cluster_was_finalized(
    node: Node, model: Any
) -> None:
    node.start(LLMRole.MIX, 1)
    pool = KVPool(node.datadist, KVShape.of(model), 4)
    cache = pool.new_cache()
    generate(model, make_prompt(7), 1, cache)
    pool.publish(cache)
    node.stop()
    cache.release()
    pool.close()
    assert pool.num_free_blocks == 4


# -- what is refused --


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("num_layers", 3, "num_layers is 3 at prefill, 2 here"),
        ("num_kv_heads", 4, "num_kv_heads is 4 at prefill, 2 here"),
        ("head_dim", 64, "head_dim is 64 at prefill, 12 here"),
        ("dtype", "bfloat16", "dtype is bfloat16 at prefill, float32 here"),
        ("value_dim", 8, "value_dim is 8 at prefill, 12 here"),
    ],
)
def test_another_model_is_refused_by_name(
    node: Node, model: Any, field: str, value: object, told: str
) -> None:
    node.start(LLMRole.DECODER, 2)
    pool = KVPool(node.datadist, KVShape.of(model, BLOCK_TOKENS), NUM_BLOCKS)
    difference: dict[str, Any] = {field: value}
    handle = KVHandle(1, 5, 3, (0,), replace(pool.shape, **difference))
    with pytest.raises(LLMException, match=told) as caught:
        pool.fetch(handle)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    assert pool.num_free_blocks == NUM_BLOCKS


def test_blocks_that_prefill_does_not_have_are_refused(
    prefill: ObjectProcess[Prefill], any_pool: KVPool
) -> None:
    text, _ = prefill.call(Prefill.compute, make_prompt(7))
    for number in (NUM_BLOCKS, -1):
        with pytest.raises(LLMException):
            any_pool.fetch(replace(handle_of(text), blocks=(0, number)))
    assert any_pool.num_free_blocks == NUM_BLOCKS


SHAPE = KVShape(2, 2, 12, "float32", 4)
HANDLE = KVHandle(1, 2**63 - 1, 7, (3, 1), SHAPE)


def test_a_handle_travels_as_text() -> None:
    assert "\n" not in HANDLE.to_json()
    assert handle_of(HANDLE.to_json()) == HANDLE


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "{}",
        HANDLE.to_json()[:-1],
        HANDLE.to_json().replace("[3,1]", "[3]"),
        HANDLE.to_json().replace("[3,1]", '["3",1]'),
        HANDLE.to_json().replace('"num_tokens":7', '"num_tokens":0'),
        HANDLE.to_json().replace("float32", "object"),
        HANDLE.to_json().replace('"block_tokens":4', '"block_tokens":0'),
    ],
)
def test_text_that_is_no_handle_is_refused(text: str) -> None:
    with pytest.raises(LLMException) as caught:
        handle_of(text)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


def test_a_handle_that_is_nested_without_end_is_none() -> None:
    with pytest.raises(LLMException, match="this is no KVHandle"):
        handle_of('{"x": ' + 100_000 * "[" + 100_000 * "]" + "}")
