"""The vLLM connector, prompts that are read while they are computed: by layers and chunks."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("torch")

from kv_engine import NUM_LAYERS, Engine, Status
from kv_processes import (
    MORE,
    OURS,
    PROMPT,
    THEIRS,
    EngineProcess,
    Processes,
    hand_over,
    opened,
    two_processes,
)

from llm_datadist.integrations.vllm.groups import Group
from llm_datadist.testing.cluster import free_port
from llm_datadist.testing.faults import FaultProxy
from llm_datadist.testing.process import ObjectProcess
from llm_datadist.testing.timing import eventually, takes_at_most

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: of the prompt: the first chunk ends within a block
CHUNKS = (10, len(PROMPT))
#: what a proxy knows of a prefill engine by an answer of before
KNOWN = (
    "do_remote_prefill", "remote_engine_id", "remote_host", "remote_port", "remote_hosts",
    "remote_lease_s", "tp_size", "pp_size",
)  # fmt: skip
SHORT_S = 1.0
ON = {"overlap": True}


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with two_processes() as both:
        yield both


@pytest.fixture
def prefill(processes: Processes) -> Iterator[EngineProcess]:
    with opened(processes[0], "prefill", "kv_producer", free_port(), **ON) as engine:
        yield engine


@pytest.fixture
def decode(processes: Processes) -> Iterator[EngineProcess]:
    with opened(processes[1], "decode", "kv_consumer", **ON, overlap_timeout_s=SHORT_S) as engine:
        yield engine


def announced(prefill: EngineProcess, transfer_id: str = "t") -> dict[str, Any]:
    """What a decode request carries whose prompt is not computed yet."""
    answer = hand_over(prefill, f"before {transfer_id}", [1, 2], [31])
    return {name: answer[name] for name in KNOWN} | {"transfer_id": transfer_id}


def begin(prefill: EngineProcess, request_id: str = "r", transfer_id: str = "t") -> None:
    prefill.call(Engine.announce, request_id, PROMPT, transfer_id)


def compute(
    prefill: EngineProcess, stop: int, layers: Sequence[int] = range(NUM_LAYERS), name: str = "r"
) -> None:
    """The chunk before `stop`."""
    prefill.call(Engine.begin_chunk, name, THEIRS[: -(-stop // 4)], stop)
    for layer in layers:
        prefill.call(Engine.compute_layer, layer)


def outcome(decode: EngineProcess, request_id: str = "d", blocks: list[int] = OURS) -> str:
    assert decode.call(Engine.step_until_received, request_id)
    if decode.call(Engine.has_failed, request_id):
        return "failed"
    return "right" if decode.call(Engine.has, PROMPT, blocks) else "WRONG"


@pytest.mark.parametrize("path", ["cma", "tcp"])
def test_each_layer_is_read_when_it_is_computed(
    prefill: EngineProcess, processes: Processes, path: str
) -> None:
    """Decode is named before prefill begins, and asks first."""
    settings = {**ON, "llm_config": {"transfer_path": path}}
    with opened(processes[1], "decode", "kv_consumer", **settings) as decode:
        decode.call(Engine.load, "d", PROMPT, announced(prefill), OURS)
        begin(prefill)
        for stop in CHUNKS:
            compute(prefill, stop, [])
            for layer in range(NUM_LAYERS):
                assert not decode.call(Engine.has_in_layer, layer, PROMPT[:stop], OURS)
                prefill.call(Engine.compute_layer, layer)
                assert eventually(
                    lambda layer=layer, stop=stop: decode.call(  # type: ignore[misc]
                        Engine.has_in_layer, layer, PROMPT[:stop], OURS
                    )
                )
        assert outcome(decode) == "right"
        assert decode.call(Engine.touched_blocks) == set(OURS)
        assert decode.call(Engine.counts)["failed_pulls"] == 0
        assert decode.call(Engine.paths) == [path]
        assert prefill.call(Engine.finish, "r", THEIRS) is not None
        assert prefill.call(Engine.step_until_sent, "r"), "decode has let go of the blocks"


def test_a_prompt_that_was_computed_before_decode_asks_is_read_without_what_is_here(
    prefill: EngineProcess, decode: EngineProcess
) -> None:
    params = announced(prefill)
    begin(prefill)
    for stop in CHUNKS:
        compute(prefill, stop)
    prefill.call(Engine.finish, "r", THEIRS)
    prefill.call(Engine.step)
    decode.call(Engine.arrive, "d", PROMPT, params)
    assert decode.call(Engine.schedule, "d", OURS, 8) == len(PROMPT) - 8
    assert decode.call(Engine.step_until_received, "d")
    assert not decode.call(Engine.has_failed, "d")
    assert decode.call(Engine.touched_blocks) == set(OURS[2:])
    for layer in range(NUM_LAYERS):
        assert not decode.call(Engine.has_in_layer, layer, PROMPT[:8], OURS)
    assert prefill.call(Engine.step_until_sent, "r")


def test_prefill_that_is_killed_at_any_layer_is_a_failed_load(decode: EngineProcess) -> None:
    with ExitStack() as stack:
        all_doomed = [stack.enter_context(ObjectProcess(Engine)) for _ in range(NUM_LAYERS)]
        for num_layers, doomed in enumerate(all_doomed):
            doomed.call(Engine.open, f"doomed {num_layers}", "kv_producer", free_port(), **ON)
            params = announced(doomed)
            begin(doomed)
            compute(doomed, CHUNKS[0])
            compute(doomed, CHUNKS[1], range(num_layers))
            request_id, ours = f"d{num_layers}", [each + 6 * num_layers for each in range(1, 6)]
            decode.call(Engine.load, request_id, PROMPT, params, ours)
            assert eventually(
                lambda ours=ours: decode.call(  # type: ignore[misc]
                    Engine.has_in_layer, NUM_LAYERS - 1, PROMPT[: CHUNKS[0]], ours
                )
            )
            doomed.kill()
            assert outcome(decode, request_id, ours) == "failed"


def test_blocks_that_prefill_gives_to_another_meanwhile_are_a_failed_load(
    prefill: EngineProcess, decode: EngineProcess
) -> None:
    params = announced(prefill)
    begin(prefill)
    compute(prefill, CHUNKS[0])
    decode.call(Engine.load, "d", PROMPT, params, OURS)
    assert eventually(lambda: decode.call(Engine.has_in_layer, 2, PROMPT[: CHUNKS[0]], OURS))
    prefill.call(Engine.preempt, "r", THEIRS)
    assert outcome(decode) == "failed"
    assert "the producer has given up the prompt" in decode.call(Engine.log_text)
    begin(prefill)  # it is resumed, with its name
    compute(prefill, CHUNKS[1])
    decode.call(Engine.load, "e", PROMPT, params, MORE)
    assert outcome(decode, "e", MORE) == "right"


def test_a_prompt_that_is_given_up_there_is_a_failed_load_at_once(
    prefill: EngineProcess, processes: Processes
) -> None:
    with opened(processes[1], "decode", "kv_consumer", **ON) as decode:
        params = announced(prefill)
        begin(prefill)
        compute(prefill, CHUNKS[0])
        decode.call(Engine.load, "d", PROMPT, params, OURS)
        assert eventually(lambda: decode.call(Engine.has_in_layer, 2, PROMPT[: CHUNKS[0]], OURS))
        assert prefill.call(Engine.finish, "r", THEIRS, Status.FINISHED_ABORTED) is None
        prefill.call(Engine.step)
        assert outcome(decode) == "failed"


def test_a_request_that_is_given_up_here_is_read_no_further(
    prefill: EngineProcess, processes: Processes
) -> None:
    with opened(processes[1], "decode", "kv_consumer", **ON) as decode:
        decode.call(Engine.load, "d", PROMPT, announced(prefill), OURS)
        decode.call(Engine.abort, "d")
        assert outcome(decode) == "failed"
        assert "the request was given up" in decode.call(Engine.log_text)


def test_a_prompt_that_nobody_computes_is_waited_for_so_long(
    prefill: EngineProcess, decode: EngineProcess
) -> None:
    decode.call(Engine.load, "d", PROMPT, announced(prefill), OURS)
    with takes_at_most(SHORT_S + 4.0):
        assert outcome(decode) == "failed"
    assert "nothing more of its prompt was computed there in time" in decode.call(Engine.log_text)


def test_a_prompt_that_was_read_as_other_tokens_is_a_failed_load(
    prefill: EngineProcess, decode: EngineProcess
) -> None:
    params = announced(prefill)
    begin(prefill)
    compute(prefill, CHUNKS[1])
    others = [token + 1 for token in PROMPT]
    decode.call(Engine.load, "d", others, params, OURS)
    assert outcome(decode) == "failed"
    assert "its prompt was read as other tokens there" in decode.call(Engine.log_text)
    assert decode.call(Engine.touched_blocks) == set()


def test_an_engine_without_the_setting_says_so(processes: Processes) -> None:
    with opened(processes[0], "prefill", "kv_producer", free_port()) as prefill:
        params = announced(prefill)
        with opened(processes[1], "decode", "kv_consumer", **ON) as decode:
            decode.call(Engine.load, "d", PROMPT, params, OURS)
            assert outcome(decode) == "failed"
            assert "its overlap is off" in decode.call(Engine.log_text)
        with opened(processes[1], "decode", "kv_consumer") as decode:
            decode.call(Engine.arrive, "d", PROMPT, params)
            assert decode.call(Engine.schedule, "d", OURS) == 0
            assert "prompts are not read here while they are computed" in decode.call(
                Engine.log_text
            )


def test_a_prompt_beyond_those_that_there_is_room_for_comes_later(
    prefill: EngineProcess, decode: EngineProcess
) -> None:
    for number in range(64):
        begin(prefill, f"r{number}", f"t{number}")
    params = announced(prefill, "last")
    begin(prefill, "last", "last")
    compute(prefill, CHUNKS[1], name="last")
    decode.call(Engine.load, "d", PROMPT, params, OURS)
    assert not decode.call(Engine.step_until_received, "d", within_s=0.1)
    prefill.call(Engine.finish, "r0", [], Status.FINISHED_ABORTED)
    prefill.call(Engine.step)
    assert outcome(decode) == "right"


def test_behind_the_last_layer_only_that_is_waited_for_on_a_slow_link(
    processes: Processes,
) -> None:
    """Each layer has 160 KiB, and takes as long to compute as to read."""
    block_tokens = 512
    groups = (Group(tuple(f"layers.{layer}" for layer in range(NUM_LAYERS)), block_tokens),)
    prompt = list(range(len(OURS) * block_tokens))
    layer_s = 0.4
    port = free_port()
    told = {"host": "127.0.0.2", "advertised_host": "127.0.0.1", "groups": groups}
    config = {"llm_config": {"transfer_path": "tcp"}, "groups": groups}
    with (
        FaultProxy(port, "127.0.0.2", own_port=port) as proxy,
        opened(processes[0], "prefill", "kv_producer", port, **ON, **told) as prefill,
        opened(processes[1], "decode", "kv_consumer", **ON, **config) as decode,
    ):
        params = announced(prefill)
        prefill.call(Engine.announce, "r", prompt, "t")
        prefill.call(Engine.begin_chunk, "r", THEIRS, len(prompt))
        decode.call(Engine.load, "d", prompt, params, OURS)
        assert eventually(lambda: decode.call(Engine.paths) == ["tcp"])
        proxy.slow(len(prompt) * 2 * 8 * 4 / layer_s)
        for layer in range(NUM_LAYERS):
            time.sleep(layer_s)
            prefill.call(Engine.compute_layer, layer)
        computed = time.monotonic()
        assert decode.call(Engine.step_until_received, "d")
        exposed_s = time.monotonic() - computed
        assert decode.call(Engine.has, prompt, OURS)
        assert exposed_s <= 1.5 * layer_s
