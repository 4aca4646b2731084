"""The testing kit without pytest: objects in processes of their own, linked clusters.

Proxied clusters, and the fixtures, are shown by the code of docs/testing.md.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from llm_datadist import CacheKeyByIdAndIndex, LLMException
from llm_datadist.testing.assertions import assert_cache_equal
from llm_datadist.testing.cluster import Node, free_port
from llm_datadist.testing.linked import linked_clusters
from llm_datadist.testing.process import ObjectProcess, wait_any

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

    def up_to(self, last: int) -> Iterator[int]:
        while self.value < last:
            self.value += 1
            yield self.value
        if last < 0:
            raise ValueError(f"{last} is negative")

    def for_ever(self) -> Iterator[int]:
        while True:
            yield self.add(1)


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


def test_the_values_of_a_stream_come_while_it_runs(counter: ObjectProcess[Counter]) -> None:
    assert list(islice(counter.stream(Counter.for_ever), 3)) == [6, 7, 8]


def test_a_stream_ends_as_its_generator_does(counter: ObjectProcess[Counter]) -> None:
    assert list(counter.stream(Counter.up_to, last=8)) == [6, 7, 8]
    with pytest.raises(ValueError, match="-1 is negative"):
        next(counter.stream(Counter.up_to, -1))
    assert counter.call(Counter.add, 1) == 9


def test_what_is_left_of_a_stream_is_not_the_next_calls(counter: ObjectProcess[Counter]) -> None:
    assert next(counter.stream(Counter.up_to, 50)) == 6
    assert next(counter.stream(Counter.up_to, 100)) == 51
    assert counter.call(Counter.add, 1) == 101


def test_a_stream_without_an_end_lets_no_other_call_in(counter: ObjectProcess[Counter]) -> None:
    assert next(counter.stream(Counter.for_ever)) == 6
    counter.begin(Counter.add, 1)
    with pytest.raises(TimeoutError, match=r"did not answer within 0\.05 s"):
        counter.result(0.05)


def test_a_stream_whose_process_dies_is_at_its_end(counter: ObjectProcess[Counter]) -> None:
    values = counter.stream(Counter.for_ever)
    assert next(values) == 6
    assert counter.exit_code is None
    os.kill(counter.pid, signal.SIGKILL)
    with pytest.raises(EOFError, match="ended with exit code -9"):
        sum(values)
    assert counter.exit_code == -signal.SIGKILL


def test_who_answers_first_is_known(counter: ObjectProcess[Counter]) -> None:
    with ObjectProcess(Counter, 1) as other:
        counter.ready().pause()
        counter.begin(Counter.add, 1)
        other.ready().begin(Counter.add, 1)
        assert wait_any([counter, other]) == [other]
        assert other.result() == 2
        with pytest.raises(TimeoutError, match=r"answered within 0\.01 s"):
            wait_any([counter, other], 0.01)
        counter.resume()
        assert wait_any([counter, other]) == [counter]
        assert counter.result() == 6


def test_a_ctrl_c_is_for_the_test_alone(counter: ObjectProcess[Counter]) -> None:
    os.kill(counter.pid, signal.SIGINT)  # while it starts
    assert counter.call(Counter.add, 1) == 6
    os.kill(counter.pid, signal.SIGINT)
    assert counter.call(Counter.add, 1) == 7


def test_any_thread_can_start_a_process() -> None:
    with ThreadPoolExecutor(1) as threads:
        process = threads.submit(ObjectProcess, Counter, 5).result()
    with process:
        os.kill(process.pid, signal.SIGINT)
        assert process.call(Counter.add, 1) == 6


def test_a_process_whose_test_is_gone_ends_in_silence() -> None:
    program = (
        "import itertools, os; from llm_datadist.testing.process import ObjectProcess; "
        "values = ObjectProcess(itertools.count, 1).stream(iter); print(next(values), flush=True); "
        "os.kill(os.getpid(), 9)"
    )
    # both have the same output: its end is the end of both
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGKILL, "1\n", "")


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


# -- ports -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4])
def test_free_ports_in_a_row_are_free_and_connections_take_none(count: int) -> None:
    limits = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    for _ in range(50):
        first = free_port(count)
        with ExitStack() as servers:
            for port in range(first, first + count):
                assert port not in range(int(limits[0]), int(limits[1]) + 1)
                servers.enter_context(socket.create_server(("127.0.0.1", port)))
            assert free_port(count) not in range(first - count + 1, first + count)


def test_so_many_free_ports_in_a_row_are_not_found() -> None:
    with pytest.raises(OSError, match="in a row were not found"):
        free_port(20_000)
