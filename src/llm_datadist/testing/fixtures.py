"""The types of the pytest fixtures that are called, for tests that are type-checked.

    def test_pull(llm_datadist_clusters: StartClusters) -> None: ...

The other fixtures are a `Node`, an int, or a pair of `ClusterProcess`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llm_datadist.testing.faults import FaultProxy
    from llm_datadist.testing.linked import ClusterProcess
    from llm_datadist.testing.process import ObjectProcess
    from llm_datadist.types import LLMRole

Held = TypeVar("Held")


class Spawn(Protocol):
    """`llm_datadist_spawn`: what `ObjectProcess` takes; the object is made when it returns."""

    def __call__(
        self, make: Callable[..., Held], *args: object, **kwargs: object
    ) -> ObjectProcess[Held]:
        """Starts the process. Raises what making the object raised."""
        ...


class StartClusters(Protocol):
    """`llm_datadist_clusters`: what `linked_clusters` takes."""

    def __call__(
        self,
        num_clusters: int = 2,
        *,
        roles: Sequence[LLMRole] | None = None,
        proxied: bool = False,
        **settings: object,
    ) -> list[ClusterProcess]:
        """Starts and links the clusters. Raises as `linked_clusters` does."""
        ...


class StartProxy(Protocol):
    """`llm_datadist_proxy`: what `FaultProxy` takes."""

    def __call__(self, port: int, host: str = "127.0.0.1") -> FaultProxy:
        """Starts the proxy."""
        ...
