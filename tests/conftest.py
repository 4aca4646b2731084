"""Fixtures: a node in this process, and processes with nodes to link it to."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from zlib import crc32

import hypothesis
import pytest

import effort
from llm_datadist.testing.cluster import Node, NodeProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

# A busy machine is no fault: nothing here is timed but by tests that say so.
hypothesis.settings.register_profile(
    "busy",
    deadline=None,
    max_examples=effort.rounds(250),
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("busy")

MODES = [
    pytest.param(False, id="two-sided"),
    pytest.param(True, id="remote-accessible"),
]
#: TEST_PATHS=nixl runs the same tests over another path, by hand: most build a pair for each
PATHS = os.environ.get("TEST_PATHS", "cma tcp").split()
#: what is tried at their edges, and under faults, takes most of the time
_BY_ONE_PATH = {"edges", "faults"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`make test` takes each of them over one of both paths, which its name chooses."""
    for item in items:
        if isinstance(item, pytest.Function) and item.path.parent.name in _BY_ONE_PATH:
            left_out = ("cma", "tcp")[crc32(item.originalname.encode()) % 2]
            if hasattr(item, "callspec") and item.callspec.params.get("path") == left_out:
                item.add_marker(pytest.mark.long)


class SharedProcess:
    """One process for all tests that do not harm it; another one when a test did."""

    def __init__(self) -> None:
        self._process: NodeProcess | None = None

    def get(self) -> NodeProcess:
        if self._process is None:
            self._process = NodeProcess()
        return self._process

    def replace(self) -> None:
        if self._process is not None:
            self._process.kill()
        self._process = None


@pytest.fixture(scope="session")
def shared_process() -> Iterator[SharedProcess]:
    shared = SharedProcess()
    yield shared
    shared.replace()


@pytest.fixture
def peer(shared_process: SharedProcess) -> Iterator[NodeProcess]:
    """A process whose node is stopped after the test."""
    process = shared_process.get()
    yield process
    try:
        process.call(Node.stop)
    except BaseException:
        shared_process.replace()
        raise


@pytest.fixture
def victim() -> Iterator[NodeProcess]:
    """A process of the test's own, to be killed or stopped."""
    with NodeProcess() as process:
        yield process


@pytest.fixture
def node() -> Iterator[Node]:
    """A node in this process."""
    node = Node()
    yield node
    node.stop()


@pytest.fixture(params=MODES)
def is_accessible(request: pytest.FixtureRequest) -> bool:
    """Both modes: two-sided and remote-accessible."""
    return bool(request.param)


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    """Both paths that every machine has."""
    return str(request.param)
