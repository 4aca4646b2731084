"""Forks while a lock is held or a cluster begins, and signals that strike a child at its birth."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from typing import TYPE_CHECKING

import effort
from edges.forking import in_child
from edges.interrupting import Held
from edges.test_forks import errors_of
from edges.user import EVERY, KEY, SUCCESS, User, start_owner
from llm_datadist import LLMConfig, LLMDataDist, LLMRole, TransferWithCacheKeyConfig
from llm_datadist.cpp import LlmDataDist, LlmRole
from llm_datadist.testing.cluster import NodeProcess

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_datadist.testing.cluster import Node

CPP_OPTIONS = {"llm.DeviceId": "0"}
ANYWHERE = {**CPP_OPTIONS, "llm.listenIpInfo": "127.0.0.1:0"}


class Struck(Exception):
    """What the handler raises."""


def strike_children(node: Node, count: int) -> list[str]:
    """Each is struck by its own timer while it lets go of its parent's clusters."""
    draw, delay_s = random.Random(1), [0.0]

    def wind_up() -> None:
        signal.setitimer(signal.ITIMER_REAL, delay_s[0])

    def strike(*_: object) -> None:
        raise Struck

    os.register_at_fork(after_in_child=wind_up)  # before the library's, which comes with `init`
    sys.unraisablehook = lambda _: None
    signal.signal(signal.SIGALRM, strike)
    clusters = [LlmDataDist(100 + number, LlmRole.kMix) for number in range(20)]
    assert [cluster.Initialize(ANYWHERE) for cluster in clusters] == [0] * len(clusters)

    def kept() -> str:
        return "" if not any(cluster.listen_endpoint for cluster in clusters) else "kept"

    wrong = []
    for _ in range(count):
        delay_s[0] = draw.uniform(1e-6, 3e-4)
        said = in_child(kept)
        if said not in ("", "Struck()"):  # it may be struck behind its birth, too
            wrong.append(said)
    for cluster in clusters:
        cluster.Finalize()
    return wrong


def test_a_child_that_is_struck_at_its_birth_lets_go_all_the_same(victim: NodeProcess) -> None:
    assert victim.call(strike_children, effort.rounds(200)) == []


def blocked() -> set[int]:
    return set(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ())))


def fork_with_signals_blocked(node: Node) -> list[str]:
    """The masks of a child, of its child, and of the parent behind that."""
    node.start(LLMRole.MIX, 1)
    signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGUSR2})

    def child() -> str:
        return f"{blocked()} {in_child(lambda: str(blocked()))} {blocked()}"

    return f"{in_child(child)} {blocked()}".split(" ")


def test_parent_and_child_take_the_signals_that_they_took_before(victim: NodeProcess) -> None:
    assert victim.call(fork_with_signals_blocked) == [str({int(signal.SIGUSR2)})] * 4


def fork_while_threads_initialise(node: Node, count: int) -> list[str]:
    """What is wrong with the children, each of which initialises a cluster of its own."""
    sys.setswitchinterval(1e-6)
    alive = [LlmDataDist(100 + number, LlmRole.kMix) for number in range(40)]
    assert [cluster.Initialize(CPP_OPTIONS) for cluster in alive] == [0] * len(alive)
    is_over = threading.Event()

    def begin_and_end() -> None:
        while not is_over.is_set():
            cluster = LlmDataDist(1, LlmRole.kMix)
            cluster.Initialize(CPP_OPTIONS)
            cluster.Finalize()

    threads = [threading.Thread(target=begin_and_end, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    said = [
        in_child(lambda: str(LlmDataDist(2, LlmRole.kMix).Initialize(CPP_OPTIONS)))
        for _ in range(count)
    ]
    is_over.set()
    for cluster in alive:
        cluster.Finalize()
    return [each for each in said if each != "0"]


def test_a_child_of_a_fork_while_other_threads_initialise_can_initialise(
    victim: NodeProcess,
) -> None:
    """None of the library's locks is found taken by a thread that the child does not have."""
    victim.begin(fork_while_threads_initialise, effort.rounds(60))
    assert victim.result(120) == []


LOGGING = """
    import logging, os, threading
    from llm_datadist import LLMConfig, LLMDataDist, LLMRole

    class Forking(logging.Logger):
        "Forks, in another thread, while the library sets its logger up."
        def setLevel(self, level):
            super().setLevel(level)
            if self.name == "LLM_DATADIST":
                thread = threading.Thread(target=fork)
                thread.start()
                thread.join()

    def fork():
        children.append(os.fork())
        if not children[-1]:
            Forking.setLevel = logging.Logger.setLevel
            begin()
            os._exit(7)

    def begin():
        LLMDataDist(LLMRole.MIX, 1).init({"llm.listenIpInfo": "0.0.0.0:0"})  # it warns

    children = []
    logging.setLoggerClass(Forking)
    begin()
    print(*[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


def test_a_child_of_a_fork_while_the_logger_is_set_up_can_log() -> None:
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LOGGING)], timeout=30, capture_output=True, text=True
    )
    assert (run.stdout, run.stderr) == ("7\n", "")


def count_listening() -> int:
    """How many descriptors of this process are sockets that listen."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(name))) as copy:
                count += copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError:  # no socket
            continue
    return count


def fork_while_it_initialises(node: Node) -> list[str]:
    """What children have that are forked while the first init of their parent is under way."""
    datadist, config = LLMDataDist(LLMRole.MIX, 1), LLMConfig()
    config.enable_cache_manager = True
    config.listen_ip_info = "127.0.0.1:0"
    is_over, said = threading.Event(), []

    def look() -> str:
        return f"{count_listening()} {LLMDataDist.llm_engine_instance}"

    def fork() -> None:
        while not is_over.is_set():
            said.append(in_child(look))

    thread = threading.Thread(target=fork)
    thread.start()
    datadist.init(config.generate_options())
    is_over.set()
    thread.join()
    datadist.finalize()
    return [each for each in said if each != "0 None"]


def test_children_that_are_forked_during_the_first_init_keep_nothing() -> None:
    for _ in range(8):
        with NodeProcess() as process:
            assert process.call(fork_while_it_initialises) == []


def wait_in_child(node: Node, port: int) -> tuple[str, int]:
    """What a child is told of a transfer that runs, and of one that has ended."""
    user, layers = User(node, "tcp", port), Held()
    config = TransferWithCacheKeyConfig(KEY, range(1), range(1))
    task = node.manager.transfer_cache_async(user.source, layers, [config], EVERY, EVERY)
    calls: list[Callable[[], object]] = [task.synchronize, task.get_results]
    said = in_child(lambda: errors_of([*calls, lambda: task.synchronize(1)]))
    layers.let_go.set()
    assert task.synchronize(10_000) == SUCCESS
    assert in_child(lambda: errors_of([task.synchronize])) == f"returned {SUCCESS!r}"
    return said, len(node.datadist.links())


def test_a_child_that_waits_for_a_transfer_of_its_parent_is_told_at_once(
    peer: NodeProcess, victim: NodeProcess
) -> None:
    said, num_links = victim.call(wait_in_child, peer.call(start_owner, "tcp"))
    lines = said.splitlines()
    assert len(lines) == 3
    assert [line for line in lines if "forked" not in line] == []
    assert num_links == 1
