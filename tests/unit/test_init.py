"""The arguments of LLMDataDist, and the options of init. Spec 5, 5.1; 10, rows 1, 3 and 5-10."""

from __future__ import annotations

import ctypes
import socket
from typing import TYPE_CHECKING, Any

import pytest

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    DataType,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
    Placement,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

MANAGER = {"llm.EnableCacheManager": "1"}
LISTEN = {"llm.listenIpInfo": "127.0.0.1:0"}
HIXL = {"llm.TransferBackend": "hixl"}
GIB = 2**30

INVALID = LLMStatusCode.LLM_PARAM_INVALID
NOT_LINKED = LLMStatusCode.LLM_NOT_YET_LINK


@pytest.fixture
def datadist() -> Iterator[LLMDataDist]:
    datadist = LLMDataDist(LLMRole.PROMPT, 1)
    yield datadist
    datadist.finalize()


def refusal(datadist: LLMDataDist, options: dict[str, str]) -> LLMStatusCode:
    """How init refuses; it can be tried again then, and works."""
    with pytest.raises(LLMException) as error:
        datadist.init(options)
    datadist.init(MANAGER)
    datadist.finalize()
    return error.value.status_code


# -- arguments -------------------------------------------------------------------------------------


@pytest.mark.shows("error.1")
@pytest.mark.parametrize(
    ("role", "cluster_id", "error", "text"),
    [
        (1, 1, TypeError, "role only support"),
        ("PROMPT", 1, TypeError, "role only support"),
        (Placement.DEVICE, 1, TypeError, "role only support"),
        (LLMRole.PROMPT, "1", TypeError, "cluster_id only support"),
        (LLMRole.PROMPT, None, TypeError, "cluster_id only support"),
        (LLMRole.PROMPT, 1.0, TypeError, "cluster_id only support"),
        (LLMRole.PROMPT, True, TypeError, "cluster_id only support"),
        (LLMRole.PROMPT, -1, ValueError, "cluster_id must be in"),
        (LLMRole.PROMPT, 2**64, ValueError, "cluster_id must be in"),
    ],
)
def test_a_role_or_id_that_is_none_is_refused(
    role: Any, cluster_id: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        LLMDataDist(role, cluster_id)


@pytest.mark.shows("datadist.init.options")
def test_a_missing_role_is_found_out_by_init() -> None:
    role: Any = None
    with pytest.raises(LLMException, match="role is None") as error:
        LLMDataDist(role, 1).init(MANAGER)
    assert error.value.status_code is INVALID


@pytest.mark.shows("error.3")
@pytest.mark.parametrize("options", [None, [], "llm.EnableCacheManager", [("a", "b")], 1])
def test_options_that_are_no_dict_are_a_type_error(datadist: LLMDataDist, options: Any) -> None:
    with pytest.raises(TypeError, match="options only support"):
        datadist.init(options)


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.shows("datadist.init.options")
@pytest.mark.parametrize(
    "options",
    [
        {"llm.TransferBackend": "nccl", **LISTEN},
        {"llm.TransferBackend": "", **LISTEN},
        {"llm.EnableRemoteCacheAccessible": "2"},
        {"llm.EnableRemoteCacheAccessible": ""},
        {"ge.exec.deviceId": "x"},
        {"ge.exec.deviceId": "-1"},
        {"ge.exec.deviceId": "2147483648"},
        {"llm.SyncKvCacheWaitTime": "1s"},
        {"llm.SyncKvCacheWaitTime": "-1"},
        {"llm.RdmaTrafficClass": "x"},
        {"llm.RdmaServiceLevel": "x"},
        {"llm.LinkTotalTime": "x"},
        {"llm.LinkTotalTime": "2147483648"},
        {"llm.LinkRetryCount": "x"},
        {"llm.LinkRetryCount": "0"},
        {"llm.LinkRetryCount": "101"},
        {"llm.MemPoolConfig": "{memory_size}"},
        {"llm.HostMemPoolConfig": "{memory_size}"},
        {"llm.BufPoolCfg": "{buf_cfg}"},
    ],
)
def test_an_option_that_cannot_be_is_param_invalid(
    datadist: LLMDataDist, options: dict[str, str]
) -> None:
    assert refusal(datadist, {**MANAGER, **options}) is INVALID


@pytest.mark.shows("datadist.init.options")
def test_unknown_options_and_resources_that_are_no_json_are_accepted(
    datadist: LLMDataDist,
) -> None:
    datadist.init({**MANAGER, "llm.LocalCommRes": "{broken", "llm.Role": "?", "my.own": ""})
    assert datadist.links() == []


@pytest.mark.shows("error.5", "config.modes", "datadist.init.options")
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({**HIXL, **LISTEN}, "EnableCacheManager"),
        ({**HIXL, **LISTEN, "llm.EnableCacheManager": "0"}, "EnableCacheManager"),
        (
            {**HIXL, **LISTEN, **MANAGER, "llm.EnableRemoteCacheAccessible": "0"},
            "EnableRemoteCacheAccessible",
        ),
        ({**HIXL, **MANAGER}, "listenIpInfo"),
    ],
)
def test_a_backend_needs_manager_access_and_address(
    datadist: LLMDataDist, options: dict[str, str], text: str
) -> None:
    with pytest.raises(LLMException, match=text) as error:
        datadist.init(options)
    assert error.value.status_code is INVALID


@pytest.mark.shows("error.6", "config.modes")
@pytest.mark.parametrize("resources", ["", "{}"])
def test_resources_need_the_cache_manager(datadist: LLMDataDist, resources: str) -> None:
    options = {"llm.LocalCommRes": resources, "llm.EnableCacheManager": "0"}
    assert refusal(datadist, options) is INVALID


@pytest.mark.shows("config.modes")
@pytest.mark.parametrize(
    ("options", "is_accessible"),
    [
        (MANAGER, False),
        ({**MANAGER, "llm.EnableRemoteCacheAccessible": "0"}, False),
        ({**MANAGER, "llm.EnableRemoteCacheAccessible": "1"}, True),
        ({"llm.LocalCommRes": ""}, True),
        ({"llm.LocalCommRes": "", "llm.EnableRemoteCacheAccessible": "0"}, False),
        ({**MANAGER, **HIXL, **LISTEN}, True),
    ],
)
def test_remote_access_is_on_where_the_options_say_or_imply_it(
    datadist: LLMDataDist, options: dict[str, str], is_accessible: bool
) -> None:
    datadist.init(options)
    manager = datadist.cache_manager
    desc = CacheDesc(1, [1, 8], DataType.DT_INT8)
    memory = (ctypes.c_char * 8)()
    cache = manager.register_blocks_cache(desc, [ctypes.addressof(memory)])
    with pytest.raises(LLMException) as error:
        manager.push_blocks(BlocksCacheKey(9), cache, [0], [0])
    assert error.value.status_code is (NOT_LINKED if is_accessible else INVALID)


@pytest.mark.shows("config.modes", "error.10")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"llm.EnableCacheManager": "0"},
        {"llm.EnableCacheManager": "true"},
        {"llm.EnableRemoteCacheAccessible": "1"},
    ],
)
def test_without_the_cache_manager_it_is_the_v1_mode(
    datadist: LLMDataDist, options: dict[str, str]
) -> None:
    datadist.init({**options, "ge.flowGraphMemMaxSize": "65536"})
    desc = CacheDesc(1, [1, 8], DataType.DT_INT8)
    assert datadist.kv_cache_manager.allocate_cache(desc).cache_id == 1
    with pytest.raises(LLMException, match="enable_cache_manager"):
        _ = datadist.cache_manager


# -- address and device ----------------------------------------------------------------------------


@pytest.mark.shows("error.7", "datadist.init.options")
@pytest.mark.parametrize("text", ["127.0.0.1", "127.0.0.1:1:2", "127.0.0.1:1;127.0.0.1:2"])
def test_an_address_of_another_form_is_param_invalid(datadist: LLMDataDist, text: str) -> None:
    options = {**MANAGER, "llm.listenIpInfo": text}
    assert refusal(datadist, options) is INVALID


@pytest.mark.shows("error.7")
@pytest.mark.parametrize("port", ["port", "", "-1", "65536", "1.0"])
def test_a_port_that_is_no_number_is_a_value_error(datadist: LLMDataDist, port: str) -> None:
    with pytest.raises(ValueError, match=r"port of llm\.listenIpInfo"):
        datadist.init({**MANAGER, "llm.listenIpInfo": f"127.0.0.1:{port}"})


@pytest.mark.shows("error.8", "datadist.init.options")
@pytest.mark.parametrize("ip", ["999.0.0.1", "localhost", "[::x]"])
def test_an_ip_that_is_none_is_param_invalid(datadist: LLMDataDist, ip: str) -> None:
    options = {**MANAGER, "llm.listenIpInfo": f"{ip}:0"}
    assert refusal(datadist, options) is INVALID


@pytest.mark.shows("error.8", "datadist.init.options")
def test_a_port_in_use_is_failed(datadist: LLMDataDist) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        options = {**MANAGER, "llm.listenIpInfo": f"127.0.0.1:{other.getsockname()[1]}"}
        assert refusal(datadist, options) is LLMStatusCode.LLM_FAILED


@pytest.mark.shows("D30", "config.device_id")
def test_the_cache_manager_has_one_device(datadist: LLMDataDist) -> None:
    config = LLMConfig()
    config.enable_cache_manager = True
    config.device_id = [0, 1]
    assert refusal(datadist, config.generate_options()) is INVALID
    config.device_id = [1]
    datadist.init(config.generate_options())
    assert datadist.links() == []


# -- pools -----------------------------------------------------------------------------------------

POOL_OPTIONS = ["llm.MemPoolConfig", "llm.HostMemPoolConfig"]


@pytest.mark.shows("pool.config", "error.9", "D7")
@pytest.mark.parametrize("name", POOL_OPTIONS)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        '[{"memory_size": 65536}]',
        '{"memory_size": 18446744073709551615}',
        '{"memory_size": "65536"}',
        '{"memory_size": 65536, "page_shift": 9}',
        '{"memory_size": 4294967296, "page_shift": 31}',
    ],
)
def test_a_pool_that_cannot_be_is_refused_by_init(
    datadist: LLMDataDist, name: str, text: str
) -> None:
    assert refusal(datadist, {**MANAGER, name: text}) is INVALID


@pytest.mark.shows("buf_pool.config", "error.9", "D7")
@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"buf_cfg": [{"total_size": 2097152, "blk_size": 257, "max_buf_size": 8192}]}',
        '{"buf_cfg": [{"total_size": 2097152, "blk_size": 256, "max_buf_size": 255}]}',
        '{"buf_cfg": [{"total_size": 2097153, "blk_size": 256, "max_buf_size": 8192}]}',
    ],
)
def test_a_buffer_pool_that_cannot_be_is_refused_by_init(datadist: LLMDataDist, text: str) -> None:
    assert refusal(datadist, {**MANAGER, "llm.BufPoolCfg": text}) is INVALID


@pytest.mark.shows("error.9", "datadist.init.options")
@pytest.mark.parametrize("name", POOL_OPTIONS)
def test_a_pool_that_cannot_be_had_is_out_of_memory(datadist: LLMDataDist, name: str) -> None:
    options = {**MANAGER, name: f'{{"memory_size": {2**60}, "page_shift": 30}}'}
    assert refusal(datadist, options) is LLMStatusCode.LLM_OUT_OF_MEMORY


@pytest.mark.shows("D8", "pool.config")
def test_a_host_pool_may_be_larger_than_20_gigabytes(datadist: LLMDataDist) -> None:
    datadist.init({**MANAGER, "llm.HostMemPoolConfig": f'{{"memory_size": {21 * GIB}}}'})
    desc = CacheDesc(2, [10, GIB], DataType.DT_INT8, Placement.HOST)
    assert len(datadist.cache_manager.allocate_cache(desc).tensor_addrs) == 2
    assert datadist.pools()[Placement.HOST][0].free_nbytes == GIB


@pytest.mark.shows("flow_graph_mem", "datadist.init.options")
@pytest.mark.parametrize("mode", [{}, MANAGER])
@pytest.mark.parametrize("text", ["1.23", "-1", "1,2", "", "1k"])
def test_the_graph_memory_is_digits(datadist: LLMDataDist, mode: dict[str, str], text: str) -> None:
    options = {**mode, "ge.flowGraphMemMaxSize": text}
    assert refusal(datadist, options) is INVALID


@pytest.mark.shows("flow_graph_mem")
def test_the_graph_memory_is_a_str(datadist: LLMDataDist) -> None:
    options: Any = {**MANAGER, "ge.flowGraphMemMaxSize": 65536}
    with pytest.raises(TypeError, match="only support"):
        datadist.init(options)
    datadist.init({**MANAGER, "ge.flowGraphMemMaxSize": "65536"})
    assert datadist.pools() == {}
