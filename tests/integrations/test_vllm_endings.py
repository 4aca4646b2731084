"""The vLLM connector: each request ends once, received or failed, however its producer is lost."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("torch")

from kv_engine import Engine
from kv_processes import (
    MORE,
    OURS,
    PROMPT,
    EngineProcess,
    Processes,
    hand_over,
    opened,
    two_processes,
)

from llm_datadist.integrations.vllm.crew import Crew
from llm_datadist.testing.cluster import free_port
from llm_datadist.testing.process import ObjectProcess
from llm_datadist.testing.timing import takes_at_most

if TYPE_CHECKING:
    from collections.abc import Iterator

LINK_S, PULL_S = 1.0, 1.5
#: for what is not waited for by a time-out
SLACK_S = 2.0


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with two_processes() as both:
        yield both


@pytest.fixture
def prefill(processes: Processes) -> Iterator[EngineProcess]:
    with opened(processes[0], "prefill", "kv_producer", free_port()) as engine:
        yield engine


@pytest.fixture
def decode(processes: Processes) -> Iterator[EngineProcess]:
    settings = {"link_timeout_s": LINK_S, "pull_timeout_s": PULL_S}
    with opened(processes[1], "decode", "kv_consumer", **settings) as engine:
        yield engine


@contextmanager
def silent_port() -> Iterator[int]:
    """Connections are accepted, by the kernel, and nothing is ever said on them."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as server:
        yield server.getsockname()[1]


@contextmanager
def port_that_hangs_up() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            try:
                while True:
                    server.accept()[0].close()
            except OSError:
                return

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@contextmanager
def producer_out_of_reach(how: str) -> Iterator[dict[str, Any]]:
    """What of a hand-over leads to a producer that cannot be linked."""
    if how == "silent":
        with silent_port() as port:
            yield {"remote_port": port}
    elif how == "hangs up":
        with port_that_hangs_up() as port:
            yield {"remote_port": port}
    elif how == "refused":
        yield {"remote_port": free_port()}
    else:
        yield {"remote_host": how}


def ask_on(engine: Engine, params: dict[str, Any], seconds: float) -> int:
    """A hundred requests a second; how many have not ended when there was time for all to."""
    begun = time.monotonic()
    asked: set[str] = set()
    while (now := time.monotonic()) < begun + seconds:
        if len(asked) < (now - begun) * 100:
            request = f"r{len(asked)}"
            asked.add(request)
            engine.load(request, PROMPT, dict(params), OURS)
        engine.step_for(0)
    engine.step_until_received(*asked, within_s=LINK_S + PULL_S + SLACK_S)
    return len(asked - engine.received)


@pytest.mark.parametrize(
    "how", ["silent", "hangs up", "refused", "no-such-host.invalid", "not:a:host", "."]
)
def test_requests_that_keep_coming_all_end_when_their_producer_cannot_be_linked(
    prefill: EngineProcess, decode: EngineProcess, how: str
) -> None:
    with producer_out_of_reach(how) as place:
        params = {**hand_over(prefill), **place}
        assert decode.call(ask_on, params, 2.5 * LINK_S) == 0
        assert decode.call(Engine.has_failed, "r0")


def test_requests_that_keep_coming_all_end_when_their_producer_is_killed(
    decode: EngineProcess,
) -> None:
    with ObjectProcess(Engine) as doomed:
        doomed.call(Engine.open, "doomed", "kv_producer", free_port())
        params = hand_over(doomed)
        assert decode.call(Engine.read, "d", PROMPT, params, OURS) == "right"
        params = hand_over(doomed, "s")
        decode.begin(ask_on, params, 1.0)
        doomed.kill()
    assert decode.result() == 0


def test_all_that_wait_for_a_producer_that_hangs_end_within_the_pulls_time_out(
    processes: Processes,
) -> None:
    """Also those whose turn has not come: they are more than the threads."""
    settings = {"pull_timeout_s": PULL_S, "llm_config": {"transfer_path": "tcp"}}
    requests = [f"d{i}" for i in range(40)]
    with (
        ObjectProcess(Engine) as hanging,
        opened(processes[1], "decode", "kv_consumer", **settings) as decode,
    ):
        hanging.call(Engine.open, "hanging", "kv_producer", free_port())
        params = hand_over(hanging)
        assert decode.call(Engine.read, "d", PROMPT, hand_over(hanging, "first"), OURS) == "right"
        hanging.pause()
        with takes_at_most(2 * PULL_S + SLACK_S):
            for request in requests:
                decode.call(Engine.load, request, PROMPT, dict(params), OURS)
            assert decode.call(Engine.step_until_received, *requests)
        hanging.resume()
        assert decode.call(Engine.read, "e", PROMPT, params, MORE) == "right"


@pytest.mark.parametrize("is_linked", [False, True])
def test_requests_end_at_once_when_no_thread_can_be_started_and_later_ones_are_read(
    prefill: EngineProcess, decode: EngineProcess, *, is_linked: bool
) -> None:
    if is_linked:
        assert decode.call(Engine.read, "d", PROMPT, hand_over(prefill), MORE) == "right"
    params = hand_over(prefill, "s")
    decode.call(Engine.start_no_threads)
    with takes_at_most(LINK_S / 2):
        assert decode.call(Engine.read, "e", PROMPT, params, OURS) == "failed"
    decode.call(Engine.start_no_threads, is_so=False)
    assert not decode.call(Engine.touched_blocks) & set(OURS)
    params = hand_over(prefill, "t")
    assert decode.call(Engine.read, "f", PROMPT, params, OURS) == "right"


def test_a_request_that_is_aborted_while_it_loads_ends_once(
    prefill: EngineProcess, decode: EngineProcess
) -> None:
    with silent_port() as port:
        params = {**hand_over(prefill), "remote_port": port}
        decode.call(Engine.load, "d", PROMPT, params, OURS)
        decode.call(Engine.abort, "d")
        assert decode.call(Engine.step_until_received, "d", within_s=LINK_S + SLACK_S)
        decode.call(Engine.step_for, 2 * LINK_S)  # `step` looks whether it ends again


def test_requests_end_when_the_connector_is_shut_down_meanwhile(
    prefill: EngineProcess, decode: EngineProcess
) -> None:
    requests = [f"d{i}" for i in range(12)]
    with silent_port() as port:
        params = {**hand_over(prefill), "remote_port": port}
        for request in requests:
            decode.call(Engine.load, request, PROMPT, dict(params), OURS)
        with takes_at_most(LINK_S + PULL_S + SLACK_S):
            assert decode.call(close_meanwhile) >= set(requests)
        decode.call(Engine.load, "late", PROMPT, dict(params), OURS)
        assert decode.call(Engine.step_until_received, "late")


def close_meanwhile(engine: Engine) -> set[str]:
    engine.close()
    engine.step()
    return engine.received


@pytest.mark.parametrize("what", ["load", "close"])
def test_a_forked_child_fails_its_loads_and_ends_while_its_parent_reads_on(
    prefill: EngineProcess, decode: EngineProcess, what: str
) -> None:
    params = hand_over(prefill)
    with silent_port() as port:
        silent = {**params, "remote_port": port}
        decode.call(Engine.load, "d", PROMPT, silent, MORE)  # threads of the parent's wait
        assert decode.call(in_a_child, what, params) == 0
        assert decode.call(Engine.step_until_received, "d", within_s=LINK_S + SLACK_S)
    assert decode.call(Engine.read, "e", PROMPT, params, OURS) == "right"


def in_a_child(engine: Engine, what: str, params: dict[str, Any]) -> int:
    """The exit status of a child that does it; that of SIGALRM if it hangs."""
    child = os.fork()
    if not child:
        status = 1
        try:
            signal.alarm(int(LINK_S + SLACK_S))
            if what == "close":
                engine.worker.close()
                status = 0
            else:
                status = int(engine.read("child", PROMPT, params, OURS) != "failed")
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_crew_does_all_jobs_whatever_one_of_them_raises() -> None:
    crew = Crew("crew", 2)
    done: list[int] = []
    for number in range(100):
        crew.put(partial(append_even, done, number))
    crew.wait()
    assert sorted(done) == list(range(0, 100, 2))


def append_even(done: list[int], number: int) -> None:
    if number % 2:
        raise SystemExit(number)
    done.append(number)


def test_a_crew_does_not_keep_a_job_that_it_has_refused() -> None:
    with ObjectProcess(Engine) as process:
        assert process.call(refuse_one_job) == ["the second"]


def refuse_one_job(_: Engine) -> list[str]:
    crew = Crew("crew", 1)
    done: list[str] = []
    threading.stack_size(1 << 47)  # more than there is: no thread can be started
    with pytest.raises(RuntimeError):
        crew.put(lambda: done.append("the first"))
    threading.stack_size(0)
    crew.put(lambda: done.append("the second"))
    crew.wait()
    return done
