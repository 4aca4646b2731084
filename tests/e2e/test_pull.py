"""Pulling between two processes: the right bytes, nothing else touched, every refusal."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from llm_datadist import (
    BlocksCacheKey,
    CacheKey,
    CacheKeyByIdAndIndex,
    LLMException,
    LLMRole,
    LLMStatusCode,
    Placement,
)
from llm_datadist.testing.cluster import Bytes, Node, NodeProcess, make_array

NO_ID = 2**64 - 1
HOST = Placement.HOST


@dataclass
class Pair:
    """A decode node here, linked to a prefill node (cluster 1) in another process."""

    node: Node
    peer: NodeProcess
    is_accessible: bool


@pytest.fixture
def pair(node: Node, peer: NodeProcess, is_accessible: bool, path: str) -> Pair:
    settings = {"enable_remote_cache_accessible": is_accessible, "transfer_path": path}
    port = peer.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **settings)
    node.start(LLMRole.DECODER, 2, **settings)
    assert node.link(port, 1) == LLMStatusCode.LLM_SUCCESS
    assert [link.path for link in node.datadist.links()] == [path]
    return Pair(node, peer, is_accessible)


def add_blocks(node: Node, *args: object, **kwargs: object) -> int:
    return node.blocks_cache(*args, **kwargs).cache_id  # type: ignore[arg-type]


def add_rows(node: Node, *args: object, **kwargs: object) -> int:
    return node.rows_cache(*args, **kwargs).cache_id  # type: ignore[arg-type]


def unregister(node: Node, cache_id: int) -> None:
    node.manager.unregister_cache(cache_id)


def status_of(error: pytest.ExceptionInfo[LLMException]) -> LLMStatusCode:
    return error.value.status_code


def test_pull_blocks_moves_exactly_the_named_blocks(pair: Pair) -> None:
    pair.peer.call(add_blocks, 4, 16, 100, seed=1, key=BlocksCacheKey(1, 0))
    cache = pair.node.blocks_cache(4, 10, 100, seed=2)
    src, dst = [3, 0, 15, 7, 8, 9], [9, 1, 0, 4, 5, 6]
    expected = make_array((4, 10, 100), 2)
    expected[:, dst] = make_array((4, 16, 100), 1)[:, src]
    pair.node.manager.pull_blocks(BlocksCacheKey(1, 0), cache, src, dst)
    assert np.array_equal(pair.node.arrays[cache.cache_id], expected)


def test_a_large_pull_in_parts_moves_every_byte(pair: Pair) -> None:
    shape = (16, 64, 32768)
    pair.peer.call(add_blocks, *shape, seed=3, key=BlocksCacheKey(1, 5))
    cache = pair.node.blocks_cache(*shape)
    rng = np.random.default_rng(4)
    src, dst = rng.permutation(64)[:40].tolist(), rng.permutation(64)[:40].tolist()
    expected = np.zeros(shape, dtype=np.uint8)
    expected[:, dst] = make_array(shape, 3)[:, src]
    pair.node.manager.pull_blocks(BlocksCacheKey(1, 5), cache, src, dst)
    assert np.array_equal(pair.node.arrays[cache.cache_id], expected)


@pytest.mark.parametrize(
    ("ranges", "moved"),
    [
        ({"src_layer_range": range(1, 3), "dst_layer_range": range(1)}, None),
        ({"src_layer_range": range(2, 3), "dst_layer_range": range(1)}, ([4, 5], [0, 1])),
        ({"dst_layer_range": range(3), "src_layer_range": range(3)}, ([0, 1, 2, 3, 4, 5],) * 2),
        (
            {
                "src_layer_range": range(1, 3),
                "dst_layer_range": range(4, 6),
                "tensor_num_per_layer": 1,
            },
            ([1, 2], [4, 5]),
        ),
        ({"src_layer_range": range(0), "tensor_num_per_layer": 9}, (range(6), range(6))),
    ],
)
def test_layer_ranges_pick_tensors(
    pair: Pair, ranges: dict[str, object], moved: tuple[list[int], list[int]] | None
) -> None:
    pair.peer.call(add_blocks, 6, 4, 64, seed=1, key=BlocksCacheKey(1, 0))
    cache = pair.node.blocks_cache(6, 4, 64)
    expected = np.zeros((6, 4, 64), dtype=np.uint8)
    if moved is None:
        with pytest.raises(LLMException) as error:
            pair.node.manager.pull_blocks(BlocksCacheKey(1, 0), cache, [0], [1], **ranges)
        assert status_of(error) == LLMStatusCode.LLM_PARAM_INVALID
    else:
        src, dst = moved
        expected[list(dst), 1] = make_array((6, 4, 64), 1)[list(src), 0]
        pair.node.manager.pull_blocks(BlocksCacheKey(1, 0), cache, [0], [1], **ranges)
    assert np.array_equal(pair.node.arrays[cache.cache_id], expected)


def test_a_row_fills_blocks_and_its_tail_leaves_the_rest_alone(pair: Pair) -> None:
    cache_id = pair.peer.call(add_rows, 2, 3, 28, seed=1)
    cache = pair.node.blocks_cache(2, 8, 8, seed=2)
    pair.node.manager.pull_blocks(CacheKeyByIdAndIndex(1, cache_id, 1), cache, (), [1, 3, 5, 7])
    expected: Bytes = make_array((2, 8, 8), 2)
    row = make_array((2, 3, 28), 1)[:, 1]
    for chunk, block in enumerate([1, 3, 5]):
        expected[:, block] = row[:, 8 * chunk : 8 * chunk + 8]
    expected[:, 7, :4] = row[:, 24:]
    assert np.array_equal(pair.node.arrays[cache.cache_id], expected)


@pytest.mark.parametrize(("size", "moved"), [(-1, 100), (100, 100), (37, 37)])
def test_pull_cache_moves_a_row_from_its_beginning(pair: Pair, size: int, moved: int) -> None:
    cache_id = pair.peer.call(add_rows, 3, 4, 256, seed=1)
    cache = pair.node.rows_cache(3, 2, 100, seed=2)
    pair.node.manager.pull_cache(CacheKeyByIdAndIndex(1, cache_id, 3), cache, 1, size)
    expected = make_array((3, 2, 100), 2)
    expected[:, 1, :moved] = make_array((3, 4, 256), 1)[:, 3, :moved]
    assert np.array_equal(pair.node.arrays[cache.cache_id], expected)


@pytest.mark.parametrize(
    "key", [CacheKey(1, 77), CacheKey(1, NO_ID, prefix_id=5), CacheKey(1, 77, 3)], ids=str
)
def test_a_key_names_its_row(node: Node, peer: NodeProcess, path: str, key: CacheKey) -> None:
    port = peer.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0")
    node.start(LLMRole.DECODER, 2, transfer_path=path)
    assert node.link(port, 1) == LLMStatusCode.LLM_SUCCESS
    placeholder = CacheKey(1, NO_ID)
    peer.call(add_rows, 2, 4, 64, seed=1, keys=[placeholder, placeholder, key])
    cache = node.rows_cache(2, 1, 64)
    for _ in range(2):  # the key of a registered cache is not used up
        node.arrays[cache.cache_id][:] = 0
        node.manager.pull_cache(key, cache)
        assert np.array_equal(node.arrays[cache.cache_id][:, 0], make_array((2, 4, 64), 1)[:, 2])


def test_a_cache_registered_after_linking_can_be_pulled_at_once(pair: Pair) -> None:
    cache = pair.node.blocks_cache()
    for seed in range(3):
        key = BlocksCacheKey(1, seed)
        pair.peer.call(add_blocks, seed=seed, key=key)
        pair.node.manager.pull_blocks(key, cache, [0], [1])
        expected = make_array((2, 8, 64), seed)[:, 0]
        assert np.array_equal(pair.node.arrays[cache.cache_id][:, 1], expected)


def test_a_key_that_moved_to_a_new_cache_never_leads_to_the_old_one(pair: Pair) -> None:
    cache = pair.node.blocks_cache()
    for seed in range(1, 4):
        pair.peer.call(add_blocks, seed=seed, key=BlocksCacheKey(1, 0))
        pair.node.manager.pull_blocks(BlocksCacheKey(1, 0), cache, [2], [3])
        expected = make_array((2, 8, 64), seed)[:, 2]
        assert np.array_equal(pair.node.arrays[cache.cache_id][:, 3], expected)


def test_an_unregistered_cache_cannot_be_pulled_by_key_or_by_id(pair: Pair) -> None:
    cache = pair.node.blocks_cache()
    rows = pair.node.rows_cache()
    blocks_id = pair.peer.call(add_blocks, seed=1, key=BlocksCacheKey(1, 0))
    rows_id = pair.peer.call(add_rows, seed=1)
    pair.node.manager.pull_blocks(BlocksCacheKey(1, 0), cache, [0], [0])
    pair.node.manager.pull_cache(CacheKeyByIdAndIndex(1, rows_id), rows)
    pair.peer.call(unregister, blocks_id)
    pair.peer.call(unregister, rows_id)
    with pytest.raises(LLMException) as error:
        pair.node.manager.pull_blocks(BlocksCacheKey(1, 0), cache, [0], [0])
    assert status_of(error) == LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
    with pytest.raises(LLMException) as error:
        pair.node.manager.pull_cache(CacheKeyByIdAndIndex(1, rows_id), rows)
    assert status_of(error) == LLMStatusCode.LLM_KV_CACHE_NOT_EXIST


@pytest.mark.parametrize("cache_id", [-1, 0, 99, 2**62])
def test_an_id_that_was_never_given_out_names_nothing(pair: Pair, cache_id: int) -> None:
    pair.peer.call(add_blocks, key=BlocksCacheKey(1, 0))
    with pytest.raises(LLMException) as error:
        pair.node.manager.pull_cache(
            CacheKeyByIdAndIndex(1, cache_id), pair.node.rows_cache(1, 1, 16)
        )
    assert status_of(error) == LLMStatusCode.LLM_KV_CACHE_NOT_EXIST


def test_a_row_that_is_not_there_does_not_exist(pair: Pair) -> None:
    cache_id = pair.peer.call(add_rows, 2, 4, 256)
    key = CacheKeyByIdAndIndex(1, cache_id, 4)
    with pytest.raises(LLMException, match="no row 4") as error:
        pair.node.manager.pull_cache(key, pair.node.rows_cache())
    assert status_of(error) == LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
    with pytest.raises(LLMException, match="no row 4") as error:
        pair.node.manager.pull_blocks(key, pair.node.blocks_cache(), (), [0])
    assert status_of(error) == LLMStatusCode.LLM_KV_CACHE_NOT_EXIST


@pytest.mark.parametrize(
    ("mine", "src", "dst", "says"),
    [
        ((2, 8, 64), [8], [0], "source has 8 blocks"),
        ((2, 8, 64), [0], [8], "destination has 8 blocks"),
        ((2, 8, 64), [-1], [0], "out of range"),
        ((2, 8, 64), [0, 1], [0], "do not pair"),
        ((3, 8, 64), [0], [0], "2 remote tensors for 3 local ones"),
        ((2, 8, 32), [0], [0], "source blocks have 64 bytes"),
        ((2, 8, 128), [0], [0], "destination blocks 128"),
    ],
)
def test_blocks_that_do_not_fit_are_refused_and_nothing_is_written(
    pair: Pair, mine: tuple[int, int, int], src: list[int], dst: list[int], says: str
) -> None:
    pair.peer.call(add_blocks, 2, 8, 64, seed=1, key=BlocksCacheKey(1, 0))
    cache = pair.node.blocks_cache(*mine, seed=2)
    with pytest.raises(LLMException, match=says) as error:
        pair.node.manager.pull_blocks(BlocksCacheKey(1, 0), cache, src, dst)
    assert status_of(error) == LLMStatusCode.LLM_PARAM_INVALID
    assert np.array_equal(pair.node.arrays[cache.cache_id], make_array(mine, 2))


@pytest.mark.parametrize(
    ("theirs", "mine", "size"),
    [
        ((2, 2, 64), (2, 2, 65), -1),  # the remote row is shorter than ours
        ((2, 2, 64), (2, 2, 32), 33),
        ((2, 2, 16), (2, 2, 32), 17),
        ((3, 2, 64), (2, 2, 64), -1),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    pair: Pair, theirs: tuple[int, int, int], mine: tuple[int, int, int], size: int
) -> None:
    cache_id = pair.peer.call(add_rows, *theirs, seed=1)
    cache = pair.node.rows_cache(*mine)
    with pytest.raises(LLMException) as error:
        pair.node.manager.pull_cache(CacheKeyByIdAndIndex(1, cache_id), cache, 0, size)
    assert status_of(error) == LLMStatusCode.LLM_PARAM_INVALID
    assert not pair.node.arrays[cache.cache_id].any()


def test_a_blocks_cache_is_not_pulled_by_rows_nor_the_other_way_round(pair: Pair) -> None:
    blocks_id = pair.peer.call(add_blocks, key=BlocksCacheKey(1, 0))
    key = CacheKeyByIdAndIndex(1, blocks_id)
    with pytest.raises(LLMException, match="blocks cache") as error:
        pair.node.manager.pull_cache(key, pair.node.rows_cache(2, 1, 64))
    assert status_of(error) == LLMStatusCode.LLM_PARAM_INVALID
    with pytest.raises(LLMException, match="blocks cache") as error:
        pair.node.manager.pull_blocks(key, pair.node.blocks_cache(), (), [0])
    assert status_of(error) == LLMStatusCode.LLM_PARAM_INVALID


def test_memory_that_is_not_remote_accessible_is_refused(pair: Pair) -> None:
    pair.peer.call(add_blocks, key=BlocksCacheKey(1, 0), remote_accessible=False)
    with pytest.raises(LLMException, match="remote_accessible=True") as error:
        pair.node.manager.pull_blocks(BlocksCacheKey(1, 0), pair.node.blocks_cache(), [0], [0])
    assert status_of(error) == LLMStatusCode.LLM_PARAM_INVALID


def test_host_to_host_needs_remote_access(pair: Pair) -> None:
    pair.peer.call(
        add_blocks, seed=1, key=BlocksCacheKey(1, 0), placement=HOST, remote_accessible=True
    )
    cache = pair.node.blocks_cache(placement=HOST, remote_accessible=True)
    if pair.is_accessible:
        pair.node.manager.pull_blocks(BlocksCacheKey(1, 0), cache, [1], [2])
        expected = make_array((2, 8, 64), 1)[:, 1]
        assert np.array_equal(pair.node.arrays[cache.cache_id][:, 2], expected)
    else:
        with pytest.raises(LLMException) as error:
            pair.node.manager.pull_blocks(BlocksCacheKey(1, 0), cache, [1], [2])
        assert status_of(error) == LLMStatusCode.LLM_FEATURE_NOT_ENABLED


def register_unmapped(node: Node) -> int:
    """A blocks cache at addresses that no program has."""
    from llm_datadist import CacheDesc, DataType

    desc = CacheDesc(1, [4, 64], DataType.DT_INT8)
    return node.manager.register_blocks_cache(desc, [0x1000], BlocksCacheKey(1, 9)).cache_id


def test_unmapped_memory_is_refused_by_address_and_the_link_goes_on(pair: Pair) -> None:
    pair.peer.call(register_unmapped)
    cache = pair.node.blocks_cache(1, 4, 64)
    with pytest.raises(LLMException, match=r"remote address 0x1040.*not mapped") as error:
        pair.node.manager.pull_blocks(BlocksCacheKey(1, 9), cache, [1], [1])
    assert status_of(error) == LLMStatusCode.LLM_PARAM_INVALID
    pair.peer.call(add_blocks, 1, 4, 64, seed=1, key=BlocksCacheKey(1, 0))
    register_unmapped(pair.node)
    unmapped = pair.node.manager.register_blocks_cache(cache.cache_desc, [0x1000])
    with pytest.raises(LLMException, match=r"local address.*not mapped") as error:
        pair.node.manager.pull_blocks(BlocksCacheKey(1, 0), unmapped, [1], [1])
    assert status_of(error) == LLMStatusCode.LLM_PARAM_INVALID
    pair.node.manager.pull_blocks(BlocksCacheKey(1, 0), cache, [2], [3])
    expected = make_array((1, 4, 64), 1)[:, 2]
    assert np.array_equal(pair.node.arrays[cache.cache_id][:, 3], expected)


def test_an_error_names_the_call_the_peer_and_the_cache(pair: Pair) -> None:
    cache = pair.node.blocks_cache()
    with pytest.raises(
        LLMException, match=r"pull_blocks of BlocksCacheKey\(cluster_id=1, .*cache 1"
    ):
        pair.node.manager.pull_blocks(BlocksCacheKey(1, 4), cache, [0], [0])


def test_only_an_id_will_do_for_pull_cache_with_remote_access(pair: Pair) -> None:
    cache = pair.node.rows_cache()
    expected = TypeError if pair.is_accessible else LLMException
    with pytest.raises(expected):
        pair.node.manager.pull_cache(CacheKey(1, 1), cache)


def pull_from_caller(node: Node, seed: int) -> bool:
    """Run by the listener: pulls from whoever called it (cluster 2)."""
    cache = node.blocks_cache()
    node.manager.pull_blocks(BlocksCacheKey(2, 0), cache, [5, 1], [0, 7])
    got = node.arrays[cache.cache_id][:, [0, 7]]
    return bool(np.array_equal(got, make_array((2, 8, 64), seed)[:, [5, 1]]))


def test_a_listener_pulls_over_a_link_that_its_caller_made(pair: Pair) -> None:
    pair.node.blocks_cache(seed=6, key=BlocksCacheKey(2, 0))
    assert pair.peer.call(pull_from_caller, 6)
