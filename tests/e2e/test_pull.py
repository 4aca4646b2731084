"""Pulling between two processes: the right bytes, nothing else touched, every refusal."""

from __future__ import annotations

from typing import Any

import linked_pair
import numpy as np
import pytest
from linked_pair import (
    GONE,
    INVALID,
    NO_ID,
    SUCCESS,
    Pair,
    add_blocks,
    add_rows,
    status_of,
    unregister,
)

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    LLMException,
    LLMRole,
)
from llm_datadist.testing.cluster import Bytes, Node, NodeProcess, make_array

pair = linked_pair.pair


@pytest.mark.shows("cm.pull_blocks", "relies.9")
def test_pull_blocks_moves_exactly_the_named_blocks(pair: Pair) -> None:
    pair.peer.call(add_blocks, 4, 16, 100, seed=1, key=BlocksCacheKey(1, 0))
    cache = pair.node.blocks_cache(4, 10, 100, seed=2)
    src, dst = [3, 0, 15, 7, 8, 9], [9, 1, 0, 4, 5, 6]
    expected = make_array((4, 10, 100), 2)
    expected[:, dst] = make_array((4, 16, 100), 1)[:, src]
    pair.node.manager.pull_blocks(BlocksCacheKey(1, 0), cache, src, dst)
    assert np.array_equal(pair.node.arrays[cache.cache_id], expected)


@pytest.mark.shows("cm.pull_blocks")
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


@pytest.mark.shows("cm.pull_cache.layers", "pull.ranges", "pull.empty_range")
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
        assert status_of(error) == INVALID
    else:
        src, dst = moved
        expected[list(dst), 1] = make_array((6, 4, 64), 1)[list(src), 0]
        pair.node.manager.pull_blocks(BlocksCacheKey(1, 0), cache, [0], [1], **ranges)
    assert np.array_equal(pair.node.arrays[cache.cache_id], expected)


@pytest.mark.shows("cm.pull_cache.layers", "pull.ranges", "relies.9")
@pytest.mark.parametrize(
    ("num_remote", "num_local", "ranges", "moved"),
    [
        (5, 5, {}, (range(5), range(5))),
        (1, 1, {}, (range(1), range(1))),
        (2, 2, {"tensor_num_per_layer": 9}, (range(2), range(2))),
        (6, 2, {"src_layer_range": range(1, 2)}, ([2, 3], [0, 1])),
        (2, 6, {"dst_layer_range": range(1, 2)}, ([0, 1], [2, 3])),
        (2, 3, {"dst_layer_range": range(2, 3), "tensor_num_per_layer": 1}, None),
        (2, 6, {"src_layer_range": range(1)}, None),  # is to fill all of our cache
        (
            6,
            3,
            {"src_layer_range": range(1, 2), "tensor_num_per_layer": 3},
            ([3, 4, 5], [0, 1, 2]),
        ),
        (
            6,
            4,
            {"src_layer_range": range(2, 4), "dst_layer_range": range(2)},
            None,  # the peer has no layer 3
        ),
        (5, 4, {}, None),
    ],
)
def test_layer_ranges_pick_the_tensors_of_rows(
    pair: Pair,
    num_remote: int,
    num_local: int,
    ranges: dict[str, Any],
    moved: tuple[list[int], list[int]] | None,
) -> None:
    cache_id = pair.peer.call(add_rows, num_remote, 2, 64, seed=1)
    cache = pair.node.rows_cache(num_local, 2, 64)
    expected = np.zeros((num_local, 2, 64), dtype=np.uint8)
    key = CacheKeyByIdAndIndex(1, cache_id, 1)
    if moved is None:
        with pytest.raises(LLMException) as error:
            pair.node.manager.pull_cache(key, cache, **ranges)
        assert status_of(error) == INVALID
    else:
        src, dst = moved
        pair.node.manager.pull_cache(key, cache, **ranges)
        expected[list(dst), 0] = make_array((num_remote, 2, 64), 1)[list(src), 1]
    assert np.array_equal(pair.node.arrays[cache.cache_id], expected)


@pytest.mark.shows("pull.unknown_kwargs")
def test_keywords_that_nobody_knows_are_ignored(pair: Pair) -> None:
    rows_id = pair.peer.call(add_rows, 2, 4, 64, seed=1)
    pair.peer.call(add_blocks, 2, 4, 64, seed=1, key=BlocksCacheKey(1, 0))
    rows, blocks = pair.node.rows_cache(2, 4, 64), pair.node.blocks_cache(2, 4, 64)
    unknown: dict[str, Any] = {"src_cache_offset": 8, "dst_cache_offset": "8", "nonsense": object()}
    pair.node.manager.pull_cache(CacheKeyByIdAndIndex(1, rows_id, 3), rows, 3, **unknown)
    pair.node.manager.pull_blocks(BlocksCacheKey(1, 0), blocks, [3], [3], **unknown)
    expected = np.zeros((2, 4, 64), dtype=np.uint8)
    expected[:, 3] = make_array((2, 4, 64), 1)[:, 3]
    assert np.array_equal(pair.node.arrays[rows.cache_id], expected)
    assert np.array_equal(pair.node.arrays[blocks.cache_id], expected)


@pytest.mark.shows("pull.empty_range")
def test_an_empty_range_is_as_none(pair: Pair) -> None:
    cache_id = pair.peer.call(add_rows, 3, 1, 64, seed=1)
    cache = pair.node.rows_cache(3, 1, 64)
    ranges: dict[str, Any] = {"src_layer_range": range(0), "dst_layer_range": range(7, 7)}
    pair.node.manager.pull_cache(CacheKeyByIdAndIndex(1, cache_id), cache, **ranges)
    assert np.array_equal(pair.node.arrays[cache.cache_id], make_array((3, 1, 64), 1))


@pytest.mark.shows("cm.pull_blocks.continuous", "O11", "O9")
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


@pytest.mark.shows("cm.pull_blocks.continuous", "O11")
@pytest.mark.parametrize("num_blocks", [1, 3, 4, 5])
def test_no_more_blocks_are_filled_than_the_row_has_bytes_for(pair: Pair, num_blocks: int) -> None:
    """Row 1 of three of 28 bytes into blocks of 8: three, and half of a fourth."""
    cache_id = pair.peer.call(add_rows, 2, 3, 28, seed=1)
    cache = pair.node.blocks_cache(2, 8, 8, seed=2)
    key, blocks = CacheKeyByIdAndIndex(1, cache_id, 1), [6, 5, 1, 0, 3][:num_blocks]
    expected = make_array((2, 8, 8), 2)
    if num_blocks == 5:
        with pytest.raises(LLMException, match="than a row of 28 bytes fills") as error:
            pair.node.manager.pull_blocks(key, cache, (), blocks)
        assert status_of(error) == INVALID
    else:
        pair.node.manager.pull_blocks(key, cache, (), blocks)
        row = make_array((2, 3, 28), 1)[:, 1]
        for chunk, block in enumerate(blocks):
            part = row[:, 8 * chunk : 8 * chunk + 8]
            expected[:, block, : part.shape[1]] = part
    assert np.array_equal(pair.node.arrays[cache.cache_id], expected)


@pytest.mark.shows("cm.pull_blocks.continuous")
def test_a_block_larger_than_the_row_is_refused(pair: Pair) -> None:
    cache_id = pair.peer.call(add_rows, 2, 3, 28, seed=1)
    cache = pair.node.blocks_cache(2, 8, 29)
    with pytest.raises(LLMException, match="larger than the source's rows") as error:
        pair.node.manager.pull_blocks(CacheKeyByIdAndIndex(1, cache_id), cache, (), [0])
    assert status_of(error) == INVALID
    assert not pair.node.arrays[cache.cache_id].any()


@pytest.mark.shows("O32")
@pytest.mark.parametrize(
    "key", [CacheKey(1, 77), CacheKey(1, NO_ID, prefix_id=5), CacheKey(1, 77, 3)], ids=str
)
def test_a_key_names_the_row_that_fills_blocks(pair: Pair, key: CacheKey) -> None:
    pair.peer.call(add_rows, 2, 4, 64, seed=1, keys=[CacheKey(1, 1), CacheKey(1, 2), key])
    cache = pair.node.blocks_cache(2, 4, 32)
    pair.node.manager.pull_blocks(key, cache, (), [3, 1])
    expected = np.zeros((2, 4, 32), dtype=np.uint8)
    row = make_array((2, 4, 64), 1)[:, 2]
    expected[:, 3], expected[:, 1] = row[:, :32], row[:, 32:]
    assert np.array_equal(pair.node.arrays[cache.cache_id], expected)


@pytest.mark.shows("O16")
def test_two_caches_under_one_key_give_each_its_own_bytes_by_id(pair: Pair) -> None:
    """The key is on row 0 of the one and on row 2 of the other."""
    key, other = CacheKey(1, 7), CacheKey(1, 8)
    first = pair.peer.call(add_rows, 2, 4, 64, seed=1, keys=[key])
    second = pair.peer.call(add_rows, 2, 4, 64, seed=2, keys=[other, CacheKey(1, 9), key])
    cache = pair.node.rows_cache(2, 1, 64)
    for cache_id, seed in ((first, 1), (second, 2)):
        for row in range(4):
            pair.node.manager.pull_cache(CacheKeyByIdAndIndex(1, cache_id, row), cache)
            expected = make_array((2, 4, 64), seed)[:, row]
            assert np.array_equal(pair.node.arrays[cache.cache_id][:, 0], expected)


@pytest.mark.shows("cm.pull_cache", "pull.size", "O9")
@pytest.mark.parametrize(("size", "moved"), [(-1, 100), (100, 100), (37, 37)])
def test_pull_cache_moves_a_row_from_its_beginning(pair: Pair, size: int, moved: int) -> None:
    cache_id = pair.peer.call(add_rows, 3, 4, 256, seed=1)
    cache = pair.node.rows_cache(3, 2, 100, seed=2)
    pair.node.manager.pull_cache(CacheKeyByIdAndIndex(1, cache_id, 3), cache, 1, size)
    expected = make_array((3, 2, 100), 2)
    expected[:, 1, :moved] = make_array((3, 4, 256), 1)[:, 3, :moved]
    assert np.array_equal(pair.node.arrays[cache.cache_id], expected)


@pytest.mark.shows("cm.pull_cache")
@pytest.mark.parametrize(
    "key", [CacheKey(1, 77), CacheKey(1, NO_ID, prefix_id=5), CacheKey(1, 77, 3)], ids=str
)
def test_a_key_names_its_row(node: Node, peer: NodeProcess, path: str, key: CacheKey) -> None:
    settings = {"listen_ip_info": "127.0.0.1:0", "transfer_path": path}
    port = peer.call(Node.start, LLMRole.PROMPT, 1, **settings)
    node.start(LLMRole.DECODER, 2, transfer_path=path)
    assert node.link(port, 1) == SUCCESS
    placeholder = CacheKey(1, NO_ID)
    peer.call(add_rows, 2, 4, 64, seed=1, keys=[placeholder, placeholder, key])
    cache = node.rows_cache(2, 1, 64)
    for _ in range(2):  # the key of a registered cache is not used up
        node.arrays[cache.cache_id][:] = 0
        node.manager.pull_cache(key, cache)
        assert np.array_equal(node.arrays[cache.cache_id][:, 0], make_array((2, 4, 64), 1)[:, 2])


@pytest.mark.shows("O21", "relies.14")
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


@pytest.mark.shows("error.47")
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
    assert status_of(error) == GONE
    with pytest.raises(LLMException) as error:
        pair.node.manager.pull_cache(CacheKeyByIdAndIndex(1, rows_id), rows)
    assert status_of(error) == GONE


@pytest.mark.shows("O15", "error.47")
@pytest.mark.parametrize("cache_id", [-1, 0, 99, 2**62])
def test_an_id_that_was_never_given_out_names_nothing(pair: Pair, cache_id: int) -> None:
    pair.peer.call(add_blocks, key=BlocksCacheKey(1, 0))
    pair.peer.call(add_rows, 2, 4, 64, keys=[CacheKey(1, 0)])
    key = CacheKeyByIdAndIndex(1, cache_id)
    with pytest.raises(LLMException) as error:
        pair.node.manager.pull_cache(key, pair.node.rows_cache(1, 1, 16))
    assert status_of(error) == GONE
    with pytest.raises(LLMException) as error:
        pair.node.manager.pull_blocks(key, pair.node.blocks_cache(2, 2, 64), (), [0])
    assert status_of(error) == GONE


@pytest.mark.shows("O9", "error.47")
def test_a_row_that_is_not_there_does_not_exist(pair: Pair) -> None:
    cache_id = pair.peer.call(add_rows, 2, 4, 256)
    key = CacheKeyByIdAndIndex(1, cache_id, 4)
    with pytest.raises(LLMException, match="no row 4") as error:
        pair.node.manager.pull_cache(key, pair.node.rows_cache())
    assert status_of(error) == GONE
    with pytest.raises(LLMException, match="no row 4") as error:
        pair.node.manager.pull_blocks(key, pair.node.blocks_cache(), (), [0])
    assert status_of(error) == GONE


@pytest.mark.shows("pull.block_lists", "O12", "error.48", "error.53")
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
    assert status_of(error) == INVALID
    assert np.array_equal(pair.node.arrays[cache.cache_id], make_array(mine, 2))


@pytest.mark.shows("pull.size", "error.48")
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
    assert status_of(error) == INVALID
    assert not pair.node.arrays[cache.cache_id].any()


@pytest.mark.shows("O10", "error.48")
def test_a_blocks_cache_is_not_pulled_by_rows_nor_the_other_way_round(pair: Pair) -> None:
    blocks_id = pair.peer.call(add_blocks, key=BlocksCacheKey(1, 0))
    key = CacheKeyByIdAndIndex(1, blocks_id)
    with pytest.raises(LLMException, match="blocks cache") as error:
        pair.node.manager.pull_cache(key, pair.node.rows_cache(2, 1, 64))
    assert status_of(error) == INVALID
    with pytest.raises(LLMException, match="blocks cache") as error:
        pair.node.manager.pull_blocks(key, pair.node.blocks_cache(), (), [0])
    assert status_of(error) == INVALID


@pytest.mark.shows("error.50")
def test_memory_that_is_not_remote_accessible_is_refused(pair: Pair) -> None:
    pair.peer.call(add_blocks, key=BlocksCacheKey(1, 0), remote_accessible=False)
    with pytest.raises(LLMException, match="remote_accessible=True") as error:
        pair.node.manager.pull_blocks(BlocksCacheKey(1, 0), pair.node.blocks_cache(), [0], [0])
    assert status_of(error) == INVALID
    rows_id = pair.peer.call(add_rows, 2, 4, 64, remote_accessible=False)
    with pytest.raises(LLMException, match="remote_accessible=True") as error:
        pair.node.manager.pull_cache(
            CacheKeyByIdAndIndex(1, rows_id), pair.node.rows_cache(2, 4, 64)
        )
    assert status_of(error) == INVALID


@pytest.mark.shows("error.50")
def test_with_remote_access_our_own_cache_must_be_accessible_too(pair: Pair) -> None:
    pair.peer.call(add_blocks, seed=1, key=BlocksCacheKey(1, 0))
    cache = pair.node.blocks_cache(remote_accessible=False)
    if pair.is_accessible:
        with pytest.raises(LLMException, match="our cache 1 is not remote accessible") as error:
            pair.node.manager.pull_blocks(BlocksCacheKey(1, 0), cache, [0], [0])
        assert status_of(error) == INVALID
        assert not pair.node.arrays[cache.cache_id].any()
    else:
        pair.node.manager.pull_blocks(BlocksCacheKey(1, 0), cache, [0], [0])
        expected = make_array((2, 8, 64), 1)[:, 0]
        assert np.array_equal(pair.node.arrays[cache.cache_id][:, 0], expected)


def register_unmapped(node: Node) -> int:
    """A blocks cache at addresses that no program has."""
    desc = CacheDesc(1, [4, 64], DataType.DT_INT8)
    return node.manager.register_blocks_cache(desc, [0x1000], BlocksCacheKey(1, 9)).cache_id


def test_unmapped_memory_is_refused_by_address_and_the_link_goes_on(pair: Pair) -> None:
    pair.peer.call(register_unmapped)
    cache = pair.node.blocks_cache(1, 4, 64)
    with pytest.raises(LLMException, match=r"remote address 0x1040.*not mapped") as error:
        pair.node.manager.pull_blocks(BlocksCacheKey(1, 9), cache, [1], [1])
    assert status_of(error) == INVALID
    pair.peer.call(add_blocks, 1, 4, 64, seed=1, key=BlocksCacheKey(1, 0))
    register_unmapped(pair.node)
    unmapped = pair.node.manager.register_blocks_cache(cache.cache_desc, [0x1000])
    with pytest.raises(LLMException, match=r"local address.*not mapped") as error:
        pair.node.manager.pull_blocks(BlocksCacheKey(1, 0), unmapped, [1], [1])
    assert status_of(error) == INVALID
    pair.node.manager.pull_blocks(BlocksCacheKey(1, 0), cache, [2], [3])
    expected = make_array((1, 4, 64), 1)[:, 2]
    assert np.array_equal(pair.node.arrays[cache.cache_id][:, 3], expected)


@pytest.mark.shows("error.40")
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
