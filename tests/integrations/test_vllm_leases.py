"""The vLLM connector: leases are renewed in time, and the address says whose they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("torch")

from kv_engine import Engine, Request, Status
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
from llm_datadist.testing.timing import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

SHORT_S = 1.0


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with two_processes() as both:
        yield both


@pytest.fixture
def decode(processes: Processes) -> Iterator[EngineProcess]:
    with opened(processes[1], "decode", "kv_consumer") as engine:
        yield engine


def waits_on(prefill: EngineProcess, request_id: str = "r") -> bool:
    """Whether prefill keeps the blocks for three leases more."""
    return not prefill.call(Engine.step_until_sent, request_id, 3 * SHORT_S)


def test_a_lease_is_renewed_while_the_engine_is_in_one_long_step(
    processes: Processes, decode: EngineProcess
) -> None:
    lease = {"kv_lease_duration": SHORT_S}
    with opened(processes[0], "prefill", "kv_producer", free_port(), **lease) as prefill:
        params = hand_over(prefill)
        prefill.call(Engine.step)
        decode.call(Engine.arrive, "d", PROMPT, params)
        decode.call(Engine.step)  # and none until prefill was waited for
        assert waits_on(prefill)
        assert decode.call(Engine.schedule, "d", OURS) == len(PROMPT)
        assert decode.call(Engine.step_until_received, "d")
        assert decode.call(Engine.has, PROMPT, OURS)
        assert prefill.call(Engine.step_until_sent, "r")


@pytest.mark.parametrize("long_s", [pytest.param(3600.0, marks=pytest.mark.long), 1e9])
def test_each_lease_is_renewed_by_its_own_duration(
    processes: Processes, decode: EngineProcess, long_s: float
) -> None:
    with (
        ObjectProcess(Engine) as patient,
        opened(
            processes[0], "hasty", "kv_producer", free_port(), kv_lease_duration=SHORT_S
        ) as hasty,
    ):
        patient.call(Engine.open, "patient", "kv_producer", free_port(), kv_lease_duration=long_s)
        decode.call(Engine.arrive, "first", PROMPT, hand_over(patient))
        decode.call(Engine.step_for, 0.2)
        params = hand_over(hasty)
        hasty.call(Engine.step)
        decode.call(Engine.arrive, "second", PROMPT, params)
        decode.call(Engine.step)
        assert waits_on(hasty)
        decode.call(Engine.schedule, "second", OURS)
        assert decode.call(Engine.step_until_received, "second")
        assert decode.call(Engine.has, PROMPT, OURS)


def test_a_producer_that_hangs_keeps_no_other_lease_from_being_renewed(
    processes: Processes,
) -> None:
    tcp = {"llm_config": {"transfer_path": "tcp"}}
    lease = {"kv_lease_duration": SHORT_S, **tcp}
    with (
        ObjectProcess(Engine) as hanging,
        opened(processes[0], "hasty", "kv_producer", free_port(), **lease) as hasty,
        opened(processes[1], "decode", "kv_consumer", **tcp) as decode,
    ):
        hanging.call(Engine.open, "hanging", "kv_producer", free_port(), **lease)
        decode.call(Engine.arrive, "first", PROMPT, hand_over(hanging))
        decode.call(Engine.step_for, 0.5)
        hanging.pause()
        params = hand_over(hasty)
        hasty.call(Engine.step)
        decode.call(Engine.arrive, "second", PROMPT, params)
        decode.call(Engine.step)
        assert waits_on(hasty)
        hanging.kill()


@pytest.mark.parametrize("is_noticed", [True, False])
def test_a_producer_under_another_engine_id_at_the_address_ends_the_old_ones_requests(
    processes: Processes, decode: EngineProcess, *, is_noticed: bool
) -> None:
    port = free_port()
    lease = {"kv_lease_duration": SHORT_S}
    with ObjectProcess(Engine) as old:
        old.call(Engine.open, "old", "kv_producer", port, **lease)
        for request in ("stale", "later"):
            decode.call(Engine.arrive, request, PROMPT, hand_over(old, request))
        decode.call(Engine.step_for, 0.4)
    if is_noticed:
        assert eventually(lambda: decode.call(Engine.paths) == [])
    with opened(processes[0], "new", "kv_producer", port) as new:
        decode.call(Engine.step_for, SHORT_S)
        for request in ("a", "b", "c"):
            assert decode.call(Engine.read, request, PROMPT, hand_over(new, request), OURS) == (
                "right"
            )
        decode.call(Engine.schedule, "stale", MORE)
        assert decode.call(Engine.step_until_received, "stale")
        assert decode.call(Engine.has_failed, "stale")
        decode.call(Engine.step_for, SHORT_S)
        assert decode.call(Engine.read, "d", PROMPT, hand_over(new, "d"), OURS) == "right"
        assert decode.call(Engine.log_text).count("linked to 127.0.0.1") == 2  # old, new
        assert decode.call(Engine.paths) == ["cma"]


def test_producers_with_one_engine_id_are_told_apart_by_their_addresses(
    processes: Processes, decode: EngineProcess
) -> None:
    others = [token + 1000 for token in PROMPT]
    with (
        ObjectProcess(Engine) as one,
        opened(processes[0], "0", "kv_producer", free_port()) as other,
    ):
        one.call(Engine.open, "0", "kv_producer", free_port())
        for round_ in range(2):
            there, here = f"one-{round_}", f"other-{round_}"
            params = hand_over(one, there)
            assert decode.call(Engine.read, there, PROMPT, params, OURS) == "right"
            params = hand_over(other, here, others)
            assert decode.call(Engine.read, here, others, params, MORE) == "right"
            assert one.call(Engine.step_until_sent, there)
            assert other.call(Engine.step_until_sent, here)


def test_an_engine_that_is_silent_keeps_its_link_when_another_is_said_to_be_there(
    processes: Processes,
) -> None:
    timeouts = {"link_timeout_s": SHORT_S, "pull_timeout_s": SHORT_S}
    tcp = {"llm_config": {"transfer_path": "tcp"}}
    with (
        ObjectProcess(Engine) as silent,
        opened(processes[1], "decode", "kv_consumer", **timeouts, **tcp) as decode,
    ):
        silent.call(Engine.open, "silent", "kv_producer", free_port())
        assert decode.call(Engine.read, "d", PROMPT, hand_over(silent), OURS) == "right"
        params = hand_over(silent, "s")
        silent.pause()
        successors = {**params, "remote_engine_id": "successor"}
        assert decode.call(Engine.read, "e", PROMPT, successors, OURS) == "failed"
        assert decode.call(Engine.paths) == ["tcp"]
        silent.resume()
        assert decode.call(Engine.read, "f", PROMPT, params, MORE) == "right"
        assert decode.call(Engine.log_text).count("linked to 127.0.0.1") == 1


def test_a_lease_whose_producer_could_not_be_linked_at_first_is_renewed_later(
    processes: Processes,
) -> None:
    with (
        ObjectProcess(Engine) as prefill,
        opened(processes[1], "decode", "kv_consumer", link_timeout_s=0.3) as decode,
    ):
        prefill.call(Engine.open, "p", "kv_producer", free_port(), kv_lease_duration=2 * SHORT_S)
        params = hand_over(prefill)
        prefill.call(Engine.step)
        prefill.pause()
        decode.call(Engine.arrive, "d", PROMPT, params)
        decode.call(Engine.step_for, SHORT_S)
        assert "cannot read from p" in decode.call(Engine.log_text)
        prefill.resume()
        assert not prefill.call(Engine.step_until_sent, "r", 4 * SHORT_S)
        assert decode.call(Engine.schedule, "d", OURS) == len(PROMPT)
        assert decode.call(Engine.step_until_received, "d")
        assert decode.call(Engine.has, PROMPT, OURS)


def test_a_producer_that_never_answers_is_not_called_beyond_the_lease(
    processes: Processes, decode: EngineProcess
) -> None:
    lease = {"kv_lease_duration": SHORT_S}
    with opened(processes[0], "prefill", "kv_producer", free_port(), **lease) as prefill:
        params = {**hand_over(prefill), "remote_port": free_port()}
    decode.call(Engine.arrive, "d", PROMPT, params)
    decode.call(Engine.step_for, 2 * SHORT_S)
    tries = decode.call(Engine.log_text).count("cannot read from")
    assert 2 <= tries <= 20
    decode.call(Engine.step_for, SHORT_S)
    assert decode.call(Engine.log_text).count("cannot read from") == tries


def test_thousands_of_leases_are_renewed_while_their_producer_computes(
    processes: Processes,
) -> None:
    """It holds Python's lock: each transfer takes as long as its thread has to wait for that."""
    tcp = {"llm_config": {"transfer_path": "tcp"}}
    lease = {"kv_lease_duration": 3 * SHORT_S, **tcp}  # the hand-overs take a while, too
    with (
        opened(processes[0], "prefill", "kv_producer", free_port(), **lease) as prefill,
        opened(processes[1], "decode", "kv_consumer", **tcp) as decode,
    ):
        assert decode.call(Engine.read, "first", PROMPT, hand_over(prefill, "first"), OURS)
        assert prefill.call(Engine.step_until_sent, "first")
        decode.call(wait_for_all, prefill.call(hand_over_many, 2000))
        assert prefill.call(num_sent_within, 9 * SHORT_S) == 1


def hand_over_many(engine: Engine, count: int) -> list[dict[str, Any]]:
    """As many hand-overs, of requests that were computed in one step."""
    assert engine.producer
    requests = [Request(f"r{i}", PROMPT, {"do_remote_decode": True}) for i in range(count)]
    for request in requests:
        engine.producer.scheduled(request)
        request.num_computed_tokens = len(PROMPT)
        request.status = Status.FINISHED_LENGTH_CAPPED
    engine.step()
    params = [engine.producer.finished(request, [THEIRS]) for request in requests]
    engine.step()
    return [each for each in params if each]


def wait_for_all(engine: Engine, all_params: list[dict[str, Any]]) -> None:
    for number, params in enumerate(all_params):
        engine.arrive(f"d{number}", PROMPT, params)
    engine.step()


def num_sent_within(engine: Engine, seconds: float) -> int:
    engine.step_for(seconds)
    return len(engine.sent)
