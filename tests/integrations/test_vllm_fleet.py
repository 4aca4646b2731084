"""Engines of vLLM in a directory: hand-overs name a start of an engine, and no address."""

from __future__ import annotations

from types import SimpleNamespace
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

from llm_datadist.directory import FolderDirectory
from llm_datadist.integrations.vllm.handover import source_of
from llm_datadist.integrations.vllm.settings import settings_of
from llm_datadist.testing.cluster import free_port
from llm_datadist.testing.process import ObjectProcess
from llm_datadist.testing.timing import eventually, takes_at_most

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TTL_S = 1.5
#: what is waited for an engine that is not in the directory
LINK_S = 2.0


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with two_processes() as both:
        yield both


@pytest.fixture
def fleet(tmp_path: Path) -> dict[str, Any]:
    """The settings of an engine in it."""
    folder = tmp_path / "fleet"
    folder.mkdir()
    return {
        "directory": f"folder:{folder}", "directory_ttl_s": TTL_S, "link_timeout_s": LINK_S,
    }  # fmt: skip


@pytest.fixture
def prefill(processes: Processes, fleet: dict[str, Any]) -> Iterator[EngineProcess]:
    with opened(processes[0], "prefill", "kv_producer", free_port(), **fleet) as engine:
        yield engine


@pytest.fixture
def decode(processes: Processes, fleet: dict[str, Any]) -> Iterator[EngineProcess]:
    with opened(processes[1], "decode", "kv_consumer", **fleet) as engine:
        yield engine


def test_a_hand_over_names_the_engine_and_its_start_and_no_address(
    prefill: EngineProcess, decode: EngineProcess
) -> None:
    params = hand_over(prefill)
    assert params["remote_engine_id"] == "prefill"
    assert params["remote_incarnations"] == [prefill.call(Engine.incarnation)]
    assert not {"remote_host", "remote_hosts", "remote_port"} & set(params)
    prefill.call(Engine.step)
    assert decode.call(Engine.read, "d", PROMPT, params, OURS) == "right"
    assert prefill.call(Engine.step_until_sent, "r")


def test_without_the_setting_a_hand_over_is_as_it_was(processes: Processes) -> None:
    with opened(processes[0], "prefill", "kv_producer", port := free_port()) as prefill:
        params = hand_over(prefill)
    assert (params["remote_host"], params["remote_port"]) == ("127.0.0.1", port)
    assert "remote_incarnations" not in params


def test_an_engine_that_restarts_is_found_and_its_past_is_not_taken_for_it(
    processes: Processes, fleet: dict[str, Any], decode: EngineProcess
) -> None:
    """First it is killed and starts on its port, where its record leads yet; then it moves."""
    port, fleet["directory_ttl_s"] = free_port(), 60.0
    with ObjectProcess(Engine) as first:
        first.call(Engine.open, "prefill", "kv_producer", port, **fleet)
        assert decode.call(Engine.read, "a", PROMPT, hand_over(first), OURS) == "right"
        of_first = hand_over(first, "s")
        first.call(Engine.step)
        first.kill()
    with opened(processes[0], "prefill", "kv_producer", port, **fleet) as second:
        assert decode.call(Engine.read, "b", PROMPT, of_first, MORE) == "failed"
        assert "another engine is at its address" in decode.call(Engine.log_text)
        of_second = hand_over(second)
        assert decode.call(Engine.read, "c", PROMPT, of_second, OURS) == "right"
    with opened(processes[0], "prefill", "kv_producer", free_port(), **fleet) as third:
        assert decode.call(Engine.read, "d", PROMPT, hand_over(third), OURS) == "right"
        with takes_at_most(2 * LINK_S):
            assert decode.call(Engine.read, "e", PROMPT, of_second, MORE) == "failed"
        assert "the directory has no such start of it" in decode.call(Engine.log_text)


def test_one_that_the_directory_does_not_have_yet_is_waited_for(
    processes: Processes, fleet: dict[str, Any], tmp_path: Path
) -> None:
    """It could not be announced, and is when the folder is back."""
    fleet["link_timeout_s"] = 20.0
    with opened(processes[1], "decode", "kv_consumer", **fleet) as decode:
        aside = (tmp_path / "fleet").rename(tmp_path / "aside")
        with opened(processes[0], "prefill", "kv_producer", free_port(), **fleet) as prefill:
            params = hand_over(prefill)
            prefill.call(Engine.step)
            decode.call(Engine.load, "d", PROMPT, params, OURS)
            assert not decode.call(Engine.step_until_received, "d", within_s=0.3)
            aside.rename(tmp_path / "fleet")
            assert decode.call(Engine.step_until_received, "d", within_s=20)
            assert decode.call(Engine.has, PROMPT, OURS)


def test_a_directory_that_is_gone_changes_nothing_for_those_who_are_linked(
    prefill: EngineProcess, decode: EngineProcess, tmp_path: Path
) -> None:
    assert decode.call(Engine.read, "a", PROMPT, hand_over(prefill), OURS) == "right"
    (tmp_path / "fleet").rename(tmp_path / "aside")
    for number in range(3):
        params = hand_over(prefill, f"r{number}", blocks=MORE)
        assert decode.call(Engine.read, f"b{number}", PROMPT, params, OURS) == "right"


def test_nobody_who_sends_requests_says_where_is_dialled(
    prefill: EngineProcess, decode: EngineProcess
) -> None:
    """A made-up address is computed here; a made-up start is a failed load."""
    params = hand_over(prefill)
    address = {"remote_host": "127.0.0.1", "remote_port": 9}
    starts = params["remote_incarnations"]
    prefill.call(Engine.step)
    no_starts = {name: value for name, value in params.items() if name != "remote_incarnations"}
    forged = [
        {**no_starts, **address}, {**params, **address}, no_starts,
        {**params, "remote_incarnations": [f"{starts[0]}\n"]},
        {**params, "remote_incarnations": ["prefill"]},
    ]  # fmt: skip
    for number, each in enumerate(forged):
        decode.call(Engine.arrive, f"f{number}", PROMPT, each)
        assert decode.call(Engine.schedule, f"f{number}", MORE) == 0
    unknown = {**params, "remote_incarnations": ["0" * 32]}
    assert decode.call(Engine.read, "g", PROMPT, unknown, MORE) == "failed"
    assert "the directory has no such start of it" in decode.call(Engine.log_text)
    assert decode.call(Engine.read, "d", PROMPT, params, OURS) == "right"
    assert decode.call(Engine.touched_blocks) == set(OURS)


def test_who_has_no_directory_computes_what_names_no_address(
    prefill: EngineProcess, processes: Processes
) -> None:
    params = hand_over(prefill)
    with opened(processes[1], "decode", "kv_consumer") as decode:
        decode.call(Engine.arrive, "d", PROMPT, params)
        assert decode.call(Engine.schedule, "d", OURS) == 0
        assert "it names no address, and no directory is set here" in decode.call(Engine.log_text)


def test_each_worker_is_found_by_its_own_start(processes: Processes, fleet: dict[str, Any]) -> None:
    """These processes have workers 1 of their engines; the producer's worker 0 is nowhere."""
    workers, port = {"rank": 1, "num_workers": 2, **fleet}, free_port() - 1
    with (
        opened(processes[0], "prefill", "kv_producer", port, **workers) as prefill,
        opened(processes[1], "decode", "kv_consumer", **workers) as decode,
    ):
        assert prefill.call(Engine.prefill, "early", PROMPT, MORE) is None
        prefill.call(Engine.told_of_starts, {0: "f" * 32})
        params = hand_over(prefill)
        prefill.call(Engine.step)
        assert params["remote_incarnations"] == ["f" * 32, prefill.call(Engine.incarnation)]
        short = {**params, "remote_incarnations": params["remote_incarnations"][:1]}
        assert decode.call(Engine.read, "s", PROMPT, short, MORE) == "failed"
        assert decode.call(Engine.read, "d", PROMPT, params, OURS) == "right"


def test_others_see_what_an_engine_says_of_itself(
    processes: Processes, fleet: dict[str, Any], tmp_path: Path
) -> None:
    said = {"labels": {"http": "http://127.0.0.1:8100"}, **fleet}
    watch = FolderDirectory(str(tmp_path / "fleet")).watch()
    with opened(processes[1], "decode", "kv_consumer", **said):
        (record,) = watch.wait(10).joined or watch.wait(10).joined
        assert (record.role, record.endpoint) == ("DECODER", None)
        assert record.labels == {**said["labels"], "engine": "decode", "worker": "0"}
    assert eventually(lambda: watch.wait(0.1).left == (record,))
    watch.close()


def test_labels_without_a_directory_are_refused() -> None:
    given: Any = SimpleNamespace(
        kv_connector_extra_config={"labels": {"http": "x"}}, engine_id="e", kv_role="kv_both",
        kv_port=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="labels are said in a directory; none is set"):
        settings_of(given)


def test_what_decode_is_given_says_where_or_who_and_not_both() -> None:
    said = {
        "remote_engine_id": "p", "remote_request_id": "r", "remote_block_ids": [[1]],
        "remote_num_tokens": 3, "remote_digest": "d", "remote_lease": [1, 2],
        "remote_lease_s": 30.0, "remote_incarnations": ["0" * 32, "1" * 32], "tp_size": 2,
    }  # fmt: skip
    assert source_of(said).cluster_id(0) != source_of(said).cluster_id(1)
    changes: list[dict[str, object]] = [
        {"remote_host": "h"}, {"remote_port": 7}, {"remote_incarnations": []},
    ]  # fmt: skip
    for wrong in changes:
        with pytest.raises(ValueError, match="they have an address, or incarnations"):
            source_of({**said, **wrong})
