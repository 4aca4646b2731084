"""core.generations: words in memory that peers read."""

from __future__ import annotations

import ctypes

from llm_datadist.core.generations import STALE, WORD_NBYTES, Generations

MANY = 1200  #: more than fit into one page of words


def word_at(addr: int) -> int:
    return ctypes.c_uint64.from_address(addr).value


def test_many_words_can_be_open_at_once() -> None:
    generations = Generations(1)
    opened = dict(generations.open() for _ in range(MANY))
    assert len(opened) == MANY
    assert {addr: word_at(addr) for addr in opened} == opened


def test_words_are_aligned_so_that_none_is_ever_read_in_halves() -> None:
    generations = Generations(1)
    assert all(generations.open()[0] % WORD_NBYTES == 0 for _ in range(MANY))


def test_a_closed_word_reads_as_stale() -> None:
    generations = Generations(1)
    addr, _ = generations.open()
    generations.close(addr)
    assert word_at(addr) == STALE


def test_a_word_is_used_again_with_another_generation() -> None:
    generations = Generations(1)
    former = dict(generations.open() for _ in range(MANY))
    for addr in former:
        generations.close(addr)
    again = dict(generations.open() for _ in range(MANY))
    assert again.keys() == former.keys()
    assert set(again.values()).isdisjoint(former.values())


def test_a_renewed_word_holds_another_generation_and_no_other_word_changes() -> None:
    generations = Generations(1)
    (addr, former), (other, kept) = generations.open(), generations.open()
    renewed = generations.renew(addr)
    assert renewed != former
    assert [word_at(addr), word_at(other)] == [renewed, kept]
