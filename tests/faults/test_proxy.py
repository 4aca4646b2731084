"""A network that fails, between two processes: cut, stalled, half closed, slow."""

from __future__ import annotations

import select
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import proxied
import pytest
from proxied import (
    BUDGET_S,
    DST,
    FAILED,
    FILL,
    LINK_FAILED,
    MOVED_NBYTES,
    NOT_YET_LINK,
    SHAPE,
    SOON_S,
    SRC,
    SUCCESS,
    TIMEOUT,
    Ends,
    linked_ids,
    source_of,
)

from llm_datadist import BlocksCacheKey, LLMException
from llm_datadist.testing.faults import FaultProxy
from llm_datadist.testing.timing import eventually, takes_at_most

bystander_process, bystander = proxied.bystander_process, proxied.bystander
settings = proxied.settings
ends, pushing = proxied.ends, proxied.pushing
DIRECTIONS = pytest.mark.parametrize("to_caller", [True, False])


# -- cut -------------------------------------------------------------------------------------------


def nbytes_of_a_pull(ends: Ends) -> int:
    before = ends.proxy.nbytes_passed()
    assert ends.pull() == SUCCESS
    return ends.proxy.nbytes_passed() - before


@pytest.mark.parametrize("at", [1, 9, 100, MOVED_NBYTES // 2 + 7, -16, -1])
def test_a_pull_that_is_cut_at_any_byte_is_an_error_at_once(ends: Ends, at: int) -> None:
    needed = min(nbytes_of_a_pull(ends) for _ in range(3))  # one that opens a stream needs more
    assert needed > MOVED_NBYTES
    ends.proxy.cut(after_nbytes=at % needed)
    with takes_at_most(BUDGET_S):
        assert ends.pull() == NOT_YET_LINK
    assert ends.proxy.wait(SOON_S)
    assert ends.is_unlinked_at_both_ends()
    assert ends.pull(3) == SUCCESS
    assert ends.works_again()


def test_what_is_cut_while_nothing_moves_is_noticed_at_both_ends(ends: Ends) -> None:
    ends.proxy.cut()
    assert ends.proxy.num_connections == 0
    assert ends.is_unlinked_at_both_ends()
    assert ends.pull() == NOT_YET_LINK
    with takes_at_most(BUDGET_S):
        assert ends.link() in (FAILED, LINK_FAILED)
    with takes_at_most(BUDGET_S):
        assert ends.unlink() != SUCCESS
    assert ends.pull(3) == SUCCESS
    assert ends.works_again()


@pytest.mark.parametrize("at", [1, 9, 100, MOVED_NBYTES // 2 + 7])
@DIRECTIONS
def test_a_push_that_is_cut_is_an_error_at_once(pushing: Ends, at: int, to_caller: bool) -> None:
    before = pushing.proxy.nbytes_passed(to_caller=to_caller)
    assert pushing.push() == SUCCESS
    needed = pushing.proxy.nbytes_passed(to_caller=to_caller) - before
    pushing.proxy.cut(at % needed, to_caller=to_caller)
    with takes_at_most(SOON_S):
        assert pushing.push() == NOT_YET_LINK
    assert pushing.proxy.wait(SOON_S)
    pushing.proxy.restore()
    assert eventually(lambda: linked_ids(pushing.node) == [])
    assert pushing.link() == SUCCESS
    assert pushing.push() == SUCCESS


@pytest.mark.parametrize("at", [1, 9, 60, 200, -2])
@DIRECTIONS
def test_a_link_that_is_cut_while_it_is_made_is_none(ends: Ends, at: int, to_caller: bool) -> None:
    assert ends.unlink() == SUCCESS
    before = ends.proxy.nbytes_passed(to_caller=to_caller)
    assert ends.link() == SUCCESS
    needed = ends.proxy.nbytes_passed(to_caller=to_caller) - before
    assert ends.unlink() == SUCCESS
    ends.proxy.cut(at % needed, to_caller=to_caller)
    with takes_at_most(BUDGET_S):
        assert ends.link() in (FAILED, LINK_FAILED)
    assert ends.proxy.wait(SOON_S)
    assert ends.is_unlinked_at_both_ends()
    assert ends.works_again()


# -- stalled ---------------------------------------------------------------------------------------


def test_a_stalled_network_is_a_timeout_and_no_end(ends: Ends) -> None:
    ends.proxy.stall()
    with ends.destination() as pull:
        with takes_at_most(BUDGET_S):
            assert pull() == TIMEOUT
        ends.proxy.restore()
        assert ends.pull() == SUCCESS, "the same link"
    ends.proxy.stall()
    assert ends.pull(3) == SUCCESS
    with takes_at_most(BUDGET_S):
        assert ends.unlink() == TIMEOUT
    with takes_at_most(BUDGET_S):
        assert ends.unlink(force=True) == SUCCESS
    with takes_at_most(BUDGET_S):
        assert ends.link() == TIMEOUT
    assert linked_ids(ends.node) == [3]
    assert ends.works_again()


def test_nothing_arrives_after_a_pull_that_stalled_in_its_middle(ends: Ends) -> None:
    node, before = ends.node, ends.proxy.nbytes_passed()
    cache = node.blocks_cache(*SHAPE)
    array = node.arrays[cache.cache_id]
    ends.proxy.slow(MOVED_NBYTES)
    with ThreadPoolExecutor(1) as pool:
        key = BlocksCacheKey(1, 0)
        pulling = pool.submit(node.manager.pull_blocks, key, cache, SRC, DST)
        assert eventually(lambda: ends.proxy.nbytes_passed() > before + 100_000)
        ends.proxy.stall()
        with takes_at_most(BUDGET_S), pytest.raises(LLMException) as error:
            pulling.result(10)
    assert error.value.status_code == TIMEOUT
    assert not np.array_equal(array[:, DST], source_of(1)[:, SRC]), "it was in its middle"
    array[:] = FILL
    ends.proxy.restore()
    assert ends.pull() == SUCCESS
    assert (array == FILL).all()


def test_a_push_over_a_stalled_network_is_a_timeout(pushing: Ends) -> None:
    pushing.proxy.stall()
    with takes_at_most(BUDGET_S + 0.5):  # the peer's memory is fetched and compared as well
        assert pushing.push() == TIMEOUT
    pushing.proxy.restore()
    assert pushing.push() == SUCCESS


# -- half closed -----------------------------------------------------------------------------------


@DIRECTIONS
def test_a_half_closed_network_ends_links_at_both_ends(ends: Ends, to_caller: bool) -> None:
    ends.proxy.half_close(to_caller=to_caller)
    with takes_at_most(BUDGET_S):
        assert ends.pull() == NOT_YET_LINK
    assert ends.is_unlinked_at_both_ends()
    with takes_at_most(BUDGET_S):
        assert ends.link() in (FAILED, TIMEOUT)
    assert linked_ids(ends.node) == [3]
    assert ends.pull(3) == SUCCESS
    assert ends.works_again()


@DIRECTIONS
def test_a_pull_that_is_half_closed_in_their_middle(ends: Ends, to_caller: bool) -> None:
    before = ends.proxy.nbytes_passed()
    ends.proxy.slow(MOVED_NBYTES)
    with ThreadPoolExecutor(1) as pool:
        pulling = pool.submit(ends.pull)
        assert eventually(lambda: ends.proxy.nbytes_passed() > before + 100_000)
        ends.proxy.half_close(to_caller=to_caller)
        with takes_at_most(BUDGET_S):
            assert pulling.result(10) == NOT_YET_LINK
    assert ends.is_unlinked_at_both_ends()
    assert ends.works_again()


# -- slow ------------------------------------------------------------------------------------------


def test_a_network_that_is_too_slow_is_a_timeout(ends: Ends) -> None:
    ends.proxy.slow(MOVED_NBYTES / 4)
    with ends.destination() as pull:
        with takes_at_most(BUDGET_S):
            assert pull() == TIMEOUT
        with takes_at_most(SOON_S):
            assert ends.pull(3) == SUCCESS
        ends.proxy.restore()
        assert ends.pull() == SUCCESS
    ends.proxy.slow(1)
    with takes_at_most(BUDGET_S):
        assert ends.pull() == TIMEOUT
    with takes_at_most(BUDGET_S):
        assert ends.unlink() == TIMEOUT
    assert ends.unlink(force=True) == SUCCESS
    with takes_at_most(BUDGET_S):
        assert ends.link() == TIMEOUT
    assert ends.works_again()


def test_a_network_that_is_slow_enough_moves_all_bytes(ends: Ends) -> None:
    ends.proxy.slow(40 * SHAPE[0] * SHAPE[2])
    with takes_at_most(BUDGET_S):
        assert ends.pull(dst=[30, 0, 5]) == SUCCESS


def test_a_slow_network_is_shared_evenly() -> None:
    nbytes = 1 << 20
    with (
        ThreadPoolExecutor() as pool,
        socket.create_server(("127.0.0.1", 0)) as server,
        FaultProxy(server.getsockname()[1]) as proxy,
        ExitStack() as ends,
    ):
        proxy.slow(4 * nbytes)
        address = ("127.0.0.1", proxy.port)
        callers = [ends.enter_context(socket.create_connection(address)) for _ in range(3)]
        senders = [ends.enter_context(server.accept()[0]) for _ in callers]
        for sender in senders:
            pool.submit(sender.sendall, bytes(nbytes))
        arrived = dict.fromkeys(callers, 0)
        while max(arrived.values()) < nbytes:
            for caller in select.select(callers, [], [], SOON_S)[0]:
                arrived[caller] += len(caller.recv(nbytes))
        assert min(arrived.values()) > nbytes / 2


def test_a_push_over_a_network_that_is_too_slow_is_a_timeout(pushing: Ends) -> None:
    pushing.proxy.slow(MOVED_NBYTES / 4)
    with takes_at_most(BUDGET_S + 0.5):
        assert pushing.push() == TIMEOUT
    pushing.proxy.restore()
    assert eventually(lambda: pushing.push() == SUCCESS)
