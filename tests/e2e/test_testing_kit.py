"""The testing kit without pytest: objects in processes of their own, linked clusters.

Proxied clusters, and the fixtures, are shown by the code of docs/testing.md.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from llm_datadist import CacheKeyByIdAndIndex, LLMException
from llm_datadist.testing.assertions import assert_cache_equal
from llm_datadist.testing.cluster import Node, free_port
from llm_datadist.testing.linked import linked_clusters
from llm_datadist.testing.process import ObjectProcess

if TYPE_CHECKING:
    from collections.abc import Iterator


class Counter:
    """An object of the user's."""

    def __init__(self, value: int) -> None:
        if value < 0:
            raise ValueError(f"{value} is negative")
        self.value = value

    def add(self, value: int, *, times: int = 1) -> int:
        self.value += value * times
        return self.value

    def end(self, code: int) -> None:
        os._exit(code)


@pytest.fixture
def counter() -> Iterator[ObjectProcess[Counter]]:
    with ObjectProcess(Counter, 5) as process:
        yield process


def test_an_object_keeps_its_state_between_calls(counter: ObjectProcess[Counter]) -> None:
    assert counter.call(Counter.add, 2) == 7
    assert counter.call(Counter.add, 2, times=3) == 13
    assert counter.call(pid_of) == counter.pid != os.getpid()


def test_a_process_that_ends_says_with_which_code(counter: ObjectProcess[Counter]) -> None:
    for _ in range(2):
        with pytest.raises(EOFError, match=f"process {counter.pid} ended with exit code 3"):
            counter.call(Counter.end, 3)


def test_an_object_that_takes_too_long_is_a_timeout(counter: ObjectProcess[Counter]) -> None:
    counter.ready()
    counter.pause()
    counter.begin(Counter.add, 1)
    with pytest.raises(TimeoutError, match=r"did not answer within 0\.01 s"):
        counter.result(0.01)
    counter.resume()
    assert counter.result() == 6


def test_an_object_that_cannot_be_made_says_why() -> None:
    with (
        ObjectProcess(Counter, -1) as process,
        pytest.raises(ValueError, match="-1 is negative"),
    ):
        process.ready()


def test_three_clusters_are_linked_and_end_with_the_block() -> None:
    with linked_clusters(3, enable_remote_cache_accessible=True) as clusters:
        linked = {cluster.cluster_id: cluster.call(linked_ids) for cluster in clusters}
        pids = [cluster.pid for cluster in clusters]
        owner, _, puller = clusters
        source, target = owner.call(Node.add_rows, seed=1), puller.call(Node.add_rows)
        puller.call(Node.pull_cache, CacheKeyByIdAndIndex(1, source, 3), target, 0)
        sent, came = owner.call(Node.array_of, source), puller.call(Node.array_of, target)
        with pytest.raises(RuntimeError, match="cluster 1 has no proxy"):
            _ = clusters[0].proxy
    assert_cache_equal(came, sent[:, [3]], blocks=[0])
    assert linked == {1: [2, 3], 2: [1, 3], 3: [1, 2]}
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def test_clusters_that_cannot_start_say_why() -> None:
    with (
        pytest.raises(LLMException, match=r"cannot listen on .* another process has it"),
        linked_clusters(listen_ip_info=f"127.0.0.1:{free_port()}"),
    ):
        pass


# -- run by the processes --


def pid_of(_: Counter) -> int:
    return os.getpid()


def linked_ids(node: Node) -> list[int]:
    return sorted(link.cluster_id for link in node.datadist.links())
