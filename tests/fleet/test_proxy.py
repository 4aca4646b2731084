"""The proxy for fleets: it chooses by load and prefix among who lives, and does without others.

The engines are stand-ins in processes of their own; the proxy is the example's program.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import pytest

from fleet.engines import StandIn
from llm_datadist.testing.cluster import free_port
from llm_datadist.testing.process import ObjectProcess
from llm_datadist.testing.timing import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    Engine: TypeAlias = ObjectProcess[StandIn]
    Engines: TypeAlias = dict[int, Engine]

PROGRAM = Path(__file__).parents[2] / "examples" / "vllm" / "fleet_proxy.py"
PREFILLS, DECODES = (1, 2), (11, 12)
#: prompts of many pieces, which have no beginning in common
LONG = {letter: letter * 20_000 for letter in "abc"}
SOON_S = 15.0


class Proxy:
    """The program, and requests to it."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, str(PROGRAM), "--port", str(port)]
        command += ["--directory", f"folder:{folder}"]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def sees(self, prefills: int, decodes: int) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=10) as answer:
                seen = json.loads(answer.read())
        except urllib.error.HTTPError as error:  # as long as there is no decode
            seen = json.loads(error.read())
        except OSError:
            return False
        return bool(seen == {"PROMPT": prefills, "DECODER": decodes})

    def request(self, prompt: str, **more: object) -> urllib.request.Request:
        body = json.dumps({"model": "m", "prompt": prompt, **more}).encode()
        headers = {"Content-Type": "application/json"}
        return urllib.request.Request(f"{self.url}/v1/completions", body, headers)

    def ask(self, prompt: str, **more: object) -> tuple[int, str]:
        """Status and body."""
        try:
            with urllib.request.urlopen(self.request(prompt, **more), timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def by(self, prompt: str, **more: object) -> list[int | None]:
        """Which prefill and which decode answered; the answer is right."""
        status, body = self.ask(prompt, **more)
        assert status == 200, body
        answer = json.loads(body)
        assert answer["text"] == f"{prompt}!"
        return list(answer["by"])


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Proxy]:
    proxy = Proxy(tmp_path)
    yield proxy
    proxy.close()


def start(folder: Path, number: int) -> Engine:
    return ObjectProcess(StandIn, folder, number, "PROMPT" if number in PREFILLS else "DECODER")


@pytest.fixture
def engines(tmp_path: Path, proxy: Proxy) -> Iterator[Engines]:
    engines = {number: start(tmp_path, number) for number in (*PREFILLS, *DECODES)}
    try:
        assert eventually(lambda: proxy.sees(2, 2), SOON_S)
        yield engines
    finally:
        for engine in engines.values():
            engine.kill()


@contextmanager
def asked_meanwhile(proxy: Proxy, prompt: str, **more: object) -> Iterator[list[tuple[int, str]]]:
    """Asks in a thread, which is waited for at the end; what was answered then."""
    answers: list[tuple[int, str]] = []
    thread = threading.Thread(target=lambda: answers.append(proxy.ask(prompt, **more)))
    thread.start()
    yield answers
    thread.join(60)


def is_asked(*engines: Engine) -> bool:
    return eventually(lambda: any(each.call(StandIn.take_asked) for each in engines), SOON_S)


def test_who_has_the_beginning_of_a_prompt_gets_it(proxy: Proxy, engines: Engines) -> None:
    first, second = proxy.by(LONG["a"]), proxy.by(LONG["b"])
    assert {first[0], second[0]} == set(PREFILLS)
    assert {first[1], second[1]} == set(DECODES)
    for number in range(3):
        assert proxy.by(f"{LONG['a']} and {number}") == first
        assert proxy.by(f"{LONG['b']} and {number}") == second


def test_who_has_work_waiting_is_passed_over_even_for_what_it_has(
    proxy: Proxy, engines: Engines
) -> None:
    has, _ = proxy.by(LONG["a"])
    assert has is not None
    engines[has].call(StandIn.take_asked)
    engines[has].call(StandIn.hold)
    with asked_meanwhile(proxy, LONG["a"] + 2 * LONG["b"]) as answers:
        assert is_asked(engines[has])
        assert proxy.by(LONG["a"])[0] not in (has, None)
        assert not answers
        engines[has].call(StandIn.go_on)
    assert json.loads(answers[0][1])["by"][0] == has


def goes_on(counts: list[int]) -> bool:
    """Whether all who ask are answered, and again."""
    before = min(counts)
    return eventually(lambda: min(counts) > before + 3, SOON_S)


def test_requests_are_answered_through_kills_and_restarts(
    proxy: Proxy, engines: Engines, tmp_path: Path
) -> None:
    """Whatever is killed while a load of them runs, every one is answered, and right."""
    is_over = threading.Event()
    wrong: list[str] = []
    counts = [0] * 4

    def load(index: int) -> None:
        while not is_over.is_set():
            prompt = f"{index}{LONG['abc'[index % 3]]}{counts[index]}"
            status, body = proxy.ask(prompt)
            if status != 200 or json.loads(body)["text"] != f"{prompt}!":
                wrong.append(f"{status} {body[:200]}")
            counts[index] += 1

    threads = [threading.Thread(target=load, args=(index,)) for index in range(len(counts))]
    for thread in threads:
        thread.start()
    for number in (*PREFILLS, *DECODES):
        assert goes_on(counts)
        engines[number].kill()
        assert goes_on(counts)
        engines[number] = start(tmp_path, number)  # at another port
        fresh = map("{} is a new prompt".format, count(1))
        assert eventually(lambda: number in proxy.by(next(fresh)), SOON_S)  # noqa: B023
    is_over.set()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert sum(counts) > 50


def test_a_request_whose_decode_dies_is_begun_anew(proxy: Proxy, engines: Engines) -> None:
    for each in DECODES:
        engines[each].call(StandIn.hold)
    asked: list[int] = []
    with asked_meanwhile(proxy, "a prompt") as answers:

        def is_asked() -> bool:
            asked.extend(each for each in DECODES if engines[each].call(StandIn.take_asked))
            return bool(asked)

        assert eventually(is_asked, SOON_S)
        (other,) = set(DECODES) - set(asked)
        engines[asked[0]].kill()
        engines[other].call(StandIn.go_on)
    assert json.loads(answers[0][1])["by"][1] == other


def test_a_stream_that_has_begun_ends_with_an_error(proxy: Proxy, engines: Engines) -> None:
    assert proxy.ask("a prompt", stream=True)[1].endswith("data: [DONE]\n\n")
    for each in DECODES:
        engines[each].call(StandIn.hold)
    with urllib.request.urlopen(proxy.request("a prompt", stream=True), timeout=60) as answer:
        first = json.loads(answer.readline().removeprefix(b"data: "))
        for each in DECODES:
            engines[each].kill()
        *_, last = answer.read().strip().splitlines()
    assert first["text"] == "a prompt!"
    assert "the engine has gone" in json.loads(last.removeprefix(b"data: "))["error"]["message"]


def test_without_a_prefill_decode_is_asked_alone(proxy: Proxy, engines: Engines) -> None:
    for each in PREFILLS:
        engines[each].kill()
    assert eventually(lambda: proxy.sees(0, 2), SOON_S)
    assert proxy.by("a prompt")[0] is None


def test_what_a_client_says_of_kv_is_left_out_and_errors_are_passed_on(
    proxy: Proxy, engines: Engines
) -> None:
    forged = {"do_remote_prefill": True, "remote_host": "example.com"}
    prefill, _ = proxy.by("a prompt", kv_transfer_params=forged, vllm_xargs=forged, n=2)
    assert prefill in PREFILLS
    said = [each for number in engines for each in engines[number].call(StandIn.take_asked)]
    first, second = said
    assert not any("vllm_xargs" in each or "remote_host" in str(each) for each in said[1:])
    assert (first["max_tokens"], first.get("n"), second["n"]) == (1, None, 2)
    status, body = proxy.ask("a mistake")
    assert (status, "error" in body) == (400, True)
    assert proxy.ask("an error")[0] == 500


def test_an_engine_that_does_both_is_not_to_read_from_itself(tmp_path: Path, proxy: Proxy) -> None:
    engines = [ObjectProcess(StandIn, tmp_path, number, "MIX") for number in (21, 22, 23)]
    try:
        assert eventually(lambda: proxy.sees(3, 3), SOON_S)
        for number in range(10):
            prefill, decode = proxy.by(f"{number} " * 2000)
            assert prefill != decode
    finally:
        for engine in engines:
            engine.kill()


def test_decode_computes_what_a_dead_prefill_does_not(proxy: Proxy, engines: Engines) -> None:
    for number in PREFILLS:
        engines[number].kill()
    prefill, decode = proxy.by(LONG["a"])
    assert prefill is None
    assert decode in DECODES


def test_what_is_no_request_is_refused(proxy: Proxy, engines: Engines) -> None:
    request = urllib.request.Request(f"{proxy.url}/v1/completions", b"[1]")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request, timeout=60)
