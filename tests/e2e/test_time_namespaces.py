"""Processes of one host whose clocks differ: containers with a time namespace of their own."""

from __future__ import annotations

import multiprocessing.spawn
import shutil
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import pytest
from linked_pair import SUCCESS

from llm_datadist import BlocksCacheKey, LLMRole
from llm_datadist.testing.cluster import Bytes, Node, NodeProcess, make_array

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SHAPE = (2, 8, 4096)
BLOCKS = list(range(8))


@contextmanager
def at_another_time(folder: Path, offset_s: int) -> Iterator[NodeProcess]:
    """A process whose monotonic clock is ahead of ours, or behind."""
    command = ["unshare", "-T", "--monotonic", str(offset_s), "--fork", "--kill-child"]
    tried = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"time namespaces need the right to make them (root): {tried.stderr}")
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nexec {" ".join(command)} {sys.executable} "$@"\n')
    script.chmod(0o700)
    usual = multiprocessing.spawn.get_executable()
    multiprocessing.spawn.set_executable(str(script))
    try:
        process = NodeProcess()
    finally:
        multiprocessing.spawn.set_executable(usual)
    with process:
        yield process


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs util-linux")
@pytest.mark.parametrize("offset_s", [1_000_000, -1], ids=["ahead", "behind"])
def test_pushes_and_pulls_do_not_compare_clocks(
    node: Node, tmp_path: Path, offset_s: int, path: str
) -> None:
    settings = {"transfer_path": path, "enable_remote_cache_accessible": True}
    with at_another_time(tmp_path, offset_s) as peer:
        port = peer.call(Node.start, LLMRole.DECODER, 1, listen_ip_info="127.0.0.1:0", **settings)
        theirs = peer.call(Node.add_blocks, *SHAPE, key=BlocksCacheKey(1, 0))
        node.start(LLMRole.PROMPT, 2, **settings)
        assert node.link(port, 1, 10_000) == SUCCESS
        ours = node.blocks_cache(*SHAPE, seed=1, key=BlocksCacheKey(2, 0))
        node.manager.push_blocks(BlocksCacheKey(1, 0), ours, BLOCKS, BLOCKS)
        np.testing.assert_array_equal(peer.call(Node.array_of, theirs), make_array(SHAPE, 1))
        np.testing.assert_array_equal(peer.call(pulled), make_array(SHAPE, 1))


def pulled(node: Node) -> Bytes:
    cache = node.blocks_cache(*SHAPE)
    node.manager.pull_blocks(BlocksCacheKey(2, 0), cache, BLOCKS, BLOCKS)
    return node.array_of(cache.cache_id)
