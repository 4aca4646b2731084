"""Where the system refuses `process_vm_readv`: the container's profile of most container engines.

Links go over TCP and say why; copies within the process, and TLS, go through a pipe.
"""

from __future__ import annotations

import ctypes
import json
import logging
import mmap
import resource
from typing import TYPE_CHECKING

import numpy as np
import pytest
from linked_pair import INVALID, SUCCESS

from certificates import Authority
from llm_datadist import BlocksCacheKey, CacheDesc, DataType, LLMException, LLMRole, Placement
from llm_datadist.testing.cluster import Bytes, Node, NodeProcess, make_array
from llm_datadist.testing.timing import takes_at_most
from sandbox import forbid_foreign_memory

if TYPE_CHECKING:
    from pathlib import Path

    from llm_datadist import LLMStatusCode

#: blocks of an odd length: more segments than one system call takes, and more than a pipe holds
SHAPE = (2, 1500, 3001)
BLOCKS = list(range(SHAPE[1]))
KEY = BlocksCacheKey(1, 0)
#: what the right end of the first tensor of `register_hole` lacks
GONE_NBYTES = 2 * mmap.PAGESIZE


@pytest.fixture(params=["plain", "secret", "tls"])
def security(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, object]:
    if request.param == "plain":
        return {}
    secret = json.dumps({"secret": "a secret of more than sixteen bytes"})
    by_tls = Authority().issue(tmp_path / "here").option
    return {"link_security": secret if request.param == "secret" else by_tls()}


# -- copies within one process --


def test_copies_bring_every_byte(victim: NodeProcess) -> None:
    victim.call(forbid_foreign_memory)
    victim.call(Node.start, LLMRole.MIX, 1)
    src = make_array(SHAPE, 1)
    np.testing.assert_array_equal(victim.call(copy_blocks_backwards), src[:, ::-1])
    np.testing.assert_array_equal(victim.call(swap_out), src)
    np.testing.assert_array_equal(victim.call(copy_rows), make_array((2, 3, 5_000_001), 1))


def test_copies_of_small_blocks_go_to_their_places(victim: NodeProcess) -> None:
    victim.call(forbid_foreign_memory)
    victim.call(Node.start, LLMRole.MIX, 1)
    copied = victim.call(copy_every_other, (3, 4000, 24))
    np.testing.assert_array_equal(copied[:, 1::2], make_array((3, 4000, 24), 1)[:, ::2])


@pytest.mark.parametrize("is_source", [True, False])
def test_a_copy_of_memory_that_is_gone_is_an_error(victim: NodeProcess, is_source: bool) -> None:
    victim.call(forbid_foreign_memory)
    victim.call(Node.start, LLMRole.MIX, 1)
    with pytest.raises(LLMException, match="memory that is not mapped") as refused:
        victim.call(copy_with_hole, is_source=is_source)
    assert refused.value.status_code is INVALID


# -- links --


def test_links_use_tcp_and_say_why_once(
    node: Node, victim: NodeProcess, security: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    victim.call(forbid_foreign_memory)
    port = victim.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **security)
    victim.call(publish)
    node.start(LLMRole.DECODER, 2, **security)
    with caplog.at_level(logging.WARNING, "LLM_DATADIST"):
        assert node.link(port, 1) == SUCCESS
    (link,) = node.datadist.links()
    assert link.path == "tcp"
    assert "seccomp profile" in link.path_reason
    assert caplog.text.count("because cma is not available") == 1
    np.testing.assert_array_equal(pulled(node), make_array(SHAPE, 1))


def test_pulls_and_pushes_bring_the_right_bytes(security: dict[str, object]) -> None:
    with NodeProcess() as owner, NodeProcess() as reader:
        link(owner, reader, **security)
        owner.call(publish)
        np.testing.assert_array_equal(reader.call(pulled), make_array(SHAPE, 1))
        reader.call(Node.add_blocks, *SHAPE, key=BlocksCacheKey(2, 0))
        owner.call(push_all)
        np.testing.assert_array_equal(reader.call(Node.array_of, 2), make_array(SHAPE, 1))


def test_a_pull_of_memory_that_is_gone_says_so(security: dict[str, object]) -> None:
    with NodeProcess() as owner, NodeProcess() as reader:
        link(owner, reader, **security)
        owner.call(register_hole, KEY)
        with pytest.raises(LLMException, match="not mapped memory") as refused:
            reader.call(pulled, (1, 4, 64 * 1024))
        assert refused.value.status_code is INVALID


def test_an_owner_without_a_descriptor_for_the_pipe_answers_at_once(tmp_path: Path) -> None:
    """Nor with silence: its peer would wait until the deadline."""
    option = Authority().issue(tmp_path / "here").option()
    with NodeProcess() as owner, NodeProcess() as reader:
        link(owner, reader, link_security=option)
        owner.call(publish)
        assert reader.call(outcome_of_small_pull) == SUCCESS
        owner.call(open_no_more)
        with takes_at_most(5):
            assert reader.call(outcome_of_small_pull) != SUCCESS
        owner.call(open_again)
        assert reader.call(outcome_of_small_pull) == SUCCESS


# -- run by the processes --


def link(owner: NodeProcess, reader: NodeProcess, **settings: object) -> None:
    """Both may not read foreign memory."""
    owner.call(forbid_foreign_memory)
    reader.call(forbid_foreign_memory)
    settings["enable_remote_cache_accessible"] = True
    listen = {"listen_ip_info": "127.0.0.1:0", **settings}
    port = owner.call(Node.start, LLMRole.PROMPT, 1, **listen)
    reader.call(Node.start, LLMRole.DECODER, 2, **settings)
    assert reader.call(Node.link, port, 1, 20_000) == SUCCESS


def publish(node: Node) -> int:
    return node.blocks_cache(*SHAPE, seed=1, key=BlocksCacheKey(1, 0)).cache_id


def pulled(node: Node, shape: tuple[int, int, int] = SHAPE) -> Bytes:
    cache, blocks = node.blocks_cache(*shape), list(range(shape[1]))
    node.manager.pull_blocks(KEY, cache, blocks, blocks)
    return node.array_of(cache.cache_id)


def outcome_of_small_pull(node: Node) -> LLMStatusCode:
    cache = node.blocks_cache(*SHAPE)
    try:
        node.manager.pull_blocks(KEY, cache, [0], [1])
    except LLMException as error:
        return error.status_code
    return SUCCESS


def push_all(node: Node) -> None:
    node.manager.push_blocks(BlocksCacheKey(2, 0), node.caches[1], BLOCKS, BLOCKS)


def copy_blocks_backwards(node: Node) -> Bytes:
    cache = node.blocks_cache(SHAPE[0], 2 * SHAPE[1], SHAPE[2])
    array = node.array_of(cache.cache_id)
    array[:, : SHAPE[1]] = make_array(SHAPE, 1)
    last = 2 * SHAPE[1] - 1
    node.manager.copy_blocks(cache, {block: [last - block] for block in BLOCKS})
    return array[:, SHAPE[1] :]


def copy_every_other(node: Node, shape: tuple[int, int, int]) -> Bytes:
    cache = node.blocks_cache(*shape, seed=1)
    node.manager.copy_blocks(cache, {block: [block + 1] for block in range(0, shape[1], 2)})
    return node.array_of(cache.cache_id)


def swap_out(node: Node) -> Bytes:
    here = node.blocks_cache(*SHAPE, seed=1)
    there = node.blocks_cache(*SHAPE, placement=Placement.HOST)
    node.manager.swap_blocks(here, there, {block: block for block in BLOCKS})
    return node.array_of(there.cache_id)


def copy_rows(node: Node) -> Bytes:
    src = node.rows_cache(2, 3, 5_000_001, seed=1)
    dst = node.rows_cache(2, 3, 5_000_001)
    for row in range(3):
        node.manager.copy_cache(dst, src, row, row)
    return node.array_of(dst.cache_id)


#: for good: its end may be other memory by now
_holed: list[mmap.mmap] = []


def register_hole(node: Node, key: BlocksCacheKey | None = None) -> int:
    """A cache of four blocks of 64 KiB, of which the last lacks its end."""
    memory = mmap.mmap(-1, 4 * 64 * 1024)
    addr = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None)
    end = addr + len(memory)
    libc.munmap(ctypes.c_void_p(end - GONE_NBYTES), ctypes.c_size_t(GONE_NBYTES))
    desc = CacheDesc(1, [4, 64 * 1024], DataType.DT_INT8)
    _holed.append(memory)
    cache = node.manager.register_blocks_cache(desc, [addr], key)
    node.caches[cache.cache_id] = cache
    return cache.cache_id


def copy_with_hole(node: Node, *, is_source: bool) -> None:
    holed = node.caches[register_hole(node)]
    whole = node.blocks_cache(1, 4, 64 * 1024, placement=Placement.HOST)
    if is_source:
        node.manager.swap_blocks(holed, whole, {0: 0, 3: 1})
    else:
        node.manager.swap_blocks(whole, holed, {0: 0, 1: 3})


_before: list[tuple[int, int]] = []


def open_no_more(_: Node) -> None:
    _before.append(resource.getrlimit(resource.RLIMIT_NOFILE))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, _before[0][1]))


def open_again(_: Node) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, _before.pop())
