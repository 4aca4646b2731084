"""LLMConfig. Spec 4.1, 4.2; 10, row 26."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_datadist.config import LLMConfig, LlmConfig
from llm_datadist.errors import LLMException, LLMStatusCode

ALWAYS = {"llm.MemoryUtilization": "0.95"}

#: each property, and what it reads as when it was not set
UNSET: dict[str, object] = {
    "device_id": None,
    "sync_kv_timeout": None,
    "listen_ip_info": "",
    "deploy_res_path": "",
    "ge_options": {},
    "enable_switch_role": False,
    "enable_cache_manager": False,
    "enable_remote_cache_accessible": False,
    "mem_pool_cfg": "",
    "host_mem_pool_cfg": "",
    "buf_pool_cfg": "",
    "rdma_traffic_class": None,
    "rdma_service_level": None,
    "local_comm_res": "",
    "transfer_backend": "",
    "global_resource_config": "",
    "link_total_time": 0,
    "link_retry_count": 1,
    "cluster_info": "",
    "output_max_size": None,
    "mem_utilization": 0.95,
    "transfer_path": "",
    "metrics": False,
    "tracing": False,
    "transfer_threads": 0,
}
#: the last four are ours alone
PROPERTY_ROWS = [f"config.{name}" for name in list(UNSET)[:-4]]


def options_with(**values: Any) -> dict[str, str]:
    config = LLMConfig()
    for name, value in values.items():
        setattr(config, name, value)
    return config.generate_options()


@pytest.mark.shows("config.generate_options")
def test_a_new_config_writes_the_memory_utilization_only() -> None:
    assert LLMConfig().generate_options() == ALWAYS


@pytest.mark.shows(*PROPERTY_ROWS)
@pytest.mark.parametrize(
    ("name", "value", "entries"),
    [
        ("device_id", 3, {"ge.exec.deviceId": "3", "ge.session_device_id": "3"}),
        ("device_id", [2, 1, 0], {"ge.exec.deviceId": "2;1;0", "ge.session_device_id": "2"}),
        (
            "device_id",
            2**31 - 1,
            {"ge.exec.deviceId": "2147483647", "ge.session_device_id": "2147483647"},
        ),
        ("device_id", (0,), {"ge.exec.deviceId": "0", "ge.session_device_id": "0"}),
        ("sync_kv_timeout", 500, {"llm.SyncKvCacheWaitTime": "500"}),
        ("sync_kv_timeout", "500", {"llm.SyncKvCacheWaitTime": "500"}),
        ("listen_ip_info", "1.2.3.4:5", {"llm.listenIpInfo": "1.2.3.4:5"}),
        ("listen_ip_info", "no check", {"llm.listenIpInfo": "no check"}),
        ("listen_ip_info", "", {}),
        ("deploy_res_path", "/x", {"llm.deployResPath": "/x"}),
        ("deploy_res_path", "", {}),
        ("ge_options", {"a": "b"}, {"a": "b"}),
        ("enable_switch_role", True, {"llm.EnableSwitchRole": "1"}),
        ("enable_switch_role", False, {}),
        ("enable_cache_manager", True, {"llm.EnableCacheManager": "1"}),
        ("enable_cache_manager", False, {"llm.EnableCacheManager": "0"}),
        ("enable_cache_manager", None, {}),
        ("enable_remote_cache_accessible", True, {"llm.EnableRemoteCacheAccessible": "1"}),
        ("enable_remote_cache_accessible", False, {"llm.EnableRemoteCacheAccessible": "0"}),
        ("mem_pool_cfg", "{}", {"llm.MemPoolConfig": "{}"}),
        ("mem_pool_cfg", "", {}),
        ("host_mem_pool_cfg", "{}", {"llm.HostMemPoolConfig": "{}"}),
        ("host_mem_pool_cfg", "", {}),
        ("buf_pool_cfg", "{}", {"llm.BufPoolCfg": "{}"}),
        ("buf_pool_cfg", "", {}),
        ("rdma_traffic_class", 100, {"llm.RdmaTrafficClass": "100"}),
        ("rdma_traffic_class", 2**32 - 1, {"llm.RdmaTrafficClass": "4294967295"}),
        ("rdma_service_level", 0, {"llm.RdmaServiceLevel": "0"}),
        ("rdma_service_level", 100, {"llm.RdmaServiceLevel": "100"}),
        ("local_comm_res", "", {"llm.LocalCommRes": ""}),
        ("local_comm_res", "{}", {"llm.LocalCommRes": "{}"}),
        ("local_comm_res", None, {}),
        ("transfer_backend", "hixl", {"llm.TransferBackend": "hixl"}),
        ("transfer_backend", "", {"llm.TransferBackend": ""}),
        ("global_resource_config", "{}", {"llm.GlobalResourceConfig": "{}"}),
        ("global_resource_config", "", {"llm.GlobalResourceConfig": ""}),
        ("link_total_time", 2**32 - 1, {"llm.LinkTotalTime": "4294967295"}),
        ("link_total_time", 0, {"llm.LinkTotalTime": "0"}),
        ("link_retry_count", 1, {"llm.LinkRetryCount": "1"}),
        ("link_retry_count", 100, {"llm.LinkRetryCount": "100"}),
        ("output_max_size", 7, {"llm.OutputMaxSize": "7"}),
        ("output_max_size", None, {}),
        ("cluster_info", "", {}),
        ("cluster_info", '{"cluster_id": 7}', {"llm.ClusterInfo": '{"cluster_id": 7}'}),
        ("mem_utilization", 0.0, {"llm.MemoryUtilization": "0.0"}),
        ("mem_utilization", 1.0, {"llm.MemoryUtilization": "1.0"}),
        ("mem_utilization", 0.5, {"llm.MemoryUtilization": "0.5"}),
        ("transfer_path", "cma", {"llm_datadist.Path": "cma"}),
        ("transfer_path", None, {}),
        ("metrics", True, {"llm_datadist.Metrics": "1"}),
        ("metrics", False, {"llm_datadist.Metrics": "0"}),
        ("tracing", True, {"llm_datadist.Tracing": "1"}),
        ("transfer_threads", 1, {"llm_datadist.Threads": "1"}),
        ("transfer_threads", 16, {"llm_datadist.Threads": "16"}),
    ],
)
def test_a_property_writes_its_entries(name: str, value: Any, entries: dict[str, str]) -> None:
    assert options_with(**{name: value}) == {**ALWAYS, **entries}


@pytest.mark.shows(*PROPERTY_ROWS)
@pytest.mark.parametrize(("name", "value"), UNSET.items())
def test_a_property_that_was_not_set_has_its_documented_value(name: str, value: object) -> None:
    assert getattr(LLMConfig(), name) == value


@pytest.mark.shows("config.device_id", "D30")
@pytest.mark.parametrize("value", [3, [1, 2], (1, 2)])
def test_the_device_is_read_back_as_it_was_set(value: Any) -> None:
    config = LLMConfig()
    config.device_id = value
    assert config.device_id is value


TEXTS = [
    "listen_ip_info",
    "deploy_res_path",
    "mem_pool_cfg",
    "host_mem_pool_cfg",
    "buf_pool_cfg",
    "local_comm_res",
    "transfer_backend",
    "global_resource_config",
    "cluster_info",
    "transfer_path",
]
SWITCHES = [
    "enable_switch_role",
    "enable_cache_manager",
    "enable_remote_cache_accessible",
    "metrics",
    "tracing",
]
NUMBERS = [
    "link_total_time",
    "link_retry_count",
    "rdma_traffic_class",
    "rdma_service_level",
    "transfer_threads",
]


WRONG_TYPES: dict[str, list[Any]] = {
    **{name: [1, ["x"], b"x"] for name in TEXTS},
    **{name: [1, "1"] for name in SWITCHES},
    **{name: [None, "1", 1.0, True] for name in NUMBERS},
    "device_id": [None, "0", 1.0, True, [0, "1"], [True], {0}],
    "sync_kv_timeout": [None, 1.0, True, [1]],
    "mem_utilization": [None, 1, "0.5", True],
    "output_max_size": ["1", 1.0, True],
    "ge_options": [[], "a", {"a": 1}, {1: "a"}],
}


@pytest.mark.shows("config.none", "error.26", *PROPERTY_ROWS)
@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG_TYPES.items() for value in values]
)
def test_a_value_of_another_type_is_a_type_error(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name}.*only support"):
        setattr(LLMConfig(), name, value)


#: a value of each property that None unsets; the others refuse None, see WRONG_TYPES
UNSETTABLE: dict[str, Any] = {
    **dict.fromkeys([name for name in TEXTS if name not in ("cluster_info", "transfer_path")], "x"),
    **dict.fromkeys(SWITCHES, True),
    "cluster_info": "{}",
    "transfer_path": "tcp",
    "output_max_size": 7,
    "ge_options": {"a": "b"},
}


@pytest.mark.shows("config.none")
@pytest.mark.parametrize(("name", "value"), UNSETTABLE.items())
def test_none_unsets_what_was_set(name: str, value: Any) -> None:
    config = LLMConfig()
    setattr(config, name, value)
    assert config.generate_options() != ALWAYS
    setattr(config, name, None)
    assert (getattr(config, name), config.generate_options()) == (UNSET[name], ALWAYS)


@pytest.mark.shows("config.none")
def test_each_property_takes_none_or_refuses_it() -> None:
    refuses = {name for name, values in WRONG_TYPES.items() if None in values}
    assert refuses | set(UNSETTABLE) == set(UNSET)


@pytest.mark.shows(
    "error.26",
    "config.device_id",
    "config.sync_kv_timeout",
    "config.rdma_traffic_class",
    "config.rdma_service_level",
)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("device_id", 2**31),
        ("device_id", [0, 2**31]),
        ("sync_kv_timeout", 2**31),
        ("sync_kv_timeout", "2147483648"),
        ("rdma_traffic_class", -1),
        ("rdma_traffic_class", 2**32),
        ("rdma_service_level", 2**32),
    ],
)
def test_a_number_too_wide_is_a_value_error(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        setattr(LLMConfig(), name, value)


@pytest.mark.shows(
    "error.26",
    "config.device_id",
    "config.sync_kv_timeout",
    "config.link_total_time",
    "config.link_retry_count",
    "config.mem_utilization",
    "config.cluster_info",
)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("device_id", -1),
        ("device_id", [0, -1]),
        ("device_id", []),
        ("sync_kv_timeout", 0),
        ("sync_kv_timeout", "0"),
        ("sync_kv_timeout", -1),
        ("sync_kv_timeout", "-1"),
        ("sync_kv_timeout", "1.5"),
        ("sync_kv_timeout", ""),
        ("sync_kv_timeout", "²"),
        ("link_total_time", -1),
        ("link_total_time", 2**32),
        ("link_retry_count", 0),
        ("link_retry_count", 101),
        ("mem_utilization", -0.1),
        ("mem_utilization", 1.1),
        ("mem_utilization", float("nan")),
        ("cluster_info", "{"),
        ("transfer_path", "rdma"),
        ("transfer_path", ""),
        ("transfer_threads", 0),
        ("transfer_threads", 17),
    ],
)
def test_a_value_that_is_not_allowed_is_param_invalid(name: str, value: Any) -> None:
    with pytest.raises(LLMException, match=name) as caught:
        setattr(LLMConfig(), name, value)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


def test_a_refused_value_leaves_the_old_one() -> None:
    config = LLMConfig()
    config.link_retry_count = 5
    with pytest.raises(LLMException):
        config.link_retry_count = 101
    assert config.link_retry_count == 5


@pytest.mark.shows("config.merge_order")
def test_properties_go_before_ge_options() -> None:
    options = options_with(
        ge_options={"llm.listenIpInfo": "old", "llm.Own": "kept"}, listen_ip_info="new"
    )
    assert options == {**ALWAYS, "llm.listenIpInfo": "new", "llm.Own": "kept"}


def test_an_option_that_is_unset_again_is_gone() -> None:
    config = LLMConfig()
    config.mem_pool_cfg = "{}"
    config.generate_options()
    config.mem_pool_cfg = ""
    assert config.generate_options() == ALWAYS


@pytest.mark.shows("config.generate_options")
def test_options_are_what_was_generated_last() -> None:
    config = LLMConfig()
    generated = config.generate_options()
    generated["llm.Own"] = "1"
    assert config.options is generated


def test_options_are_empty_before_anything_is_generated() -> None:
    assert LLMConfig().options == {}


def test_options_cannot_be_assigned() -> None:
    with pytest.raises(AttributeError):
        LLMConfig().options = {}  # type: ignore[misc]


def test_editing_generated_options_does_not_change_the_config() -> None:
    config = LLMConfig()
    config.generate_options()["llm.Own"] = "1"
    assert config.generate_options() == ALWAYS


@pytest.mark.shows("config.generate_options")
def test_gen_options_is_the_same_function() -> None:
    assert LLMConfig.gen_options is LLMConfig.generate_options


@pytest.mark.shows("names.aliases")
def test_both_names_are_the_same_class() -> None:
    assert LlmConfig is LLMConfig


@pytest.mark.shows("config.merge_order")
@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("link_securty", "link_security"),
        ("LinkSecurity", "link_security"),
        ("link_security_", "link_security"),
        ("security", "link_security"),
        ("enable_cahce_manager", "enable_cache_manager"),
        ("device_ids", "device_id"),
        ("sync_timeout", "sync_kv_timeout"),
        ("mem_pool_config", "mem_pool_cfg"),
        ("metric", "metrics"),
    ],
)
def test_a_slip_of_an_option_is_refused_and_the_nearest_named(name: str, meant: str) -> None:
    config = LLMConfig()
    with pytest.raises(AttributeError, match=f"no attribute '{name}': is '{meant}' meant"):
        setattr(config, name, "1")
    assert not hasattr(config, name)
    assert config.generate_options() == ALWAYS


@pytest.mark.shows("config.merge_order")
@pytest.mark.parametrize("name", ["numa_node", "link_keepalive", "kv_pool_cfg", "output_min_size"])
def test_an_option_of_a_newer_release_is_warned_of_once_and_has_no_effect(name: str) -> None:
    with pytest.warns(UserWarning, match=name) as warned:
        generated = [options_with(**{name: 1}) for _ in range(2)]
    assert [Path(each.filename).name for each in warned] == [Path(__file__).name]
    assert generated == [ALWAYS, ALWAYS]


def test_an_option_that_nobody_knows_cannot_be_read() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'numa_nodes'"):
        _ = LLMConfig().numa_nodes  # type: ignore[attr-defined]


def test_private_names_are_free_and_methods_may_be_replaced() -> None:
    config: Any = LLMConfig()
    config._link_securty = config.__note__ = "mine"
    config.gen_options = dict
    assert config.gen_options() == {}


def test_a_program_may_add_options_of_its_own_by_a_class() -> None:
    class Config(LLMConfig):
        link_securities: tuple[str, ...] = ()

    config = Config()
    config.link_securities = ("a",)
    assert config.link_securities == ("a",)


@pytest.mark.shows("config.enable_remote_cache_accessible")
@pytest.mark.parametrize(("flag", "text"), [(True, "1"), (False, "0")])
def test_the_private_attribute_of_a_property_is_honoured(flag: bool, text: str) -> None:
    entries = {"llm.EnableRemoteCacheAccessible": text}
    assert options_with(_enable_remote_cache_accessible=flag) == {**ALWAYS, **entries}


def test_two_configs_do_not_share_their_values() -> None:
    one, other = LLMConfig(), LLMConfig()
    one.ge_options["a"] = "b"
    one.device_id = 1
    assert other.generate_options() == ALWAYS


@pytest.mark.shows("config.cluster_info")
def test_addresses_in_cluster_info_are_stored_as_little_endian_ints() -> None:
    text = '{"cluster_id": 0, "listen_ip_info": [{"ip": "1.2.3.4", "port": 5}, {"ip": 9}]}'
    options = options_with(cluster_info=text)
    assert json.loads(options["llm.ClusterInfo"]) == {
        "cluster_id": 0,
        "listen_ip_info": [{"ip": 0x04030201, "port": 5}, {"ip": 9}],
    }


def test_a_property_documents_itself() -> None:
    assert "page_shift" in (LLMConfig.mem_pool_cfg.__doc__ or "")
