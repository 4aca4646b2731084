"""The free list of block numbers."""

from __future__ import annotations

import pytest

from llm_datadist.cli.demo.blocks import BlockPool


def test_no_block_is_handed_out_twice() -> None:
    pool = BlockPool(10, seed=1)
    blocks = pool.allocate(4) + pool.allocate(6)
    assert sorted(blocks) == list(range(10))


def test_blocks_are_scattered_from_the_start() -> None:
    assert BlockPool(64, seed=1).allocate(64) != list(range(64))


def test_two_seeds_give_different_numbers() -> None:
    assert BlockPool(64, seed=1).allocate(8) != BlockPool(64, seed=2).allocate(8)


def test_blocks_that_were_given_back_are_handed_out_again() -> None:
    pool = BlockPool(4, seed=1)
    blocks = pool.allocate(3)
    assert not pool.can_allocate(3)
    pool.free(blocks)
    assert pool.can_allocate(4)
    assert sorted(pool.allocate(4)) == [0, 1, 2, 3]


def test_more_than_there_is_cannot_be_allocated() -> None:
    pool = BlockPool(4, seed=1)
    with pytest.raises(ValueError, match="5 blocks asked for, 4 are free"):
        pool.allocate(5)
    assert pool.can_allocate(4)
