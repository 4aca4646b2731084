"""The vLLM connector between two processes, without vLLM: leases, blocks, failures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("torch")

from kv_engine import Engine, Status
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

from llm_datadist.testing.cluster import free_port
from llm_datadist.testing.process import ObjectProcess
from llm_datadist.testing.timing import eventually, takes_at_most

if TYPE_CHECKING:
    from collections.abc import Iterator

SHORT_S = 1.0
#: another prompt
OTHERS = [token + 1000 for token in PROMPT]


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with two_processes() as both:
        yield both


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def another_port(port: int) -> int:
    return free_port()


@pytest.fixture
def prefill(processes: Processes, port: int) -> Iterator[EngineProcess]:
    with opened(processes[0], "prefill", "kv_producer", port) as engine:
        yield engine


@pytest.fixture
def hasty(processes: Processes, port: int) -> Iterator[EngineProcess]:
    """A prefill engine that does not wait long for readers."""
    lease = {"kv_lease_duration": SHORT_S, "max_leases": 1}
    with opened(processes[0], "prefill", "kv_producer", port, **lease) as engine:
        yield engine


@pytest.fixture
def decode(processes: Processes) -> Iterator[EngineProcess]:
    with opened(processes[1], "decode", "kv_consumer", kv_lease_duration=SHORT_S) as engine:
        yield engine


@pytest.mark.parametrize("path", ["cma", "tcp"])
def test_blocks_of_a_request_are_read_and_then_freed(
    prefill: EngineProcess, processes: Processes, path: str
) -> None:
    by_path = {"llm_config": {"transfer_path": path}}
    with opened(processes[1], "decode", "kv_consumer", **by_path) as decode:
        params = hand_over(prefill)
        assert params["do_remote_prefill"] is True
        assert params["do_remote_decode"] is False
        assert params["remote_block_ids"] == [THEIRS]
        prefill.call(Engine.step)
        assert decode.call(Engine.read, "d", PROMPT, params, OURS) == "right"
        assert decode.call(Engine.paths) == [path]
        assert decode.call(Engine.touched_blocks) == set(OURS)
        assert prefill.call(Engine.step_until_sent, "r")
        counts = decode.call(Engine.counts)
        assert (len(counts["pull_s"]), counts["failed_pulls"]) == (1, 0)
        assert counts["pull_nbytes"] == [5 * 3 * 2 * 4 * 8 * 4]


def test_only_what_is_not_here_already_is_read(
    prefill: EngineProcess, decode: EngineProcess
) -> None:
    params = hand_over(prefill)
    decode.call(Engine.arrive, "d", PROMPT, params)
    assert decode.call(Engine.schedule, "d", OURS, 8) == len(PROMPT) - 8
    assert decode.call(Engine.step_until_received, "d")
    assert decode.call(Engine.touched_blocks) == set(OURS[2:])
    assert prefill.call(Engine.step_until_sent, "r")


def test_a_prompt_that_is_here_already_lets_go_of_its_blocks(
    prefill: EngineProcess, decode: EngineProcess
) -> None:
    params = hand_over(prefill)
    decode.call(Engine.arrive, "d", PROMPT, params)
    assert decode.call(Engine.schedule, "d", OURS, len(PROMPT)) == 0
    decode.call(Engine.step)
    assert prefill.call(Engine.step_until_sent, "r")
    assert decode.call(Engine.touched_blocks) == set()


def test_a_request_that_is_given_up_lets_go_of_its_blocks(
    prefill: EngineProcess, decode: EngineProcess
) -> None:
    params = hand_over(prefill)
    decode.call(Engine.arrive, "d", PROMPT, params)
    decode.call(Engine.abort, "d")
    decode.call(Engine.step)
    assert prefill.call(Engine.step_until_sent, "r")


def test_blocks_that_nobody_reads_are_freed_and_cannot_be_read_any_more(
    hasty: EngineProcess, decode: EngineProcess
) -> None:
    params = hand_over(hasty)
    assert hasty.call(Engine.step_until_sent, "r")
    assert hasty.call(Engine.counts)["expired_leases"] == 1
    assert decode.call(Engine.read, "d", PROMPT, params, OURS) == "failed"
    assert decode.call(Engine.counts)["failed_pulls"] == 1


def test_blocks_that_were_given_to_another_request_are_never_taken_for_the_first_ones(
    hasty: EngineProcess, decode: EngineProcess
) -> None:
    """The other request has the same blocks, and the same slot."""
    params = hand_over(hasty)
    assert hasty.call(Engine.step_until_sent, "r")
    again = hasty.call(Engine.prefill, "another", OTHERS, THEIRS)
    assert again is not None
    assert again["remote_lease"][0] == params["remote_lease"][0]
    assert decode.call(Engine.read, "d", PROMPT, params, OURS) == "failed"


def test_blocks_are_kept_as_long_as_their_reader_waits(
    hasty: EngineProcess, decode: EngineProcess
) -> None:
    params = hand_over(hasty)
    hasty.call(Engine.step)
    decode.call(Engine.arrive, "d", PROMPT, params)
    decode.begin(Engine.step_until_received, "d", within_s=4 * SHORT_S)  # it has got no blocks yet
    assert not hasty.call(Engine.step_until_sent, "r", 3 * SHORT_S)
    assert decode.result() is False
    decode.call(Engine.schedule, "d", OURS)
    assert decode.call(Engine.step_until_received, "d")
    assert decode.call(Engine.has, PROMPT, OURS)


def test_a_request_that_was_not_computed_to_its_end_is_not_handed_over(
    prefill: EngineProcess,
) -> None:
    prefill.ready()
    aborted = Status.FINISHED_ABORTED
    assert prefill.call(Engine.prefill, "r", PROMPT, THEIRS, aborted) is None
    assert prefill.call(Engine.prefill, "s", PROMPT, THEIRS) is not None


def test_prefill_that_dies_is_a_failed_load_and_its_successor_is_read_from(
    processes: Processes, port: int, decode: EngineProcess
) -> None:
    with ObjectProcess(Engine) as first:
        first.call(Engine.open, "first", "kv_producer", port)
        params = hand_over(first)
        assert decode.call(Engine.read, "d", PROMPT, params, OURS) == "right"
        params = hand_over(first, "s")
    assert decode.call(Engine.read, "e", PROMPT, params, OURS) == "failed"
    with opened(processes[0], "second", "kv_producer", port) as second:
        assert decode.call(Engine.read, "f", PROMPT, params, OURS) == "failed"
        params = hand_over(second)
        assert decode.call(Engine.read, "g", PROMPT, params, OURS) == "right"


def test_prefill_that_starts_again_under_its_old_name_is_linked_anew(
    port: int, decode: EngineProcess
) -> None:
    for round_ in range(2):
        with ObjectProcess(Engine) as prefill:
            prefill.call(Engine.open, "prefill", "kv_producer", port)
            params = hand_over(prefill)
            assert decode.call(Engine.read, f"d{round_}", PROMPT, params, OURS) == "right"
        assert eventually(lambda: decode.call(Engine.paths) == [])


@pytest.mark.parametrize("field", ["model", "block size"])
def test_engines_that_do_not_fit_are_refused_by_the_field(
    processes: Processes,
    port: int,
    field: str,
) -> None:
    ours = {"model": "numbers", "block size": 4}
    theirs = {**ours, field: "other"}
    with (
        opened(processes[0], "prefill", "kv_producer", port, theirs) as prefill,
        opened(processes[1], "decode", "kv_consumer", 1, ours) as decode,
    ):
        params = hand_over(prefill)
        assert decode.call(Engine.read, "d", PROMPT, params, OURS) == "failed"
        assert decode.call(Engine.touched_blocks) == set()
        assert f'it does not fit: {field}: "other" there, ' in decode.call(Engine.log_text)
        prefill.call(Engine.close)
        prefill.call(Engine.open, "prefill", "kv_producer", port, ours)  # upgraded meanwhile
        assert eventually(lambda: decode.call(Engine.paths) == [])
        assert decode.call(Engine.read, "e", PROMPT, hand_over(prefill), OURS) == "right"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"remote_port": "x"}, "remote_port"),
        ({"remote_lease": None}, "remote_lease"),
        ({"remote_digest": "another prompt's"}, "read as other tokens"),
        ({"remote_num_tokens": 19}, "read as other tokens"),
    ],
)
def test_a_hand_over_that_cannot_be_read_is_computed_here(
    prefill: EngineProcess,
    decode: EngineProcess,
    change: dict[str, object],
    said: str,
) -> None:
    params = {**hand_over(prefill), **change}
    decode.call(Engine.arrive, "d", PROMPT, params)
    assert decode.call(Engine.schedule, "d", OURS) == 0
    assert said in decode.call(Engine.log_text)


@pytest.mark.parametrize("blocks", [[9, 3, 20, 4, 10_000], [9, 3], []])
def test_blocks_that_do_not_exist_are_a_failed_load_and_let_go(
    prefill: EngineProcess, decode: EngineProcess, blocks: list[int]
) -> None:
    params = {**hand_over(prefill), "remote_block_ids": [blocks]}
    assert decode.call(Engine.read, "d", PROMPT, params, OURS) == "failed"
    assert prefill.call(Engine.step_until_sent, "r")


def test_answers_to_one_prompt_share_its_blocks(
    prefill: EngineProcess, decode: EngineProcess
) -> None:
    params = hand_over(prefill)
    for request_id in ("0_r", "1_r"):
        decode.call(Engine.arrive, request_id, PROMPT, dict(params))
    decode.call(Engine.schedule, "0_r", OURS)
    assert decode.call(Engine.step_until_received, "0_r")
    assert not prefill.call(Engine.step_until_sent, "r", 0.3)
    decode.call(Engine.schedule, "1_r", MORE)
    assert decode.call(Engine.step_until_received, "1_r")
    assert decode.call(Engine.has, PROMPT, MORE)
    assert prefill.call(Engine.step_until_sent, "r")


def test_answers_to_one_prompt_may_share_the_object_with_their_parameters(
    prefill: EngineProcess, decode: EngineProcess
) -> None:
    params = hand_over(prefill)
    assert decode.call(read_twice_by_one_object, params) == [len(PROMPT)] * 2
    assert decode.call(Engine.has, PROMPT, OURS)
    assert decode.call(Engine.has, PROMPT, MORE)
    assert prefill.call(Engine.step_until_sent, "r")


def read_twice_by_one_object(engine: Engine, params: dict[str, Any]) -> list[int]:
    counts = []
    for request_id in ("0_r", "1_r"):
        engine.arrive(request_id, PROMPT, params)
    for request_id, blocks in (("0_r", OURS), ("1_r", MORE)):
        counts.append(engine.schedule(request_id, blocks))
        assert engine.step_until_received(request_id)
    return counts


def test_a_load_that_failed_is_not_begun_again(
    prefill: EngineProcess, decode: EngineProcess
) -> None:
    params = {**hand_over(prefill), "remote_block_ids": [[]]}
    assert decode.call(Engine.read, "d", PROMPT, params, OURS) == "failed"
    assert decode.call(Engine.schedule, "d", OURS) == 0


def test_a_request_under_the_id_of_one_that_waits_takes_its_place(
    prefill: EngineProcess, decode: EngineProcess
) -> None:
    one, other = hand_over(prefill, "one"), hand_over(prefill, "other", OTHERS, MORE)
    decode.call(Engine.arrive, "d", PROMPT, one)
    assert decode.call(Engine.read, "d", OTHERS, other, OURS) == "right"
    assert prefill.call(Engine.step_until_sent, "one")
    assert prefill.call(Engine.step_until_sent, "other")


def test_a_request_under_the_id_of_one_that_is_read_is_computed_here(
    prefill: EngineProcess, decode: EngineProcess
) -> None:
    one, other = hand_over(prefill, "one"), hand_over(prefill, "other", OTHERS, MORE)
    decode.call(read_while_another_comes, one, other)
    assert decode.call(Engine.has, PROMPT, OURS)
    assert prefill.call(Engine.step_until_sent, "one")
    assert prefill.call(Engine.step_until_sent, "other")


def read_while_another_comes(engine: Engine, one: dict[str, Any], other: dict[str, Any]) -> None:
    engine.arrive("d", PROMPT, one)
    assert engine.schedule("d", OURS) == len(PROMPT)
    engine.arrive("d", OTHERS, other)
    assert engine.schedule("d", MORE) == 0
    assert engine.step_until_received("d")


def test_no_two_requests_under_one_id_are_handed_over_at_once(
    prefill: EngineProcess, decode: EngineProcess
) -> None:
    params = hand_over(prefill)
    assert prefill.call(Engine.prefill, "r", OTHERS, MORE) is None
    assert "its id is in use" in prefill.call(Engine.log_text)
    assert decode.call(Engine.read, "d", PROMPT, params, OURS) == "right"
    assert prefill.call(Engine.step_until_sent, "r")
    assert prefill.call(Engine.prefill, "r", OTHERS, MORE) is not None


def test_a_producer_that_hangs_does_not_keep_others_waiting(
    processes: Processes, port: int, another_port: int
) -> None:
    settings = {"pull_timeout_s": 6.0, "llm_config": {"transfer_path": "tcp"}}
    with (
        ObjectProcess(Engine) as hanging,
        opened(processes[0], "healthy", "kv_producer", port) as healthy,
        opened(processes[1], "decode", "kv_consumer", **settings) as decode,
    ):
        hanging.call(Engine.open, "hanging", "kv_producer", another_port)
        all_params = [hand_over(hanging, f"r{i}") for i in range(8)]
        assert decode.call(Engine.read, "d", PROMPT, all_params[0], OURS) == "right"
        hanging.pause()
        for i, params in enumerate(all_params[1:]):
            decode.call(Engine.arrive, f"d{i}", PROMPT, params)
            decode.call(Engine.schedule, f"d{i}", OURS)
        decode.call(Engine.step)
        params = hand_over(healthy)
        with takes_at_most(4.0):
            assert decode.call(Engine.read, "e", PROMPT, params, MORE) == "right"
        hanging.resume()


def test_one_engine_may_be_both(processes: Processes, port: int, another_port: int) -> None:
    with (
        opened(processes[0], "a", "kv_both", port) as one,
        opened(processes[1], "b", "kv_both", another_port) as other,
    ):
        there, back = hand_over(one), hand_over(other)
        assert other.call(Engine.read, "d", PROMPT, there, OURS) == "right"
        assert one.call(Engine.read, "d", PROMPT, back, OURS) == "right"
        assert one.call(Engine.step_until_sent, "r")
        assert other.call(Engine.step_until_sent, "r")


def test_an_engine_does_not_read_from_itself(processes: Processes, port: int) -> None:
    with opened(processes[0], "a", "kv_both", port) as engine:
        assert engine.call(Engine.read, "d", PROMPT, hand_over(engine), OURS) == "failed"
        assert "cannot read from itself" in engine.call(Engine.log_text)


def test_with_link_security_only_those_who_know_the_secret_read(
    processes: Processes, port: int
) -> None:
    security = {"link_security": '{"secret": "between us, and long enough to be one"}'}
    with opened(processes[0], "p", "kv_producer", port, llm_config=security) as prefill:
        params = hand_over(prefill)
        with opened(processes[1], "stranger", "kv_consumer") as stranger:
            assert stranger.call(Engine.read, "d", PROMPT, params, OURS) == "failed"
        with opened(processes[1], "friend", "kv_consumer", llm_config=security) as friend:
            assert friend.call(Engine.read, "d", PROMPT, params, OURS) == "right"
