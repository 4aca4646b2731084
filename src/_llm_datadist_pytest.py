"""The pytest plugin of llm_datadist: its fixtures are those of `llm_datadist.testing`.

A module of its own, outside of the package, because pytest imports it in every run of every project
of the environment: the package is imported when a test asks for one of the fixtures, not before.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from llm_datadist.testing.cluster import Node
    from llm_datadist.testing.fixtures import Spawn, StartClusters, StartProxy
    from llm_datadist.testing.linked import ClusterProcess
    from llm_datadist.testing.process import ObjectProcess

P = ParamSpec("P")
T = TypeVar("T")


@pytest.fixture
def llm_datadist_spawn() -> Iterator[Spawn]:
    """`spawn(make, *args)`: an object of yours in a process of its own, an ObjectProcess."""
    from llm_datadist.testing.process import ObjectProcess

    with ExitStack() as stack:

        def spawn(make: Callable[..., T], *args: object, **kwargs: object) -> ObjectProcess[T]:
            return stack.enter_context(ObjectProcess(make, *args, **kwargs)).ready()

        yield spawn


@pytest.fixture
def llm_datadist_clusters() -> Iterator[StartClusters]:
    """`clusters(n, **settings)`: n clusters in processes of their own, every two linked."""
    from llm_datadist.testing.linked import linked_clusters

    with ExitStack() as stack:
        yield _entering(stack, linked_clusters)


@pytest.fixture
def llm_datadist_pair(
    llm_datadist_clusters: StartClusters,
) -> tuple[ClusterProcess, ClusterProcess]:
    """Prefill (cluster 1) and decode (cluster 2), linked, each in a process of its own."""
    prefill, decode = llm_datadist_clusters(2)
    return prefill, decode


@pytest.fixture
def llm_datadist_node() -> Iterator[Node]:
    """A Node in this process, not started yet; finalized after the test."""
    from llm_datadist.testing.cluster import Node

    node = Node()
    yield node
    node.stop()


@pytest.fixture
def llm_datadist_proxy() -> Iterator[StartProxy]:
    """`proxy(port)`: a FaultProxy before a listener; closed after the test."""
    from llm_datadist.testing.faults import FaultProxy

    with ExitStack() as stack:
        yield _entering(stack, FaultProxy)


@pytest.fixture
def llm_datadist_port() -> int:
    """A free port of 127.0.0.1, for programs that do not listen on port 0."""
    from llm_datadist.testing.cluster import free_port

    return free_port()


@pytest.fixture
def llm_datadist_clean() -> Iterator[None]:
    """Finalizes the LLMDataDist that the test left initialised in this process, if it did."""
    yield
    from llm_datadist import LLMDataDist

    if LLMDataDist.llm_engine_instance is not None:
        LLMDataDist.llm_engine_instance.finalize()


def _entering(stack: ExitStack, manager: Callable[P, AbstractContextManager[T]]) -> Callable[P, T]:
    """`manager`, as a function that enters what it makes; the stack leaves it."""

    def enter(*args: P.args, **kwargs: P.kwargs) -> T:
        return stack.enter_context(manager(*args, **kwargs))

    return enter
