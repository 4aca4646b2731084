"""Options.parse. Spec 4.4, 5.1; 10, rows 3 and 5-9."""

from __future__ import annotations

import os
from typing import Any

import pytest

from llm_datadist.config import LLMConfig
from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.options import BufPoolConfig, Endpoint, Options, PoolConfig, parse_listens
from llm_datadist.types import LLMRole

SECRET_OPTION = '{"secret": "0123456789abcdef"}'
MANAGER = {"llm.EnableCacheManager": "1"}
LISTEN = {"llm.listenIpInfo": "1.2.3.4:5"}
HIXL = {"llm.TransferBackend": "hixl"}


@pytest.fixture(autouse=True)
def _nothing_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PATH", "METRICS", "TRACING"):
        monkeypatch.delenv(f"LLM_DATADIST_{name}", raising=False)


def parse(options: Any) -> Options:
    return Options.parse(LLMRole.PROMPT, options)


def refusal(options: Any) -> LLMException:
    with pytest.raises(LLMException) as caught:
        parse(options)
    return caught.value


@pytest.mark.shows("config.modes")
def test_the_manager_alone_gives_the_documented_defaults() -> None:
    assert parse(MANAGER) == Options(
        role=LLMRole.PROMPT,
        device_id=0,
        listen=None,
        cache_manager=True,
        remote_accessible=False,
        sync_timeout_s=1.0,
        link_total_time_s=0,
        link_retry_count=1,
        device_pool=None,
        host_pool=None,
        buf_pool=None,
        transfer_backend=None,
        local_comm_res=None,
        cannot_link="",
        enable_switch_role=False,
        path="auto",
        transfer_threads=min(4, len(os.sched_getaffinity(0))),
    )


def test_every_option_arrives_in_its_field() -> None:
    config = LLMConfig()
    config.device_id = 3
    config.sync_kv_timeout = 2500
    config.listen_ip_info = "1.2.3.4:5"
    config.enable_switch_role = True
    config.enable_cache_manager = True
    config.enable_remote_cache_accessible = True
    config.mem_pool_cfg = '{"memory_size": 131072}'
    config.host_mem_pool_cfg = '{"memory_size": 1024, "page_shift": 10}'
    config.buf_pool_cfg = '{"buf_pool_size": 1024}'
    config.local_comm_res = '{"version": "1.2"}'
    config.transfer_backend = "hixl"
    config.link_total_time = 60
    config.link_retry_count = 3
    config.transfer_path = "tcp"
    config.transfer_threads = 3
    assert Options.parse(LLMRole.MIX, config.generate_options()) == Options(
        role=LLMRole.MIX,
        device_id=3,
        listen=Endpoint("1.2.3.4", 5),
        cache_manager=True,
        remote_accessible=True,
        sync_timeout_s=2.5,
        link_total_time_s=60,
        link_retry_count=3,
        device_pool=PoolConfig(131072, 16),
        host_pool=PoolConfig(1024, 10),
        buf_pool=BufPoolConfig((), 1024),
        transfer_backend="hixl",
        local_comm_res='{"version": "1.2"}',
        enable_switch_role=True,
        path="tcp",
        transfer_threads=3,
    )


@pytest.mark.shows("error.3")
@pytest.mark.parametrize(
    "options", [None, [], "llm.EnableCacheManager", [("a", "b")], {"a": 1}, {1: "a"}]
)
def test_options_are_a_dict_of_texts(options: Any) -> None:
    with pytest.raises(TypeError, match=r"options.*only support"):
        parse(options)


def test_the_callers_dict_is_left_as_it_is() -> None:
    options = {**MANAGER, **LISTEN, **HIXL}
    parse(options)
    assert options == {**MANAGER, **LISTEN, **HIXL}


@pytest.mark.shows("datadist.init.options")
def test_unknown_keys_are_passed_over() -> None:
    assert parse({**MANAGER, "llm.Role": "Decoder", "my.own": ""}) == parse(MANAGER)


@pytest.mark.parametrize(
    "name",
    ["llm_datadist.LinkSecurty", "llm_datadist.linkSecurity", "llm_datadist.Security"],
)
def test_a_slip_of_a_key_of_ours_is_refused(name: str) -> None:
    with pytest.raises(LLMException, match=r"is 'llm_datadist\.LinkSecurity' meant") as caught:
        parse({**MANAGER, name: "{}"})
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


@pytest.mark.shows("datadist.init.options")
@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("llm.MemPoolCfg", "llm.MemPoolConfig"),
        ("ge.exec.deviceID", "ge.exec.deviceId"),
        ("LinkSecurity", "llm_datadist.LinkSecurity"),
        ("llm.LinkSecurty", "llm_datadist.LinkSecurity"),
    ],
)
def test_a_slip_of_another_key_is_passed_over_with_one_warning(name: str, meant: str) -> None:
    with pytest.warns(UserWarning, match=f"is '{meant}' meant") as warned:
        parsed = [parse({**MANAGER, name: "1"}) for _ in range(2)]
    assert (parsed, len(warned)) == ([parse(MANAGER)] * 2, 1)


def test_a_key_of_ours_of_a_newer_release_is_passed_over_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"does not know 'llm_datadist\.Retries'"):
        assert parse({**MANAGER, "llm_datadist.Retries": "3"}) == parse(MANAGER)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("LLM_DATADIST_PATHS", "is 'LLM_DATADIST_PATH' meant"),
        ("LLM_DATA_DIST_HOME", "does not know 'LLM_DATA_DIST_HOME' in this release"),
    ],
)
def test_a_variable_that_looks_like_ours_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    monkeypatch.setenv(name, "x")
    monkeypatch.setenv("LLM_DATADIST_LINK_BASE_PORT", "26000")
    with pytest.warns(UserWarning, match=text) as warned:
        assert [parse(MANAGER) for _ in range(2)] == [parse(MANAGER)] * 2
    assert len(warned) == 1


@pytest.mark.parametrize(
    "name",
    [
        "LLM_DATADIST_LINK_SECURTY", "LLM_DATADIST_LINK_SECURITY_FILE", "LLM_DATADIST_SECURITY",
        "LLMDATADIST_LINK_SECURITY", "LLM_DATA_DIST_LINK_SECURITY", "llm_datadist_link_security",
        "LLM_DATADIST_SECRET_FILE",
    ],
)  # fmt: skip
def test_a_variable_that_was_to_secure_links_opens_no_cluster(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, SECRET_OPTION)
    message = str(refusal(MANAGER))
    assert f"the environment variable {name!r}" in message
    assert "LLM_DATADIST_LINK_SECURITY meant" in message
    assert "0123456789" not in message
    monkeypatch.setenv("LLM_DATADIST_LINK_SECURITY", SECRET_OPTION)
    with pytest.warns(UserWarning, match=name):
        assert parse(MANAGER).link_security is not None


@pytest.mark.parametrize(
    "text",
    [
        pytest.param('{"secret": "0123456789abcdef", "secret": "0123456789abcdeg"}', id="twice"),
        pytest.param('{"secret": "\\ud8000123456789abcdef"}', id="half a pair"),
        pytest.param('{"secret": "' + 40 * " " + '"}', id="blanks"),
        pytest.param('{"secret": ' + 100_000 * "[", id="nested"),
    ],
)
def test_a_secret_that_cannot_be_meant_is_refused_and_not_shown(text: str) -> None:
    message = str(refusal({**MANAGER, "llm_datadist.LinkSecurity": text}))
    assert "llm_datadist.LinkSecurity" in message
    assert "0123456789" not in message


def test_no_role_is_param_invalid() -> None:
    none: Any = None
    with pytest.raises(LLMException, match="role is None") as caught:
        Options.parse(none, MANAGER)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


def test_a_role_of_another_type_is_a_type_error() -> None:
    role: Any = 1
    with pytest.raises(TypeError, match="role only supports LLMRole"):
        Options.parse(role, MANAGER)


@pytest.mark.shows("config.modes")
@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({}, (False, False)),
        ({"llm.EnableRemoteCacheAccessible": "1"}, (False, False)),
        ({"llm.EnableCacheManager": "0"}, (False, False)),
        ({"llm.EnableCacheManager": "true"}, (False, False)),
        (MANAGER, (True, False)),
        ({**MANAGER, "llm.EnableRemoteCacheAccessible": "1"}, (True, True)),
        ({**MANAGER, "llm.EnableRemoteCacheAccessible": "0"}, (True, False)),
        ({"llm.LocalCommRes": ""}, (True, True)),
        ({"llm.LocalCommRes": "{}"}, (True, True)),
        ({"llm.LocalCommRes": "", **MANAGER}, (True, True)),
        ({"llm.LocalCommRes": "", "llm.EnableRemoteCacheAccessible": "0"}, (True, False)),
        ({**HIXL, **LISTEN, **MANAGER}, (True, True)),
        ({**HIXL, **LISTEN, "llm.LocalCommRes": ""}, (True, True)),
        ({**HIXL, **LISTEN, **MANAGER, "llm.EnableRemoteCacheAccessible": "1"}, (True, True)),
    ],
)
def test_the_mode_follows_from_what_is_given(
    options: dict[str, str], mode: tuple[bool, bool]
) -> None:
    parsed = parse(options)
    assert (parsed.cache_manager, parsed.remote_accessible) == mode


@pytest.mark.shows("config.modes", "datadist.init.options", "error.5", "error.6")
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"llm.LocalCommRes": "", "llm.EnableCacheManager": "0"}, "EnableCacheManager must be 1"),
        ({**HIXL, **LISTEN}, "EnableCacheManager must be 1"),
        ({**HIXL, **LISTEN, "llm.EnableCacheManager": "0"}, "EnableCacheManager must be 1"),
        (
            {**HIXL, **LISTEN, **MANAGER, "llm.EnableRemoteCacheAccessible": "0"},
            "EnableRemoteCacheAccessible must not be 0",
        ),
        ({**HIXL, **MANAGER}, "llm.listenIpInfo is needed"),
        ({**LISTEN, **MANAGER, "llm.TransferBackend": ""}, 'must be "hixl"'),
        ({**LISTEN, **MANAGER, "llm.TransferBackend": "nccl"}, 'must be "hixl"'),
        ({**MANAGER, "llm.EnableRemoteCacheAccessible": "yes"}, "must be 0 or 1, got 'yes'"),
        ({**MANAGER, "llm.EnableRemoteCacheAccessible": ""}, "must be 0 or 1"),
    ],
)
def test_modes_that_exclude_each_other_are_param_invalid(
    options: dict[str, str], text: str
) -> None:
    error = refusal(options)
    assert text in str(error)
    assert error.status_code is LLMStatusCode.LLM_PARAM_INVALID


@pytest.mark.parametrize("name", ["ge.exec.deviceId", "llm.DeviceId"])
def test_the_device_has_two_keys(name: str) -> None:
    assert parse({**MANAGER, name: "7"}).device_id == 7


@pytest.mark.parametrize("name", ["llm.listenIpInfo", "llm.ListenIpInfo"])
@pytest.mark.parametrize(
    ("text", "listen"),
    [
        ("1.2.3.4:5", ("1.2.3.4", 5)),
        ("0.0.0.0:0", ("0.0.0.0", 0)),
        ("[::1]:65535", ("::1", 65535)),
    ],
)
def test_the_listening_address_has_two_keys(name: str, text: str, listen: tuple[str, int]) -> None:
    assert parse({**MANAGER, name: text}).listen == listen


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"ge.exec.deviceId": "1"}, {"llm.DeviceId": "2"}),
        (LISTEN, {"llm.ListenIpInfo": "1.2.3.4:6"}),
    ],
)
def test_two_keys_of_one_option_must_agree(one: dict[str, str], other: dict[str, str]) -> None:
    assert "are one option and differ" in str(refusal({**MANAGER, **one, **other}))


@pytest.mark.shows("datadist.init.options", "error.7", "error.8")
@pytest.mark.parametrize("mode", [{}, MANAGER])
@pytest.mark.parametrize(
    "text", ["", "1.2.3.4", "1.2.3.4:5:6", "::1:5", "localhost:5", "1.2:5", "1.2.3.4:5;1.2.3.4:6"]
)
def test_a_listening_address_of_another_form_is_param_invalid(
    mode: dict[str, str], text: str
) -> None:
    error = refusal({**mode, "llm.listenIpInfo": text})
    assert "llm.listenIpInfo" in str(error)
    assert error.status_code is LLMStatusCode.LLM_PARAM_INVALID


@pytest.mark.shows("error.7")
@pytest.mark.parametrize("port", ["x", "", "-1", "65536"])
def test_a_listening_port_that_is_none_is_a_value_error(port: str) -> None:
    with pytest.raises(ValueError, match=r"port of llm\.listenIpInfo"):
        parse({**MANAGER, "llm.listenIpInfo": f"1.2.3.4:{port}"})


def test_the_listening_address_can_be_read_alone() -> None:
    assert parse_listens({**LISTEN, "llm.MemPoolConfig": "not looked at"}) == (("1.2.3.4", 5),)


def test_no_listening_address_is_none() -> None:
    assert parse_listens({}) == ()


@pytest.mark.shows("datadist.init.options", "error.9", "flow_graph_mem")
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("ge.exec.deviceId", ["", "x", "-1", "1.0", "0;", "0;x", "0;0", "2147483648", "9" * 5000]),
        ("llm.SyncKvCacheWaitTime", ["", "x", "-1", "1.5", "0", "2147483648", "²"]),
        ("llm.LinkTotalTime", ["", "x", "-1", "2147483648"]),
        ("llm.LinkRetryCount", ["", "x", "0", "101"]),
        ("llm.RdmaTrafficClass", ["", "x", "-1", "4294967296"]),
        ("llm.RdmaServiceLevel", ["", "x", "-1", "4294967296"]),
        ("ge.flowGraphMemMaxSize", ["", "1.23", "-1", "1,2", "x"]),
        ("llm.MemPoolConfig", ["", "{}", "[]"]),
        ("llm.HostMemPoolConfig", ["", "{}", "[]"]),
        ("llm.BufPoolCfg", ["", "[]"]),
        ("llm_datadist.Path", ["", "rdma"]),
        ("llm_datadist.Threads", ["", "x", "0", "17"]),
    ],
)
def test_a_value_that_cannot_be_is_param_invalid(name: str, values: list[str]) -> None:
    errors = [refusal({**MANAGER, name: value}) for value in values]
    assert {error.status_code for error in errors} == {LLMStatusCode.LLM_PARAM_INVALID}


@pytest.mark.shows("flow_graph_mem")
@pytest.mark.parametrize("value", [[1], 1, None])
def test_the_graph_memory_is_a_text(value: Any) -> None:
    with pytest.raises(TypeError, match="only support"):
        parse({**MANAGER, "ge.flowGraphMemMaxSize": value})


@pytest.mark.shows("flow_graph_mem")
def test_the_graph_memory_is_no_pool_of_the_cache_manager() -> None:
    assert parse({**MANAGER, "ge.flowGraphMemMaxSize": "131072"}).device_pool is None


@pytest.mark.shows("flow_graph_mem")
def test_the_graph_memory_is_the_pool_of_the_v1_mode() -> None:
    assert parse({"ge.flowGraphMemMaxSize": "131072"}).device_pool == PoolConfig(131072)


def test_the_environment_gives_the_path_when_no_option_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LLM_DATADIST_PATH", "tcp")
    assert parse(MANAGER).path == "tcp"


def test_an_option_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_DATADIST_PATH", "tcp")
    assert parse({**MANAGER, "llm_datadist.Path": "auto"}).path == "auto"


@pytest.mark.parametrize("name", ["Metrics", "Tracing"])
def test_counting_and_tracing_are_off_until_an_option_or_the_environment_says_so(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_on(**options: str) -> object:
        return getattr(parse({**MANAGER, **options}), name.lower())

    option, variable = f"llm_datadist.{name}", f"LLM_DATADIST_{name.upper()}"
    assert (is_on(), is_on(**{option: "1"})) == (False, True)
    assert f"{option} must be 0 or 1, got 'yes'" in str(refusal({**MANAGER, option: "yes"}))
    monkeypatch.setenv(variable, "1")
    assert (is_on(), is_on(**{option: "0"})) == (True, False)
    monkeypatch.setenv(variable, "")
    assert is_on() is False
    monkeypatch.setenv(variable, "yes")
    assert f"the environment variable {variable} must be 0 or 1" in str(refusal(MANAGER))


def test_an_empty_environment_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_DATADIST_PATH", "")
    assert parse(MANAGER).path == "auto"


def test_a_wrong_path_in_the_environment_is_refused_by_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LLM_DATADIST_PATH", "rdma")
    assert "environment variable LLM_DATADIST_PATH" in str(refusal(MANAGER))
