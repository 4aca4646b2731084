"""The examples of the seed documents as they stand there, with what they leave out around them."""

from __future__ import annotations

import subprocess
import sys
from textwrap import dedent
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    DataType,
    LLMException,
    LLMRole,
    LLMStatusCode,
    Placement,
)
from llm_datadist.cpp import (
    LLM_PARAM_INVALID,
    LLM_SUCCESS,
    OPTION_BUF_POOL_CFG,
    OPTION_DEVICE_ID,
    OPTION_ENABLE_SET_ROLE,
    OPTION_LISTEN_IP_INFO,
    OPTION_SYNC_CACHE_WAIT_TIME,
    LlmDataDist,
    LlmRole,
)
from llm_datadist.cpp import CacheDesc as CppCacheDesc

if TYPE_CHECKING:
    from llm_datadist.testing.cluster import Node

POOL = '{"memory_size": 67108864}'

ALLOCATE = """
from llm_datadist import *
cache_desc = CacheDesc(1, [2, 1024 * 1024], DataType.DT_FLOAT16)
cache_keys = [CacheKey(1, req_id=1), CacheKey(1, req_id=2)]
cache = cache_manager.allocate_cache(cache_desc, cache_keys)
"""


def run(example: str, **names: Any) -> dict[str, Any]:
    """The names that the example leaves behind."""
    exec(dedent(example), names)  # the seed's text, not ours to rewrite
    return names


def free_nbytes(node: Node) -> int:
    return sum(part.free_nbytes for part in node.datadist.pools()[Placement.DEVICE])


@pytest.fixture
def prompt(node: Node) -> Node:
    node.start(LLMRole.PROMPT, 1, mem_pool_cfg=POOL)
    return node


@pytest.mark.shows("seed.001.allocate_cache", "seed.003")
def test_allocate_cache(prompt: Node) -> None:
    cache = run(ALLOCATE, cache_manager=prompt.manager)["cache"]
    assert isinstance(cache, Cache)
    assert len(cache.tensor_addrs) == 1
    with pytest.raises(LLMException) as caught:  # "throws when the keys are bound already"
        run(ALLOCATE, cache_manager=prompt.manager)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


@pytest.mark.shows("seed.001.deallocate_cache", "seed.001.remove_cache_key")
def test_deallocate_cache_and_remove_cache_key(prompt: Node) -> None:
    everything = free_nbytes(prompt)
    names = run(ALLOCATE, cache_manager=prompt.manager)
    run(
        """
        from llm_datadist import *
        cache_manager.deallocate_cache(cache)
        """,
        **names,
    )
    assert free_nbytes(prompt) < everything  # "delayed until all keys are pulled or removed"
    run(
        """
        from llm_datadist import *
        cache_keys = [CacheKey(1, req_id=1), CacheKey(1, req_id=2)]
        cache_manager.remove_cache_key(cache_keys[0])
        cache_manager.remove_cache_key(cache_keys[1])
        """,
        cache_manager=prompt.manager,
    )
    assert free_nbytes(prompt) == everything
    run("cache_manager.deallocate_cache(cache)", **names)  # "a no-op when it is freed already"


def filled(shape: tuple[int, int, int], placement: Placement) -> Any:
    """A cache's descriptor and its memory, each block or row filled with its number."""
    num_tensors, rows, nbytes = shape
    array = np.empty(shape, np.uint8)
    array[:] = np.arange(rows, dtype=np.uint8)[None, :, None]
    return CacheDesc(num_tensors, [rows, nbytes], DataType.DT_UINT8, placement), array


def addrs_of(array: Any) -> list[int]:
    return [tensor.ctypes.data for tensor in array]


@pytest.mark.shows("seed.001.copy_cache")
def test_copy_cache(prompt: Node) -> None:
    desc, src = filled((2, 2, 256), Placement.DEVICE)
    src_cache = prompt.manager.register_cache(desc, addrs_of(src))
    dst = np.full_like(src, 9)
    dst_cache = prompt.manager.register_cache(desc, addrs_of(dst))
    run(
        """
        from llm_datadist import *
        cache_manager.copy_cache(dst_cache, src_cache, 0, 1, 0, 128)
        """,
        cache_manager=prompt.manager,
        dst_cache=dst_cache,
        src_cache=src_cache,
    )
    expected = np.full_like(src, 9)
    expected[:, 0, :128] = 1
    np.testing.assert_array_equal(dst, expected)


@pytest.mark.shows("seed.001.allocate_blocks_cache")
def test_allocate_blocks_cache(prompt: Node) -> None:
    everything = free_nbytes(prompt)
    names = run(
        """
        from llm_datadist import *
        blocks_cache_key = BlocksCacheKey(1, 0)
        blocks_cache = cache_manager.allocate_blocks_cache(cache_desc, blocks_cache_key)
        """,
        cache_manager=prompt.manager,
        cache_desc=CacheDesc(2, [8, 4096], DataType.DT_INT8),
    )
    assert names["blocks_cache"].is_blocks_cache
    prompt.manager.deallocate_blocks_cache(names["blocks_cache"])
    assert free_nbytes(prompt) == everything


@pytest.mark.shows("seed.001.copy_blocks")
def test_copy_blocks(prompt: Node) -> None:
    desc, blocks = filled((2, 5, 64), Placement.DEVICE)
    cache = prompt.manager.register_blocks_cache(desc, addrs_of(blocks))
    run("cache_manager.copy_blocks(cache, {1: [2,3]})", cache_manager=prompt.manager, cache=cache)
    assert blocks[:, :, 0].tolist() == [[0, 1, 1, 1, 4]] * 2


@pytest.mark.shows("seed.001.swap_blocks", "seed.004")
def test_swap_blocks(prompt: Node) -> None:
    cpu_cache_desc, cpu = filled((2, 5, 64), Placement.HOST)
    names = run(
        """
        from llm_datadist import Cache
        npu_cache = cache_manager.allocate_blocks_cache(npu_cache_desc, npu_cache_key)
        cpu_cache = Cache.create_cpu_cache(cpu_cache_desc, cpu_addrs)
        # swap in
        cache_manager.swap_blocks(cpu_cache, npu_cache, {1:2, 3:4})
        """,
        cache_manager=prompt.manager,
        npu_cache_desc=CacheDesc(2, [5, 64], DataType.DT_UINT8),
        npu_cache_key=BlocksCacheKey(1, 0),
        cpu_cache_desc=cpu_cache_desc,
        cpu_addrs=addrs_of(cpu),
    )
    cpu[:] = 9
    back = {2: 1, 4: 3}
    prompt.manager.swap_blocks(names["npu_cache"], names["cpu_cache"], back)
    assert cpu[:, :, 0].tolist() == [[9, 1, 9, 3, 9]] * 2
    prompt.manager.copy_blocks(names["npu_cache"], {2: [1], 4: [3]})
    run(
        """
        # swap out
        cache_manager.swap_blocks(npu_cache, cpu_cache, {1:2, 3:4})
        """,
        **names,
    )
    assert cpu[:, :, 0].tolist() == [[9, 1, 1, 3, 3]] * 2


@pytest.mark.shows("seed.000", "seed.001.host_mem_pool_cfg")
@pytest.mark.parametrize("option", ["mem_pool_cfg", "host_mem_pool_cfg"])
def test_a_pool_of_18_gigabytes(node: Node, option: str) -> None:
    example = f"""
        from llm_datadist import LLMConfig
        llm_config = LLMConfig()
        llm_config.{option}= "{{\\"memory_size\\": 18737418240, \\"page_shift\\": 16}}"
        """
    config = run(example)["llm_config"]
    node.start(LLMRole.PROMPT, 1, **{option: getattr(config, option)})
    ((usage,),) = node.datadist.pools().values()
    assert usage.capacity_nbytes == 18737418240 // 65536 * 65536


@pytest.mark.shows("seed.002")
def test_initialize() -> None:
    options = {
        OPTION_LISTEN_IP_INFO: "127.0.0.1:0",
        OPTION_DEVICE_ID: "0",
        OPTION_SYNC_CACHE_WAIT_TIME: "1000",
        OPTION_BUF_POOL_CFG: """{
"buf_cfg":[{"total_size":2097152,"blk_size":256,"max_buf_size":8192}],
"buf_pool_size": 2147483648
}""",
        OPTION_ENABLE_SET_ROLE: "1",
    }
    prompt = LlmDataDist(1, LlmRole.kPrompt)
    assert prompt.Initialize(options) == LLM_SUCCESS
    try:
        desc = CppCacheDesc(num_tensors=2, data_type=DataType.DT_INT8, shape=[1, 8192])
        status, cache = prompt.AllocateCache(desc)
        assert status == LLM_SUCCESS
        assert prompt.DeallocateCache(cache.cache_id) == LLM_SUCCESS
        assert prompt.SetRole(LlmRole.kDecoder, {}) == LLM_SUCCESS
    finally:
        prompt.Finalize()
    bad = {**options, OPTION_BUF_POOL_CFG: options[OPTION_BUF_POOL_CFG].replace("256", "257")}
    assert prompt.Initialize(bad) == LLM_PARAM_INVALID


CACHE_MEMBERS = """
kv_cache = cache_manager.allocate_cache(cache_desc, cache_keys)
print(kv_cache.cache_id)
print(kv_cache.cache_desc.num_tensors)
print(kv_cache.tensor_addrs)
"""


@pytest.mark.shows("seed.004")
def test_the_members_of_cache(prompt: Node, capsys: pytest.CaptureFixture[str]) -> None:
    desc = CacheDesc(2, [1, 64], DataType.DT_INT8)
    names = run(CACHE_MEMBERS, cache_manager=prompt.manager, cache_desc=desc, cache_keys=[])
    addrs = names["kv_cache"].tensor_addrs
    assert len(set(addrs)) == 2
    assert capsys.readouterr().out.splitlines() == ["1", "2", str(addrs)]


def test_a_star_import_needs_nothing_else() -> None:
    program = "from llm_datadist import *; print(CacheDesc(1, [2], DataType.DT_FLOAT16).size)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "4\n"
