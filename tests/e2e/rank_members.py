"""Members of rank-table links: processes, and what they run. Spec 5.8.

All members on a host with the same names meet, those of other test runs included: so names have
the job's in front of them.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from llm_datadist import (
    BlocksCacheKey,
    LLMException,
    LLMRole,
    LLMStatusCode,
    RegisterMemStatus,
)
from llm_datadist.testing.cluster import Node, NodeProcess, make_array
from llm_datadist.testing.timing import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OK, PREPARING, FAILED = RegisterMemStatus.OK, RegisterMemStatus.PREPARING, RegisterMemStatus.FAILED
NOT_LINKED = LLMStatusCode.LLM_NOT_YET_LINK
INVALID = LLMStatusCode.LLM_PARAM_INVALID
LINK_FAILED = LLMStatusCode.LLM_LINK_FAILED
TABLE = '{"server_list":[{"device":[{}]}]}'
SHAPE = (2, 8, 64)
IDS = (1, 2, 3, 4)
SOON_S = 5.0
#: the variable that names the job
JOB = "RANKS_JOB"

Members = list[NodeProcess]


@pytest.fixture(scope="module")
def job() -> Iterator[str]:
    """What names of links that are made by processes started meanwhile begin with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(JOB, secrets.token_hex(4))
        yield os.environ[JOB]


@pytest.fixture(scope="module")
def processes(job: str) -> Iterator[Members]:
    with ExitStack() as stack:
        yield [stack.enter_context(NodeProcess()) for _ in IDS]


@pytest.fixture
def members(processes: Members) -> Iterator[Members]:
    """Processes without nodes, which are stopped after the test."""
    yield processes
    for process in processes:
        process.call(Node.stop)


@pytest.fixture
def pair(members: Members) -> Members:
    """Clusters 1 and 2."""
    start_all(members[:2])
    return members[:2]


@pytest.fixture
def mortal(job: str) -> Iterator[NodeProcess]:
    """A process to be killed or stopped, of the same job."""
    with NodeProcess() as process:
        yield process


# -- run by the members ----------------------------------------------------------------------------


def start(node: Node, cluster_id: int, **settings: Any) -> None:
    role = LLMRole.PROMPT if cluster_id == 1 else LLMRole.DECODER
    node.start(role, cluster_id, **settings)
    node.blocks_cache(*SHAPE, seed=cluster_id, key=BlocksCacheKey(cluster_id, 0))


def link(node: Node, name: str = "kv", ids: tuple[int, ...] = (1, 2), table: str = TABLE) -> int:
    ranks = {each: rank for rank, each in enumerate(ids)}
    return node.datadist.link(f"{os.environ.get(JOB, '')}{name}", ranks, table)


def unlink(node: Node, comm_id: int) -> None:
    node.datadist.unlink(comm_id)


def query(node: Node, comm_id: int) -> RegisterMemStatus:
    return node.datadist.query_register_mem_status(comm_id)


def settle(node: Node, comm_id: int, within_s: float = 20.0) -> RegisterMemStatus:
    """The status once it is not PREPARING any more, or after that time."""
    end, pause = time.monotonic() + within_s, threading.Event()
    while (status := query(node, comm_id)) is PREPARING and time.monotonic() < end:
        pause.wait(0.01)
    return status


def seconds_to_settle(node: Node, comm_id: int) -> tuple[RegisterMemStatus, float]:
    begun = time.monotonic()
    return settle(node, comm_id), time.monotonic() - begun


def seconds_of_queries(node: Node, comm_id: int, count: int) -> float:
    begun = time.monotonic()
    for _ in range(count):
        assert query(node, comm_id) is PREPARING
    return time.monotonic() - begun


def pulls(node: Node, cluster_id: int, model_id: int = 0) -> bool:
    """Whether the blocks of a cluster, which a seed tells, arrive here."""
    cache = node.blocks_cache(*SHAPE)
    key = BlocksCacheKey(cluster_id, model_id)
    node.manager.pull_blocks(key, cache, [5, 1, 2], [0, 7, 3])
    expected = np.zeros(SHAPE, dtype=np.uint8)
    expected[:, [0, 7, 3]] = make_array(SHAPE, cluster_id)[:, [5, 1, 2]]
    return bool(np.array_equal(node.arrays[cache.cache_id], expected))


def register(node: Node, model_id: int, remote_accessible: bool | None = None) -> int:
    own = node.datadist.cluster_id
    key = BlocksCacheKey(own, model_id)
    return node.blocks_cache(
        *SHAPE, seed=own, key=key, remote_accessible=remote_accessible
    ).cache_id


def link_together(node: Node, name: str, at: float) -> RegisterMemStatus:
    """Links at that moment of the clock that all processes share."""
    threading.Event().wait(max(0.0, at - time.monotonic() - 0.005))
    while time.monotonic() < at:
        pass
    comm_id = link(node, name)
    status = settle(node, comm_id)
    node.datadist.unlink(comm_id)
    return status


def link_many(node: Node, count: int) -> list[RegisterMemStatus]:
    statuses: list[RegisterMemStatus] = []

    def one(name: str) -> None:
        statuses.append(settle(node, link(node, name)))

    threads = [threading.Thread(target=one, args=(f"kv{i}",)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statuses


def link_and_unlink(node: Node, rounds: int) -> list[RegisterMemStatus]:
    """Each round at once after the one before."""
    statuses = []
    for _ in range(rounds):
        comm_id = link(node)
        statuses.append(settle(node, comm_id))
        node.datadist.unlink(comm_id)
    return statuses


def status_of_link(node: Node, table: str) -> RegisterMemStatus | LLMStatusCode:
    """What becomes soon of a link to a member that is not there, if it can be called for at all."""
    try:
        comm_id = link(node, "kv", (1, 77), table)
    except LLMException as error:
        return error.status_code
    return settle(node, comm_id, SOON_S)


_logged: list[str] = []


class Recorder(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _logged.append(record.getMessage())


def record_log(node: Node, level: int = logging.ERROR) -> None:
    _logged.clear()
    logger = logging.getLogger("LLM_DATADIST")
    if not any(isinstance(handler, Recorder) for handler in logger.handlers):
        logger.addHandler(Recorder())
    logger.setLevel(level)


def logged(node: Node) -> str:
    return "\n".join(_logged)


def has_called(node: Node, cluster_id: int) -> bool:
    """Whether it soon has, and found nobody; of a member that records its log."""
    return eventually(lambda: f"calling cluster {cluster_id} at" in logged(node))


# -- run by the tests ------------------------------------------------------------------------------


def start_all(members: Members, **settings: Any) -> None:
    for cluster_id, member in enumerate(members, 1):
        member.call(start, cluster_id, **settings)


def call_all(members: Members, function: Callable[..., Any], *args: object) -> list[Any]:
    """Runs it in all at the same time; waits for all of them even when one raises."""
    results: list[Any] = []
    errors: list[Exception] = []
    for member in members:
        member.begin(function, *args)
    for member in members:
        try:
            results.append(member.result())
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return results


def link_pair(pair: Members, *args: object) -> None:
    ids = call_all(pair, link, *args)
    assert [member.call(settle, each) for member, each in zip(pair, ids, strict=True)] == [OK, OK]


def refusal(member: NodeProcess, function: Callable[..., Any], *args: object) -> LLMStatusCode:
    with pytest.raises(LLMException) as error:
        member.call(function, *args)
    return error.value.status_code
