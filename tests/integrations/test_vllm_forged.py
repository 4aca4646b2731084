"""The vLLM connector: what a client made up in `kv_transfer_params` is its own request's loss."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("torch")

from kv_engine import Engine
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

from llm_datadist import LLMConfig, LLMDataDist, LLMRole
from llm_datadist.integrations.vllm.handover import cluster_id_of
from llm_datadist.testing.cluster import free_port
from llm_datadist.testing.process import ObjectProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

SHORT_S = 1.0
#: of another user, in other blocks
VICTIMS = [token + 1000 for token in PROMPT]
THEIR_OTHERS = [21, 22, 23, 24, 25]


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with two_processes() as both:
        yield both


@pytest.fixture
def prefill(processes: Processes) -> Iterator[EngineProcess]:
    lease = {"kv_lease_duration": SHORT_S}
    with opened(processes[0], "prefill", "kv_producer", free_port(), **lease) as engine:
        yield engine


@pytest.fixture
def decode(processes: Processes) -> Iterator[EngineProcess]:
    with opened(processes[1], "decode", "kv_consumer", link_timeout_s=2.0) as engine:
        yield engine


@pytest.mark.parametrize(
    "params",
    ["do_remote_prefill", 1, [1], [["do_remote_prefill", True]], {"do_remote_prefill": True}, {}],
)
def test_parameters_that_are_no_hand_over_are_computed_here(
    decode: EngineProcess, params: object
) -> None:
    decode.call(Engine.arrive, "d", PROMPT, params)
    assert decode.call(Engine.schedule, "d", OURS) == 0
    decode.call(Engine.abort, "d")
    decode.call(Engine.step)


@pytest.mark.parametrize(
    "change",
    [
        {"remote_engine_id": "\ud800"},
        {"remote_engine_id": "a\n[ERROR] forged"},
        {"remote_engine_id": "a" * 10_000},
        {"remote_host": "\x1b[31m"},
        {"remote_host": None},
        {"remote_hosts": "127.0.0.1"},
        {"remote_hosts": ["127.0.0.1", "\x1b[31m"]},
        {"remote_hosts": ["127.0.0.1"] * 10_000},
        {"remote_digest": "\udfff"},
        {"remote_proof": 7},
        {"remote_port": 65_536},
        {"remote_block_ids": [[10**30]]},
        {"remote_block_ids": [[-1]]},
        {"remote_block_ids": {}},
        {"remote_num_tokens": 10**30},
        {"remote_num_tokens": 1.5},
        {"remote_lease": [10**30, 1]},
        {"remote_lease": [1, 2**48]},
        {"remote_lease": [-1, 1]},
        {"remote_lease_s": float("nan")},
        {"remote_lease_s": float("inf")},
        {"remote_lease_s": 0},
        {"remote_lease_s": 10**400},
        {"tp_size": "1"},
    ],
    ids=ascii,
)
def test_a_hand_over_with_impossible_values_is_computed_here(
    prefill: EngineProcess, decode: EngineProcess, change: dict[str, object]
) -> None:
    decode.call(Engine.arrive, "d", PROMPT, {**hand_over(prefill), **change})
    assert decode.call(Engine.schedule, "d", OURS) == 0
    decode.call(Engine.step)
    log = decode.call(Engine.log_text)
    assert "not this connector's" in log or "read as other tokens" in log
    assert log.count("\n") == 1


def forgeries(mine: dict[str, Any], victims: dict[str, Any]) -> list[dict[str, Any]]:
    """What a client can make of its own hand-over, and of what it can guess of another's."""
    slot, generation = victims["remote_lease"]
    own_slot, own = mine["remote_lease"]
    changes: list[dict[str, Any]] = [
        {"remote_block_ids": victims["remote_block_ids"]},
        {"remote_block_ids": [[*THEIRS[:4], THEIR_OTHERS[0]]]},
        {"remote_block_ids": [THEIRS[::-1]]},
        {"remote_block_ids": [[2**31 - 1] * 5]},
        {"remote_lease": [slot, own]},
        {"remote_lease": [own_slot, generation]},
        {"remote_lease": [slot, generation ^ 1]},
        {"remote_lease": [2**31 - 1, own]},
        {"remote_lease": [16_384, own]},
        {"remote_proof": victims["remote_proof"]},
        {"remote_proof": ""},
        {"remote_proof": "ä"},
        {"remote_request_id": victims["remote_request_id"]},
        {"remote_engine_id": "another"},
        {"remote_engine_id": "prefill/0"},
        {"remote_host": "localhost"},
        {"remote_port": free_port()},
    ]
    return [{**mine, **change} for change in changes]


def test_forged_hand_overs_load_nothing_and_every_one_ends(
    prefill: EngineProcess, decode: EngineProcess
) -> None:
    mine = hand_over(prefill, "mine")
    victims = hand_over(prefill, "victim", VICTIMS, THEIR_OTHERS)
    for number, params in enumerate(forgeries(mine, victims)):
        assert decode.call(Engine.read, f"d{number}", PROMPT, params, OURS) == "failed", params
    assert decode.call(Engine.touched_blocks) == set()
    params = hand_over(prefill, "next", VICTIMS, THEIR_OTHERS)
    assert decode.call(Engine.read, "next", VICTIMS, params, MORE) == "right"


def test_forged_hand_overs_neither_end_another_requests_lease_nor_keep_it_from_being_renewed(
    prefill: EngineProcess, decode: EngineProcess
) -> None:
    """They wait, and are given up, as often as they like."""
    mine = hand_over(prefill, "mine")
    victims = hand_over(prefill, "victim", VICTIMS, THEIR_OTHERS)
    prefill.call(Engine.step)
    decode.call(Engine.arrive, "victim", VICTIMS, victims)
    for number, params in enumerate(forgeries(mine, victims)):
        for lease_s in (1e-300, SHORT_S):
            forged = {**params, "remote_lease_s": lease_s}
            decode.call(Engine.arrive, f"w{number}-{lease_s}", PROMPT, forged)
            decode.call(Engine.arrive, f"a{number}-{lease_s}", PROMPT, forged)
    decode.call(Engine.step)
    for number in range(len(forgeries(mine, victims))):
        for lease_s in (1e-300, SHORT_S):
            decode.call(Engine.abort, f"a{number}-{lease_s}")
    decode.call(Engine.step)
    assert not prefill.call(Engine.step_until_sent, "victim", 3 * SHORT_S)
    decode.call(Engine.schedule, "victim", MORE)
    assert decode.call(Engine.step_until_received, "victim")
    assert decode.call(Engine.has, VICTIMS, MORE)
    assert prefill.call(Engine.step_until_sent, "victim")


def test_another_engine_id_at_the_address_makes_no_link_and_ends_no_link(
    prefill: EngineProcess, decode: EngineProcess
) -> None:
    params = hand_over(prefill, "first")
    assert decode.call(Engine.read, "first", PROMPT, params, MORE) == "right"
    forged = {**hand_over(prefill, "second"), "remote_engine_id": "another"}
    assert decode.call(Engine.read, "forged", PROMPT, forged, OURS) == "failed"
    assert "another engine is at its address" in decode.call(Engine.log_text)
    assert decode.call(Engine.log_text).count("linked to 127.0.0.1") == 1
    params = hand_over(prefill, "third")
    assert decode.call(Engine.read, "third", PROMPT, params, OURS) == "right"


def spellings(count: int) -> list[str]:
    """So many addresses of one host."""
    return [
        "".join(
            letter.upper() if number >> place & 1 else letter
            for place, letter in enumerate("localhost")
        )
        for number in range(count)
    ]


def test_a_producers_other_addresses_keep_no_request_from_being_read(
    prefill: EngineProcess, decode: EngineProcess
) -> None:
    """A second link by one of them would end the first, with what is read over it."""
    mine = hand_over(prefill, "mine")
    for number in range(5):
        for host in spellings(40):
            forged = {**mine, "remote_host": host}
            decode.call(Engine.arrive, f"f{number}-{host}", PROMPT, forged)
        params = hand_over(prefill, f"v{number}", VICTIMS, THEIR_OTHERS)
        decode.call(Engine.load, f"v{number}", VICTIMS, params, MORE)
        assert decode.call(Engine.step_until_received, f"v{number}")
        assert decode.call(Engine.has, VICTIMS, MORE)
        assert not decode.call(Engine.has_failed, f"v{number}")
    assert decode.call(Engine.log_text).count("linked to") == 1


def test_a_producers_other_addresses_keep_no_lease_from_being_renewed(
    prefill: EngineProcess, decode: EngineProcess
) -> None:
    mine, victims = hand_over(prefill, "mine"), hand_over(prefill, "v", VICTIMS, THEIR_OTHERS)
    prefill.call(Engine.step)
    decode.call(Engine.arrive, "v", VICTIMS, victims)
    decode.begin(load_from_other_addresses, mine, 3 * SHORT_S)
    assert not prefill.call(Engine.step_until_sent, "v", 3 * SHORT_S)
    decode.result()
    decode.call(Engine.schedule, "v", MORE)
    assert decode.call(Engine.step_until_received, "v")
    assert decode.call(Engine.has, VICTIMS, MORE)


def load_from_other_addresses(engine: Engine, params: dict[str, Any], seconds: float) -> None:
    """Some hundred a second."""
    end = time.monotonic() + seconds
    for host in itertools.cycle(spellings(512)):
        if time.monotonic() > end:
            return
        request = f"f{len(engine.requests)}"
        engine.load(request, PROMPT, {**params, "remote_host": host}, OURS)
        engine.step_for(0.005)


class Stranger:
    """A cluster that may say that it is another one."""

    def open(self, port: int, cluster_id: int) -> None:
        config = LLMConfig()
        config.enable_cache_manager = True
        config.enable_remote_cache_accessible = True
        config.listen_ip_info = f"127.0.0.1:{port}"
        self._datadist = LLMDataDist(LLMRole.PROMPT, cluster_id)
        self._datadist.init(config.generate_options())

    def close(self) -> None:
        self._datadist.finalize()


def test_who_takes_a_producers_cluster_id_elsewhere_keeps_no_request_from_being_read(
    prefill: EngineProcess, decode: EngineProcess
) -> None:
    mine, port = hand_over(prefill, "mine"), free_port()
    params = hand_over(prefill, "first", VICTIMS, THEIR_OTHERS)
    assert decode.call(Engine.read, "first", VICTIMS, params, MORE) == "right"
    victims_id = cluster_id_of("prefill", "127.0.0.1", mine["remote_port"])
    with ObjectProcess(Stranger) as stranger:
        stranger.call(Stranger.open, port, victims_id)
        forged = {**mine, "remote_port": port}
        assert decode.call(Engine.read, "forged", PROMPT, forged, OURS) == "failed"
        assert "another engine is at its address" in decode.call(Engine.log_text)
        params = hand_over(prefill, "next", VICTIMS, THEIR_OTHERS)
        assert decode.call(Engine.read, "next", VICTIMS, params, MORE) == "right"
        stranger.call(Stranger.close)


def test_who_says_two_things_keeps_no_request_from_being_read(
    prefill: EngineProcess, decode: EngineProcess
) -> None:
    """Asked who it is it is who it should be; then it links as the producer."""
    mine = hand_over(prefill, "mine")
    params = hand_over(prefill, "first", VICTIMS, THEIR_OTHERS)
    assert decode.call(Engine.read, "first", VICTIMS, params, MORE) == "right"
    one, other = free_port(), free_port()
    with (
        two_faced_port(one, other) as port,
        ObjectProcess(Stranger) as asked,
        ObjectProcess(Stranger) as linked,
    ):
        asked.call(Stranger.open, one, cluster_id_of("prefill", "127.0.0.1", port))
        linked.call(
            Stranger.open, other, cluster_id_of("prefill", "127.0.0.1", mine["remote_port"])
        )
        forged = {**mine, "remote_port": port}
        assert decode.call(Engine.read, "forged", PROMPT, forged, OURS) == "failed"
        assert "cannot link to it" in decode.call(Engine.log_text)  # the id is in use
        params = hand_over(prefill, "next", VICTIMS, THEIR_OTHERS)
        assert decode.call(Engine.read, "next", VICTIMS, params, MORE) == "right"
        asked.call(Stranger.close)
        linked.call(Stranger.close)


@contextmanager
def two_faced_port(first: int, then: int) -> Iterator[int]:
    """The first connection to it leads to one port, all others to another."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError):
                for port in itertools.chain([first], itertools.repeat(then)):
                    caller = server.accept()[0]
                    listener = socket.create_connection(("127.0.0.1", port))
                    for pipe in ((caller, listener), (listener, caller)):
                        threading.Thread(target=pass_on, args=pipe, daemon=True).start()

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def pass_on(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
    source.close()


def test_lines_of_the_log_stay_short_whatever_a_stranger_says_of_itself(
    processes: Processes, decode: EngineProcess
) -> None:
    facts = {"\x1b[31m\n" + "k" * 100_000: "v" * 100_000}
    with opened(processes[0], "stranger", "kv_producer", free_port(), facts) as stranger:
        params = hand_over(stranger)
        assert decode.call(Engine.read, "d", PROMPT, params, OURS) == "failed"
    lines = decode.call(Engine.log_text).splitlines()
    assert all(line.isprintable() and len(line) < 1000 for line in lines)
    assert any("it does not fit" in line for line in lines)


def test_a_request_id_forges_no_line_of_the_log(
    prefill: EngineProcess, decode: EngineProcess
) -> None:
    """Which the client may choose."""
    name = "d\n[ERROR] forged \x1b[2J" + "n" * 10_000
    params = hand_over(prefill)
    decode.call(Engine.arrive, name, PROMPT, {**params, "remote_port": "none"})
    assert decode.call(Engine.read, name, PROMPT, {**params, "remote_host": "127.0.0.2"}, OURS)
    lines = decode.call(Engine.log_text).splitlines()
    assert any("is computed here" in line for line in lines)
    assert all(line.isprintable() and len(line) < 1500 for line in lines)
    assert not any(line.startswith("[ERROR] forged") for line in lines)


def test_made_up_addresses_keep_no_linked_producer_from_being_read(
    prefill: EngineProcess, decode: EngineProcess
) -> None:
    """Whoever is there says nothing: each is waited for, up to a number."""
    params = hand_over(prefill, "first")
    assert decode.call(Engine.read, "first", PROMPT, params, MORE) == "right"
    requests = [f"d{number}" for number in range(300)]
    with socket.create_server(("0.0.0.0", 0), backlog=512) as silent:
        place = {"remote_port": silent.getsockname()[1]}
        for number, request in enumerate(requests):
            host = f"127.0.{number // 200}.{1 + number % 200}"
            forged = {**params, **place, "remote_host": host}
            decode.call(Engine.load, request, PROMPT, forged, OURS)
        params = hand_over(prefill, "second", VICTIMS, THEIR_OTHERS)
        decode.call(Engine.load, "second", VICTIMS, params, MORE)
        assert decode.call(Engine.step_until_received, "second", within_s=1.8)
        assert decode.call(Engine.has, VICTIMS, MORE)
        assert decode.call(Engine.step_until_received, *requests)
    assert "too many producers are being linked to" in decode.call(Engine.log_text)
