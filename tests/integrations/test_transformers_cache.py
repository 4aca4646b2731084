"""`generate` over the blocks of a pool: the same tokens, and blocks that come and go."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import TYPE_CHECKING, Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tiny_models import (  # noqa: E402  (imports torch)
    BLOCK_TOKENS,
    CONFIGS,
    generate,
    make_model,
    make_prompt,
)

from llm_datadist import DataType, LLMException, LLMRole, LLMStatusCode  # noqa: E402
from llm_datadist.integrations.transformers import (  # noqa: E402
    KVPool,
    KVShape,
    OutOfBlocks,
    cache_argument,
)
from llm_datadist.integrations.transformers.blocks import BlockStore  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from llm_datadist.integrations.transformers import PagedCache
    from llm_datadist.testing.cluster import Node

NUM_BLOCKS = 16
PROMPT = make_prompt(10)


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


@pytest.fixture
def pool(node: Node, model: Any) -> KVPool:
    return make_pool(node, model)


def make_pool(node: Node, model: Any, num_blocks: int = NUM_BLOCKS) -> KVPool:
    node.start(LLMRole.MIX, 1)
    return KVPool(node.datadist, KVShape.of(model, BLOCK_TOKENS), num_blocks)


def has_nan(store: BlockStore, block: int) -> bool:
    return bool(torch.isnan(store.memory[:, block]).all())


# -- the same tokens --


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 17])
def test_generate_gives_the_tokens_that_it_gives_without(
    pool: KVPool, model: Any, num_tokens: int
) -> None:
    prompt = make_prompt(num_tokens)
    assert generate(model, prompt, 9, pool.new_cache()) == generate(model, prompt, 9)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_any_decoder_with_attention_in_every_layer_will_do(
    node: Node, kind: str, dtype: str
) -> None:
    model = make_model(kind, dtype)
    cache = make_pool(node, model).new_cache()
    assert generate(model, PROMPT, 9, cache) == generate(model, PROMPT, 9)


def test_a_second_generate_goes_on_from_the_first(pool: KVPool, model: Any) -> None:
    cache = pool.new_cache()
    answer = generate(model, PROMPT, 4, cache)
    assert generate(model, answer, 5, cache) == generate(model, PROMPT, 9)


def test_two_sequences_in_one_pool_leave_each_other_alone(pool: KVPool, model: Any) -> None:
    prompts = [make_prompt(6), make_prompt(7)[::-1]]
    answers = list(prompts)
    caches = [pool.new_cache() for _ in prompts]
    for _ in range(9):
        for index, cache in enumerate(caches):
            answers[index] = generate(model, answers[index], 1, cache)
    assert answers == [generate(model, prompt, 9) for prompt in prompts]


def test_the_length_of_the_cache_is_that_of_transformers_own(pool: KVPool, model: Any) -> None:
    own, paged = transformers.DynamicCache(), pool.new_cache()
    generate(model, PROMPT, 3, own)
    generate(model, PROMPT, 3, paged)
    assert paged.get_seq_length() == own.get_seq_length() == 12


@pytest.mark.parametrize("number", [-3, -9, 4])
def test_a_cropped_cache_goes_on_from_there(pool: KVPool, model: Any, number: int) -> None:
    cache = pool.new_cache()
    generate(model, PROMPT, 5, cache)
    cache.crop(number)
    kept = cache.get_seq_length()
    assert kept == (number if number > 0 else 14 + number)
    assert pool.num_free_blocks == NUM_BLOCKS - pool.shape.num_blocks(kept)
    prompt = PROMPT[: kept + 1]
    if len(prompt) == kept + 1:
        assert generate(model, prompt, 5, cache) == generate(model, prompt, 5)


def test_a_cache_can_be_emptied_and_used_anew(pool: KVPool, model: Any) -> None:
    cache = pool.new_cache()
    generate(model, PROMPT, 2, cache)
    cache.reset()
    assert pool.num_free_blocks == NUM_BLOCKS
    assert generate(model, PROMPT[::-1], 4, cache) == generate(model, PROMPT[::-1], 4)


# -- blocks come and go --


def test_blocks_are_taken_as_the_cache_grows_and_given_back(pool: KVPool, model: Any) -> None:
    with pool.new_cache() as cache:
        assert pool.num_free_blocks == NUM_BLOCKS
        generate(model, make_prompt(8), 1, cache)
        assert (len(cache.blocks), pool.num_free_blocks) == (2, NUM_BLOCKS - 2)
        generate(model, make_prompt(9), 1, cache)
        assert (len(cache.blocks), pool.num_free_blocks) == (3, NUM_BLOCKS - 3)
    assert pool.num_free_blocks == NUM_BLOCKS


def test_blocks_that_were_given_back_serve_another_sequence(pool: KVPool, model: Any) -> None:
    expected = generate(model, PROMPT, 2)
    for _ in range(NUM_BLOCKS // 2):  # three blocks each
        with pool.new_cache() as cache:
            assert generate(model, PROMPT, 2, cache) == expected


def test_without_free_blocks_it_says_what_to_do_and_goes_on_when_that_is_done(
    node: Node, model: Any
) -> None:
    pool = make_pool(node, model, num_blocks=4)
    other, cache = pool.new_cache(), pool.new_cache()
    generate(model, make_prompt(8), 1, other)
    answer = generate(model, make_prompt(7), 2, cache)
    with pytest.raises(
        OutOfBlocks, match=r"1 more blocks of 4 tokens .* 0 of the pool's 4 are"
    ) as (caught):
        generate(model, answer, 4, cache)
    assert caught.value.status_code is LLMStatusCode.LLM_OUT_OF_MEMORY
    assert "release caches that are done" in str(caught.value)
    assert cache.get_seq_length() == 8
    other.release()
    assert generate(model, answer, 4, cache) == generate(model, make_prompt(7), 6)


def test_what_is_reserved_cannot_be_missing_later(node: Node, model: Any) -> None:
    pool = make_pool(node, model, num_blocks=4)
    cache, other = pool.new_cache(), pool.new_cache()
    cache.reserve(12)
    with pytest.raises(OutOfBlocks):
        generate(model, make_prompt(5), 1, other)
    assert generate(model, make_prompt(5), 7, cache) == generate(model, make_prompt(5), 7)
    with pytest.raises(OutOfBlocks):
        other.reserve(5)
    assert pool.num_free_blocks == 1


@pytest.mark.parametrize(
    "use",
    [
        lambda model, _, cache: generate(model, PROMPT, 1, cache),
        lambda _, pool, cache: pool.publish(cache),
        lambda _, __, cache: cache.reserve(1),
        lambda _, __, cache: cache.crop(-1),
        lambda _, __, cache: cache.reset(),
        lambda _, __, cache: cache.blocks,
    ],
    ids=["generate", "publish", "reserve", "crop", "reset", "blocks"],
)
def test_a_released_cache_cannot_be_used(
    pool: KVPool, model: Any, use: Callable[[Any, KVPool, PagedCache], object]
) -> None:
    cache = pool.new_cache()
    generate(model, PROMPT, 1, cache)
    cache.release()
    cache.release()
    with pytest.raises(LLMException, match="this PagedCache was released") as caught:
        use(model, pool, cache)
    assert caught.value.status_code is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
    assert pool.num_free_blocks == NUM_BLOCKS


def test_memory_that_belongs_to_nobody_is_nan() -> None:
    """Any use of it would make the answer NaN: the tests above would notice."""
    store = BlockStore(KVShape(2, 1, 8, "bfloat16", BLOCK_TOKENS), 3)
    assert all(has_nan(store, block) for block in range(3))
    first, second = store.take(2)
    store.memory[:, [first, second]] = 1
    store.give_back([first])
    assert has_nan(store, first)
    assert not has_nan(store, second)


# -- the name of the argument --


@pytest.mark.parametrize("how", ["generate", "forward"])
def test_the_argument_is_the_one_that_fills_the_cache_without_a_warning(
    pool: KVPool, model: Any, how: str
) -> None:
    """By trial of both names with what is installed: a new transformers warns of the old one, and
    an old one refuses or ignores the new one."""
    usable = [
        name
        for name in ("cache", "past_key_values")
        if fills_quietly(model, how, name, pool.new_cache())
    ]
    assert usable == list(cache_argument(pool.new_cache()))


def fills_quietly(model: Any, how: str, name: str, cache: PagedCache) -> bool:
    ids = torch.tensor([PROMPT])
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            if how == "generate":
                model.generate(ids, max_new_tokens=1, do_sample=False, **{name: cache})
            else:
                model(input_ids=ids, **{name: cache})
        except (TypeError, ValueError):  # that it has no such argument
            return False
    return cache.get_seq_length() == len(PROMPT) and not warned


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_programs_with_the_old_name_get_the_same_tokens(pool: KVPool, model: Any) -> None:
    ids = torch.tensor([PROMPT])
    with pool.new_cache() as cache:
        answer = model.generate(ids, max_new_tokens=9, do_sample=False, past_key_values=cache)
    assert answer[0].tolist() == generate(model, PROMPT, 9)


# -- what is refused --


@pytest.mark.parametrize(
    ("kind", "dtype", "theirs"),
    [
        ("other names", "float32", "2 KV heads of 16 float32"),
        ("grouped heads", "bfloat16", "2 KV heads of 12 bfloat16"),
    ],
)
def test_the_pool_of_another_model_is_refused(
    pool: KVPool, kind: str, dtype: str, theirs: str
) -> None:
    with pytest.raises(LLMException, match=f"{theirs}, and the pool is for 2 of 12 float32"):
        generate(make_model(kind, dtype), PROMPT, 1, pool.new_cache())


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.T5Config(), "T5Config is not supported: it has an encoder"),
        (transformers.RwkvConfig(num_hidden_layers=1), "RwkvConfig is not supported"),
        (transformers.Qwen3NextConfig(), "its layer 0 is of type linear_attention"),
        (
            transformers.Qwen3NextConfig(
                num_hidden_layers=2, layer_types=["full_attention", "linear_attention"]
            ),
            "its layer 1 is of type linear_attention",
        ),
    ],
)
def test_a_model_of_another_kind_is_refused_by_its_layer(config: Any, reason: str) -> None:
    with pytest.raises(LLMException, match=reason) as caught:
        KVShape.of_config(config, torch.float32)
    assert "KVShape" not in str(caught.value), "what was asked cannot be the remedy"


class Unlike:
    """A decoder of two layers that keep what they are given, as a model of anybody's does."""

    def __init__(self, *kept: tuple[int, int, int] | None) -> None:
        self.kept = kept
        self.device = torch.device("cpu")
        self.config = transformers.LlamaConfig(num_hidden_layers=len(kept))

    def __call__(self, input_ids: Any, **caches: Any) -> None:
        cache = next(each for each in caches.values() if isinstance(each, transformers.Cache))
        for index, each in enumerate(self.kept):
            if each:
                heads, key_dim, value_dim = each
                shape = 1, heads, input_ids.shape[1]
                cache.update(torch.zeros(*shape, key_dim), torch.zeros(*shape, value_dim), index)


@pytest.mark.parametrize(
    ("kept", "reason"),
    [
        (
            [(2, 8, 8), (2, 16, 16)],
            "its layers differ: layer 1 keeps keys and values of 2 heads of 16, "
            "layer 0 keys and values of 2 heads of 8",
        ),
        ([(2, 8, 4), (1, 8, 4)], "layer 1 keeps keys of 1 heads of 8, values of 1 heads of 4"),
        ([None, (2, 8, 8)], "its layer 0 keeps no keys and values of its own"),
        ([None], "its layer 0 keeps no keys and values of its own"),
    ],
)
def test_layers_that_differ_are_named(kept: list[tuple[int, int, int] | None], reason: str) -> None:
    model: Any = Unlike(*kept)
    with pytest.raises(LLMException, match=reason):
        KVShape.of(model)


def test_the_last_layers_may_use_what_others_keep() -> None:
    model: Any = Unlike((2, 8, 8), (2, 8, 8), None)
    assert KVShape.of(model, 4) == KVShape(2, 2, 8, "float32", 4)


def test_asking_a_model_what_it_keeps_takes_no_random_numbers() -> None:
    model = make_model("other names").train()  # with drop-out
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    KVShape.of(model)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("kind", CONFIGS)
def test_without_its_weights_a_model_has_the_same_shape(kind: str) -> None:
    assert KVShape.of_config(CONFIGS[kind], torch.float32) == KVShape.of(make_model(kind))


def test_keys_and_values_of_unequal_sizes_take_no_more_than_they_need() -> None:
    shape = KVShape(2, 1, 512, "bfloat16", 16, value_dim=64)  # DeepSeek-V3's, of two layers
    assert shape.block_nbytes == 2 * 16 * (512 + 64) * 2


def test_a_type_that_cannot_be_transferred_is_refused() -> None:
    with pytest.raises(LLMException, match=r"dtype must be one of float32, .* got float64"):
        KVShape(2, 2, 8, "float64", 16)


def test_a_shape_without_tokens_is_refused() -> None:
    with pytest.raises(LLMException, match="block_tokens must be at least 1, got 0"):
        KVShape(2, 2, 8, "float32", 0)


# -- how large it is --


def test_the_shape_is_that_of_the_config_and_says_how_many_bytes() -> None:
    config = transformers.LlamaConfig(  # Llama-3-8B
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
    )
    shape = KVShape.of_config(config, torch.bfloat16)
    assert shape == KVShape(32, 8, 128, "bfloat16", 16)
    assert (shape.num_tensors, shape.data_type) == (64, DataType.DT_BF16)
    assert shape.block_nbytes == 64 * 32 * 1024
    assert [shape.num_blocks(tokens) for tokens in (1, 16, 17)] == [1, 1, 2]


def test_a_pool_says_how_much_memory_it_has(pool: KVPool) -> None:
    assert pool.nbytes == NUM_BLOCKS * 2 * 2 * BLOCK_TOKENS * 2 * 12 * 4


# -- without the extra --


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_a_missing_package_comes_with_the_command_to_get_it(package: str) -> None:
    told = message_of_import(f"import sys; sys.modules[{package!r}] = None")
    assert told == (
        f"ImportError: llm_datadist.integrations.transformers needs {package}: "
        "pip install torch 'transformers>=5,<6'"
    )


def test_an_old_package_is_refused(tmp_path: Path) -> None:
    metadata = tmp_path / "transformers-4.57.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.57.0\n")
    told = message_of_import(f"import sys; sys.path.insert(0, {str(tmp_path)!r})")
    assert "needs transformers 5 or newer in place of 4.57.0: pip install" in told


def message_of_import(before: str) -> str:
    code = f"{before}; import llm_datadist.integrations.transformers"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]
