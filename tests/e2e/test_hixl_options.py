"""`hixl`: the options of an engine, and what secures its connections. Spec H.3."""

from __future__ import annotations

import json

import pytest
from hixl_engine import LONG_MS, Engine, engine, engines, resources

from llm_datadist import hixl as h
from llm_datadist.testing.cluster import free_port

WRONG = {
    "AutoConnect": ["", "2", "yes"],
    "BufferPool": ["", "4", "4:", ":8", "4:8:1", "-1:8", "a:b"],
    "EnableUseFabricMem": ["", "true"],
    "RdmaTrafficClass": ["", "1", "133", "256", "-4", "x"],
    "RdmaServiceLevel": ["", "8", "-1", "x"],
    "LocalCommRes": ["{", "[]", "{}", '{"version": "1.1"}', '{"version": 1.3}'],
    "GlobalResourceConfig": [
        "{", "[]",
        resources(connect_pool__thread_num=0), resources(connect_pool__thread_num=65),
        resources(connect_pool__thread_num="two"), resources(connect_pool__thread_num=True),
        resources(connect_pool__task_queue_capacity=0),
        resources(connect_pool__task_queue_capacity=65536),
        resources(channel_pool__max_channel=0), resources(channel_pool__max_channel=513),
        resources(channel_pool__high_waterline=0.5), resources(channel_pool__low_waterline=0.5),
        resources(channel_pool__high_waterline=0.5, channel_pool__low_waterline=0.5),
        resources(channel_pool__high_waterline=0.5, channel_pool__low_waterline=0.6),
        resources(channel_pool__high_waterline=1.1, channel_pool__low_waterline=0.5),
        resources(channel_pool__high_waterline=0.5, channel_pool__low_waterline=-0.1),
        resources(channel_pool__high_waterline="x", channel_pool__low_waterline=0.1),
        resources(channel_pool__high_waterline=0.5, channel_pool__low_waterline=None),
        resources(channel_pool__high_waterline=True, channel_pool__low_waterline=0.1),
        resources(connect_pool__thread_num=None), '{"connect_pool": 5}', '{"channel_pool": null}',
    ],
    "llm_datadist.Path": ["by foot"],
    "llm_datadist.LinkSecurity": ["open sesame"],
}  # fmt: skip


@pytest.mark.shows("engine.options")
@pytest.mark.parametrize(
    ("option", "text"), [(key, text) for key, texts in WRONG.items() for text in texts]
)
def test_options_that_cannot_be_are_refused(option: str, text: str) -> None:
    assert h.Hixl().initialize("127.0.0.1", {option: text}) == h.PARAM_INVALID


@pytest.mark.shows("engine.options")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"AutoConnect": "0", "BufferPool": "4:8", "EnableUseFabricMem": "0"},
        {"BufferPool": "0:0", "EnableUseFabricMem": "1", "AutoConnect": "1"},
        {"RdmaTrafficClass": "132", "RdmaServiceLevel": "4"},
        {"LocalCommRes": json.dumps({"version": "1.3", "net_instance_id": "x"})},
        {"LocalCommRes": "", "GlobalResourceConfig": ""},
        {"GlobalResourceConfig": resources(connect_pool__thread_num="64", other__name=[1])},
        {"GlobalResourceConfig": json.dumps({"connect_pool": {"task_queue_capacity": 65535}})},
        {
            "GlobalResourceConfig": resources(
                channel_pool__max_channel=512,
                channel_pool__high_waterline="0.3",
                channel_pool__low_waterline="0.1",
            )
        },
        {
            "GlobalResourceConfig": resources(
                channel_pool__high_waterline="1e-3", channel_pool__low_waterline=1e-7
            )
        },
    ],
)
def test_options_that_are_documented_are_taken(options: dict[str, str]) -> None:
    hixl = h.Hixl()
    assert hixl.initialize("127.0.0.1", options) == h.SUCCESS
    hixl.finalize()


@pytest.mark.shows("engine.options")
def test_fabric_memory_and_buffers_do_not_go_together() -> None:
    options = {"BufferPool": "4:8", "EnableUseFabricMem": "1"}
    assert h.Hixl().initialize("127.0.0.1", options) == h.PARAM_INVALID


@pytest.mark.shows("engine.options")
def test_a_misspelt_option_is_warned_about() -> None:
    hixl = h.Hixl()
    with pytest.warns(UserWarning, match="AutoConnect"):
        assert hixl.initialize("127.0.0.1", {"AutoConect": "1"}) == h.SUCCESS
    hixl.finalize()


@pytest.mark.shows("engine.security")
def test_a_shared_secret_lets_in_who_has_it(path: str) -> None:
    secrets = [json.dumps({"secret": letter * 32}) for letter in "aab"]
    made = [Engine(path) for _ in secrets]
    try:
        for each, secret in zip(made, secrets, strict=True):
            name = f"127.0.0.1:{free_port()}"
            each.name = name
            assert each.initialize(name, {"llm_datadist.LinkSecurity": secret}) == h.SUCCESS
        server, friend, stranger = made
        theirs, ours = server.add(seed=1), friend.add()
        assert stranger.hixl.connect(server.name, LONG_MS) == h.FAILED
        friend.connect(server.name)
        assert friend.read(server.name, ours, theirs) == h.SUCCESS
        assert friend.write(server.name, ours, theirs) == h.SUCCESS
        assert friend.hixl.send_notify(server.name, h.NotifyDesc("a", "b"), LONG_MS) == h.SUCCESS
    finally:
        for each in made:
            each.stop()


@pytest.mark.shows("engine.security")
def test_the_environment_says_how_links_are_secured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_DATADIST_LINK_SECURITY", json.dumps({"secret": "c" * 32}))
    with engines(1) as (server,):
        monkeypatch.delenv("LLM_DATADIST_LINK_SECURITY")
        with engine() as stranger:
            assert stranger.hixl.connect(server.name, LONG_MS) == h.FAILED
        monkeypatch.setenv("LLM_DATADIST_LINK_SECURITY", json.dumps({"secret": "c" * 32}))
        with engine() as friend:
            friend.connect(server.name)
