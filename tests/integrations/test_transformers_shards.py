"""A model's KV cache in shards: three ranks with one KV head each, and one process with all."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from kv_ranks import ORDERS, Rank, load_model, tokens_behind
from tiny_models import generate, make_prompt

from llm_datadist import BlocksCacheKey, LLMRole, LLMStatusCode
from llm_datadist.integrations.transformers import KVPool, KVShape
from llm_datadist.testing.process import ObjectProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llm_datadist.testing.cluster import Node

NUM_TOKENS, NUM_MORE = 150, 12


@pytest.fixture(scope="module")
def ranks() -> Iterator[list[ObjectProcess[Rank]]]:
    with ExitStack() as stack:
        yield [stack.enter_context(ObjectProcess(Rank)).ready() for _ in range(3)]


@pytest.fixture
def linked(ranks: list[ObjectProcess[Rank]], node: Node) -> Iterator[Node]:
    """Cluster 9 here, linked to the ranks, which are clusters 1 to 3."""
    ports = [rank.call(Rank.start, number) for number, rank in enumerate(ranks)]
    node.start(LLMRole.DECODER, 9)
    for number, port in enumerate(ports):
        assert node.link(port, 1 + number) is LLMStatusCode.LLM_SUCCESS
    yield node
    for rank in ranks:
        rank.call(Rank.stop)


_LONG = [pytest.mark.model, pytest.mark.slow, pytest.mark.long]
MODELS = ["three heads", pytest.param("demo", marks=_LONG)]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("order", "theirs", "ours"), [(ORDERS[0], 16, 64), (ORDERS[1], 64, 16)])
def test_one_decodes_what_three_ranks_prefilled(
    ranks: list[ObjectProcess[Rank]], linked: Node, kind: str, order: str, theirs: int, ours: int
) -> None:
    model, prompt = load_model(kind), make_prompt(NUM_TOKENS)
    expected = generate(model, prompt, NUM_MORE)
    pool = KVPool(linked.datadist, KVShape.of(model, ours), 12)
    sources = {
        BlocksCacheKey(1 + number): rank.call(Rank.prefill, kind, prompt, order, theirs)
        for number, rank in enumerate(ranks)
    }
    with pool.fetch_shards(sources, len(prompt)) as cache:
        assert tokens_behind(model, expected, len(prompt), cache) == expected


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("order", "theirs", "ours"), [(ORDERS[0], 64, 16), (ORDERS[1], 16, 64)])
def test_three_ranks_decode_what_one_prefilled(
    ranks: list[ObjectProcess[Rank]], linked: Node, kind: str, order: str, theirs: int, ours: int
) -> None:
    """Each pulls its head. The three of them go on together: here, of what they have."""
    model, prompt = load_model(kind), make_prompt(NUM_TOKENS)
    expected = generate(model, prompt, NUM_MORE)
    pool = KVPool(linked.datadist, KVShape.of(model, ours), 24)
    cache = pool.new_cache()
    generate(model, prompt, 1, cache)
    handle = pool.publish(cache)
    key = BlocksCacheKey(handle.cluster_id, handle.key)
    sources: dict[BlocksCacheKey, Any] = {
        BlocksCacheKey(1 + number): rank.call(
            Rank.pull, kind, key, list(handle.blocks), len(prompt), order, theirs
        )
        for number, rank in enumerate(ranks)
    }
    cache.release()
    with pool.fetch_shards(sources, len(prompt)) as joined:
        assert tokens_behind(model, expected, len(prompt), joined) == expected


def test_pools_with_blocks_of_other_sizes_hand_over(
    ranks: list[ObjectProcess[Rank]], linked: Node
) -> None:
    model, prompt = load_model("three heads"), make_prompt(NUM_TOKENS)
    handle = ranks[0].call(Rank.publish, "three heads", prompt, 16)
    pool = KVPool(linked.datadist, KVShape.of(model, 64), 4)
    expected = generate(model, prompt, NUM_MORE)
    with pool.fetch(handle) as cache:
        assert tokens_behind(model, expected, len(prompt), cache) == expected
