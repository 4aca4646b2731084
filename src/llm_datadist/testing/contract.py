"""What every transport must keep, as tests that run on any: ours, and those of other packages.

    from llm_datadist.testing.contract import TransportContract

    class TestMine(TransportContract):
        path = "mine"

pytest then runs the contract between real processes over that path, in both modes of the library
and for both placements of caches. The guide Transports says in words what is promised.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np
import pytest

from llm_datadist.errors import LLMStatusCode
from llm_datadist.testing.cluster import Node, NodeProcess, make_array
from llm_datadist.testing.contract_steps import (
    HUGE,
    LOST,
    OWNER,
    READER,
    SHAPE,
    SUCCESS,
    Pair,
    Shape,
    cpu_share_of_doing_nothing,
    disown,
    hand_over,
    link_anew,
    linked,
    own,
    port_of,
    pull_and_keep,
    pull_blocks,
    pull_in_threads,
    pull_status,
    pull_until_lost,
    push_blocks,
    settings_of,
    start,
    stays_as_it_is,
    unlink_link_pull_count,
)
from llm_datadist.testing.timing import takes_at_most
from llm_datadist.types import Placement

if TYPE_CHECKING:
    from collections.abc import Iterator


class TransportContract:
    """The contract of a transport. Subclass it and name the path."""

    #: the name of the transport
    path: ClassVar[str]
    #: the largest share of one CPU that an idle end may take; ours take none
    most_idle_cpu: ClassVar[float] = 0.005
    #: how long a transfer may take; more on a machine that is slow beyond measure
    sync_timeout_ms: ClassVar[int] = 1_500

    @property
    def budget_s(self) -> float:
        """What ends in time: a fifth over the timeout, and what a busy machine needs to schedule.

        That is for a few processes.
        """
        return 1.2 * self.sync_timeout_ms / 1000 + 0.3

    @pytest.fixture(params=[True, False], ids=["remote-accessible", "two-sided"])
    def is_accessible(self, request: pytest.FixtureRequest) -> bool:
        return bool(request.param)

    @pytest.fixture(params=[Placement.DEVICE, Placement.HOST], ids=lambda each: each.name)
    def placement(self, request: pytest.FixtureRequest) -> Placement:
        return Placement(request.param)

    @pytest.fixture(scope="class")
    @classmethod
    def processes(cls) -> Iterator[Pair]:
        """Two processes for all tests that do not harm them."""
        with NodeProcess() as owner, NodeProcess() as reader:
            yield Pair(owner, reader)

    @pytest.fixture
    def pair(self, processes: Pair, is_accessible: bool) -> Iterator[Pair]:
        yield self._linked(*processes, is_accessible=is_accessible)
        for process in processes:
            process.call(Node.stop)

    @pytest.fixture
    def own_pair(self, is_accessible: bool) -> Iterator[Pair]:
        """Two processes that a test may kill."""
        with NodeProcess() as owner, NodeProcess() as reader:
            yield self._linked(owner, reader, is_accessible=is_accessible)

    def _linked(self, owner: NodeProcess, reader: NodeProcess, *, is_accessible: bool) -> Pair:
        settings: dict[str, object] = {
            "transfer_path": self.path,
            "enable_remote_cache_accessible": is_accessible,
            "sync_kv_timeout": self.sync_timeout_ms,
        }
        return linked(owner, reader, **settings)

    def test_blocks_go_where_they_belong_and_nothing_else_changes(
        self, pair: Pair, placement: Placement
    ) -> None:
        pair.owner.call(own, SHAPE, placement)
        src, dst = [3, 9, 4, 15, 0], [1, 0, 15, 7, 8]
        got = pair.reader.call(pull_blocks, OWNER, SHAPE, src, dst, placement)
        expected = np.zeros(SHAPE, np.uint8)
        expected[:, dst] = make_array(SHAPE, OWNER)[:, src]
        np.testing.assert_array_equal(got, expected)

    @pytest.mark.parametrize(
        "shape",
        [(1, 1, 1), (2, 3000, 24), (1, 2, 35 << 20)],
        ids=["one byte", "6,000 segments", "70 MiB"],
    )
    def test_sizes(self, pair: Pair, shape: Shape) -> None:
        pair.owner.call(own, shape)
        assert pair.reader.call(pull_status, OWNER, shape) is SUCCESS

    def test_both_ends_pull(self, pair: Pair) -> None:
        blocks = list(range(SHAPE[1]))
        for process in pair:
            process.call(own, SHAPE)
        for process, other in ((pair.reader, OWNER), (pair.owner, READER)):
            got = process.call(pull_blocks, other, SHAPE, blocks, blocks)
            np.testing.assert_array_equal(got, make_array(SHAPE, other))

    @pytest.mark.parametrize("is_accessible", [True], ids=["remote-accessible"])
    def test_both_ends_push(self, pair: Pair) -> None:
        for process in pair:
            process.call(own, SHAPE)
        src, dst = [2, 5], [5, 11]
        for process, other, number in (
            (pair.reader, pair.owner, OWNER),
            (pair.owner, pair.reader, READER),
        ):
            landing = other.call(own, SHAPE, seed=None, model_id=7)
            process.call(push_blocks, number, src, dst)
            expected = np.zeros(SHAPE, np.uint8)
            expected[:, dst] = make_array(SHAPE, OWNER + READER - number)[:, src]
            np.testing.assert_array_equal(other.call(Node.array_of, landing), expected)

    def test_threads_share_a_link(self, pair: Pair) -> None:
        pair.owner.call(own, SHAPE)
        assert pair.reader.call(pull_in_threads, SHAPE) == [True] * 8

    def test_what_is_registered_after_the_link_was_made(self, pair: Pair) -> None:
        blocks = list(range(SHAPE[1]))
        for seed in (5, 6):
            cache_id = pair.owner.call(own, SHAPE, seed=seed)
            got = pair.reader.call(pull_blocks, OWNER, SHAPE, blocks, blocks)
            np.testing.assert_array_equal(got, make_array(SHAPE, seed))
            pair.owner.call(disown, cache_id)
            status = pair.reader.call(pull_status, OWNER, SHAPE)
            assert status is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST

    def test_memory_that_changed_hands_is_not_read_under_its_old_name(self, pair: Pair) -> None:
        blocks = list(range(SHAPE[1]))
        first = pair.owner.call(own, SHAPE)
        pair.reader.call(pull_blocks, OWNER, SHAPE, blocks, blocks)
        pair.owner.call(hand_over, first, 9)
        status = pair.reader.call(pull_status, OWNER, SHAPE)
        assert status is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
        got = pair.reader.call(pull_blocks, OWNER, SHAPE, blocks, blocks, model_id=9)
        np.testing.assert_array_equal(got, make_array(SHAPE, 9))

    def test_an_owner_that_stands_still_is_late_for_good(self, own_pair: Pair) -> None:
        """In time an error, after which nothing arrives; or all bytes, if it need not do a thing.

        Whether the owner can be linked to again, is not asked here: some do not survive.
        """
        own_pair.owner.call(own, HUGE)
        assert own_pair.reader.call(pull_status, OWNER, HUGE) is SUCCESS
        own_pair.owner.pause()
        with takes_at_most(self.budget_s + 0.5):  # which the check of the bytes may take
            status = own_pair.reader.call(pull_and_keep, OWNER, HUGE)
        assert status in (SUCCESS, *LOST)
        own_pair.owner.resume()
        assert own_pair.reader.call(stays_as_it_is, 1.0)

    def test_an_owner_that_is_killed_and_its_successor(self, own_pair: Pair) -> None:
        own_pair.owner.call(own, HUGE)
        assert own_pair.reader.call(pull_status, OWNER, HUGE) is SUCCESS
        own_pair.reader.begin(pull_until_lost, OWNER, HUGE)
        own_pair.owner.kill()
        with takes_at_most(2 * self.budget_s):
            status, worst_s = cast("tuple[LLMStatusCode, float]", own_pair.reader.result())
        assert status in LOST
        assert worst_s <= self.budget_s
        with NodeProcess() as successor:
            settings = own_pair.reader.call(settings_of)
            port = start(successor, OWNER, **settings)
            successor.call(own, SHAPE)
            assert own_pair.reader.call(link_anew, port, OWNER) is SUCCESS
            assert own_pair.reader.call(pull_status, OWNER, SHAPE) is SUCCESS

    def test_a_reader_that_is_killed_leaves_the_owner_to_others(self, own_pair: Pair) -> None:
        own_pair.owner.call(own, HUGE)
        assert own_pair.reader.call(pull_status, OWNER, HUGE) is SUCCESS
        own_pair.reader.begin(pull_until_lost, OWNER, HUGE)
        settings = own_pair.owner.call(settings_of)
        own_pair.reader.kill()
        with NodeProcess() as other:
            start(other, 3, **settings)
            assert other.call(link_anew, own_pair.owner.call(port_of), OWNER) is SUCCESS
            assert other.call(pull_status, OWNER, HUGE) is SUCCESS

    def test_linking_again_and_again_leaves_nothing_behind(self, pair: Pair) -> None:
        pair.owner.call(own, SHAPE)
        port = pair.owner.call(port_of)
        counts = [pair.reader.call(unlink_link_pull_count, port) for _ in range(6)]
        assert counts[-1] <= counts[1], counts

    @pytest.mark.slow
    @pytest.mark.parametrize("is_accessible", [True], ids=["remote-accessible"])
    def test_an_idle_link_takes_no_cpu(self, pair: Pair) -> None:
        pair.owner.call(own, SHAPE)
        assert pair.reader.call(pull_status, OWNER, SHAPE) is SUCCESS
        for process in pair:
            process.begin(cpu_share_of_doing_nothing, 3.0)
        for process in pair:
            share = cast("float", process.result())
            assert share <= self.most_idle_cpu, f"an idle end takes {share:.1%} of a CPU"
