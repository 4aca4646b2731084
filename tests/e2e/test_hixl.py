"""`transfer_backend="hixl"`: each end links and unlinks for itself. Spec 5.6."""

from __future__ import annotations

import numpy as np
import pytest

from llm_datadist import BlocksCacheKey, LLMClusterInfo, LLMException, LLMRole, LLMStatusCode
from llm_datadist.testing.cluster import Node, NodeProcess, make_array
from llm_datadist.testing.timing import takes_at_most

SUCCESS = LLMStatusCode.LLM_SUCCESS
ALREADY_LINK = LLMStatusCode.LLM_ALREADY_LINK
SHAPE = (2, 4, 64)


def start(node: Node, cluster_id: int, path: str) -> int:
    """A node with one cache, filled from its id; the port it listens on."""
    port = node.start(
        LLMRole.MIX,
        cluster_id,
        listen_ip_info="127.0.0.1:0",
        transfer_backend="hixl",
        transfer_path=path,
    )
    node.blocks_cache(*SHAPE, seed=cluster_id, key=BlocksCacheKey(0, 0))
    return port


def pulls(node: Node, cluster_id: int) -> bool:
    cache = node.blocks_cache(*SHAPE)
    node.manager.pull_blocks(BlocksCacheKey(cluster_id, 0), cache, [0, 1], [3, 2])
    expected = make_array(SHAPE, cluster_id)[:, [0, 1]]
    return bool(np.array_equal(node.arrays[cache.cache_id][:, [3, 2]], expected))


def push(node: Node, cluster_id: int) -> None:
    """Sends block 0 of our cache to block 3 of the peer's."""
    node.manager.push_blocks(BlocksCacheKey(cluster_id, 0), node.caches[1], [0], [3])


def block_of_peer(node: Node, block: int) -> list[list[int]]:
    rows: list[list[int]] = node.arrays[1][:, block].tolist()
    return rows


@pytest.mark.shows("hixl.one_sided", "D16")
def test_remote_access_is_implied(node: Node, peer: NodeProcess, path: str) -> None:
    port = peer.call(start, 1, path)
    start(node, 2, path)
    assert node.link(port, 1) is SUCCESS
    assert pulls(node, 1)
    push(node, 1)
    assert peer.call(block_of_peer, 3) == make_array(SHAPE, 2)[:, 0].tolist()


@pytest.mark.shows("hixl.one_sided")
def test_each_end_links_for_itself_and_only_once(node: Node, peer: NodeProcess, path: str) -> None:
    theirs, ours = peer.call(start, 1, path), start(node, 2, path)
    assert node.link(theirs, 1) is SUCCESS
    assert node.link(theirs, 1) is ALREADY_LINK
    assert peer.call(Node.link, ours, 2) is SUCCESS
    assert peer.call(Node.link, ours, 2) is ALREADY_LINK
    assert node.link(theirs, 1) is ALREADY_LINK
    assert pulls(node, 1)
    assert peer.call(pulls, 2)


@pytest.mark.shows("hixl.one_sided")
@pytest.mark.parametrize("force", [False, True])
def test_each_end_unlinks_for_itself(node: Node, peer: NodeProcess, path: str, force: bool) -> None:
    theirs, ours = peer.call(start, 1, path), start(node, 2, path)
    assert [node.link(theirs, 1), peer.call(Node.link, ours, 2)] == [SUCCESS, SUCCESS]
    for _ in range(2):  # the second time there is nothing left of ours
        assert node.unlink(theirs, 1, force=force) is SUCCESS
        assert peer.call(pulls, 2), "over the link that it made itself"
    assert node.link(theirs, 1) is SUCCESS
    assert peer.call(Node.unlink, ours, 2, force=force) is SUCCESS
    assert pulls(node, 1)


@pytest.mark.shows("hixl.one_sided")
@pytest.mark.parametrize("force", [False, True])
def test_unlinking_needs_no_address_and_no_link(
    node: Node, victim: NodeProcess, force: bool
) -> None:
    port = victim.call(start, 1, "auto")
    start(node, 2, "auto")
    info = LLMClusterInfo()
    info.remote_cluster_id = 1
    assert node.link(port, 1) is SUCCESS
    assert node.datadist.unlink_clusters([info], 3000, force) == (SUCCESS, [SUCCESS])
    with pytest.raises(LLMException, match="not linked") as error:
        pulls(node, 1)
    assert error.value.status_code is LLMStatusCode.LLM_NOT_YET_LINK
    victim.kill()
    with takes_at_most(0.5):
        assert node.datadist.unlink_clusters([info], 3000, force) == (SUCCESS, [SUCCESS])
        assert node.unlink(port, 1, force=force) is SUCCESS


@pytest.mark.shows("datadist.switch_role")
def test_a_role_is_switched_at_the_port_that_was_taken(node: Node, path: str) -> None:
    port = start(node, 2, path)
    for options in (None, listen(0), listen(port)):
        node.datadist.switch_role(LLMRole.DECODER, options)
        assert [each.port for each in node.datadist.listen_endpoints] == [port]
    with pytest.raises(LLMException, match=f"the address stays 127.0.0.1:{port}") as error:
        node.datadist.switch_role(LLMRole.DECODER, listen(port + 1))
    assert error.value.status_code is LLMStatusCode.LLM_FEATURE_NOT_ENABLED


def listen(port: int) -> dict[str, str]:
    return {"llm.listenIpInfo": f"127.0.0.1:{port}"}
