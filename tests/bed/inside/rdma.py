"""NIXL over RDMA: the kernel's RoCE without a card (rxe), through UCX's `rc` transport."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest

from bed.inside.soft_roce import COUNTERS, UCX, make_device, remedy, set_netdev
from llm_datadist.testing.cluster import Node, NodeProcess
from llm_datadist.testing.contract import TransportContract
from llm_datadist.testing.contract_steps import (
    HUGE,
    LOST,
    OWNER,
    SHAPE,
    SUCCESS,
    Pair,
    link_anew,
    own,
    port_of,
    pull_status,
    pull_until_lost,
    settings_of,
    start,
)
from llm_datadist.types import LLMRole

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llm_datadist.errors import LLMStatusCode

NUM_LINKS = 64
LINK_TIMEOUT_MS = 50_000


@pytest.fixture(autouse=True, scope="module")
def device() -> Iterator[None]:
    """The device, and what lets UCX find it, for the processes that are started."""
    make_device()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (*UCX.items(), ("LD_LIBRARY_PATH", remedy())):
            patch.setenv(name, value)
        yield


@pytest.fixture(autouse=True)
def sent() -> Iterator[None]:
    """Every test here has the device send packets."""
    before = num_sent()
    yield
    assert num_sent() > before


def num_sent() -> int:
    return int((COUNTERS / "sent_pkts").read_text())


class TestRdma(TransportContract):
    """The contract whole, as slowly as an emulated machine is."""

    path = "nixl"
    sync_timeout_ms = 20_000
    most_idle_cpu = 1.0  # how fast anything is says nothing here

    def test_a_cut_of_the_link_is_an_error_in_time_and_no_more_when_it_is_mended(
        self, own_pair: Pair
    ) -> None:
        own_pair.owner.call(own, HUGE)
        assert own_pair.reader.call(pull_status, OWNER, HUGE) is SUCCESS
        own_pair.reader.begin(pull_until_lost, OWNER, HUGE)
        set_netdev("down")
        try:
            outcome = own_pair.reader.result()
        finally:
            set_netdev("up")
        status, worst_s = cast("tuple[LLMStatusCode, float]", outcome)
        assert status in LOST
        assert worst_s <= self.budget_s
        assert own_pair.reader.call(link_anew, own_pair.owner.call(port_of), OWNER) is SUCCESS
        assert own_pair.reader.call(pull_status, OWNER, HUGE) is SUCCESS

    def test_an_owner_that_is_started_again_on_the_same_port(self, own_pair: Pair) -> None:
        own_pair.owner.call(own, SHAPE)
        assert own_pair.reader.call(pull_status, OWNER, SHAPE) is SUCCESS
        port, settings = own_pair.owner.call(port_of), own_pair.reader.call(settings_of)
        own_pair.owner.kill()
        with NodeProcess() as successor:
            settings["listen_ip_info"] = f"127.0.0.1:{port}"
            start(successor, OWNER, **settings)
            successor.call(own, SHAPE)
            assert own_pair.reader.call(link_anew, port, OWNER) is SUCCESS
            assert own_pair.reader.call(pull_status, OWNER, SHAPE) is SUCCESS


def test_64_links() -> None:
    with NodeProcess() as owner, NodeProcess() as readers:
        port = owner.call(
            Node.start, LLMRole.MIX, OWNER, listen_ip_info="127.0.0.1:0", transfer_path="nixl",
            sync_kv_timeout=60_000,
        )  # fmt: skip
        owner.call(own, SHAPE)
        for number in range(NUM_LINKS):
            assert readers.call(add_reader, 100 + number, port) is SUCCESS
        for _ in range(2):
            assert readers.call(pull_with_all) == NUM_LINKS


_readers: list[Node] = []


def add_reader(_: Node, cluster_id: int, port: int) -> LLMStatusCode:
    node = Node()
    node.start(LLMRole.MIX, cluster_id, transfer_path="nixl", sync_kv_timeout=60_000)
    _readers.append(node)
    return node.link(port, OWNER, LINK_TIMEOUT_MS)


def pull_with_all(_: Node) -> int:
    """How many of the readers have got what the owner has."""
    return sum(pull_status(node, OWNER, SHAPE) is SUCCESS for node in _readers)
