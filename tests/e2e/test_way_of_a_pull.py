"""What a warm pull passes through: straight down, and not far. docs/architecture.md quotes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from way_of_a_call import way_of

from llm_datadist import BlocksCacheKey, LLMRole, LLMStatusCode
from llm_datadist.testing.cluster import Node, NodeProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

    from way_of_a_call import Way

KEY = BlocksCacheKey(1)
BLOCKS = [1, 3, 5], [2, 4, 6]


@pytest.fixture(params=[True, False], ids=["one-sided", "two-sided"])
def warm_pull(request: pytest.FixtureRequest) -> Iterator[Way]:
    """Three blocks of 64 tensors over cma, the fourth time."""
    node, mode = Node(), {"enable_remote_cache_accessible": request.param}
    with NodeProcess() as peer:
        port = peer.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **mode)
        peer.call(Node.add_blocks, num_tensors=64, key=KEY, seed=1)
        node.start(LLMRole.DECODER, 2, transfer_path="cma", **mode)
        try:
            assert node.link(port, 1) is LLMStatusCode.LLM_SUCCESS
            cache, pull_blocks = node.blocks_cache(num_tensors=64), node.manager.pull_blocks
            for _ in range(3):
                pull_blocks(KEY, cache, *BLOCKS)
            yield way_of(lambda: pull_blocks(KEY, cache, *BLOCKS))
        finally:
            node.stop()


def test_a_warm_pull_runs_straight_down(warm_pull: Way, request: pytest.FixtureRequest) -> None:
    is_one_sided = "one-sided" in request.node.name
    assert warm_pull.calls <= (75 if is_one_sided else 100)
    assert len(warm_pull.files) <= (20 if is_one_sided else 24)
    assert not warm_pull.climbs


def test_nothing_of_a_pull_has_to_do_with_observing_when_nobody_looks(warm_pull: Way) -> None:
    assert not [file for file in warm_pull.files if file.startswith("observe/")]
