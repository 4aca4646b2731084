"""The packaged model, in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from llm_datadist import LLMRole
from llm_datadist.cli.demo.request import PROMPTS, Prompt
from llm_datadist.cli.demo.settings import LinkPath, Settings, find_model

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from llm_datadist.cli.demo.model import LanguageModel  # noqa: E402  (imports torch)
from llm_datadist.integrations.transformers import KVPool  # noqa: E402

if TYPE_CHECKING:
    from llm_datadist.testing.cluster import Node

pytestmark = [pytest.mark.model, pytest.mark.slow]


@pytest.fixture(scope="module")
def steps() -> list[float]:
    return []


@pytest.fixture(scope="module")
def model(steps: list[float]) -> LanguageModel:
    settings = Settings(find_model(None), 8, 16, 0, LinkPath.AUTO)
    loading = LanguageModel.load(settings)
    while True:
        try:
            steps.append(next(loading).fraction)
        except StopIteration as end:
            loaded: LanguageModel = end.value
            return loaded


def test_loading_reports_its_progress(model: LanguageModel, steps: list[float]) -> None:
    assert model.end_tokens
    assert steps == sorted(steps)
    assert len(steps) > 100
    assert 0.0 <= steps[0] <= steps[-1] <= 1.0


def test_the_model_knows_something(model: LanguageModel) -> None:
    tokens = model.encode(Prompt("What is the capital of France?"))
    answer = model.generate(tokens, 16)
    assert "Paris" in model.decode(answer)
    assert answer[-1] in model.end_tokens


def test_text_that_is_no_chat_is_taken_as_it_stands(model: LanguageModel) -> None:
    assert model.decode(model.encode(PROMPTS[0])) == PROMPTS[0].text


@pytest.mark.parametrize("number", [0, 1, 2])
def test_token_by_token_over_blocks_is_generation_in_one_go(
    model: LanguageModel, node: Node, number: int
) -> None:
    tokens = model.encode(PROMPTS[number])
    node.start(LLMRole.MIX, 1)
    cache = KVPool(node.datadist, model.kv_shape(16), num_blocks=12).new_cache()
    answer = [model.next_token(tokens, cache)]
    while len(answer) < 8:
        answer.append(model.next_token(answer[-1:], cache))
    assert answer == model.generate(tokens, 8)


@pytest.mark.long
def test_the_weights_are_those_that_transformers_reads() -> None:
    # its own reader of the whole file, which needs no more packages but half a minute
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    from llm_datadist.cli.demo.gguf_file import LlamaFile

    path = find_model(None).path
    file = LlamaFile(path)
    model = file.to_model(dict(file.weights()))
    expected = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)
    weights = model.state_dict()
    assert len(expected["tensors"]) == len(weights) - 1  # the output weights are the embedding's
    for name, tensor in expected["tensors"].items():
        assert torch.equal(weights[name], tensor), name
