"""Clusters in processes of their own, linked to each other.

    with linked_clusters(2) as (prefill, decode):
        prefill.call(Node.add_blocks, seed=1, key=BlocksCacheKey(1))
        cache_id = decode.call(Node.add_blocks)
        decode.call(Node.pull_blocks, BlocksCacheKey(1), cache_id, [3, 7], [0, 5])

In pytest they are the fixtures `llm_datadist_pair` and `llm_datadist_clusters`.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.testing.cluster import Node, NodeProcess
from llm_datadist.testing.faults import FaultProxy
from llm_datadist.types import LLMRole

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class ClusterProcess(NodeProcess):
    """A process with a started cluster, that listens on a port of 127.0.0.1.

    `settings` are LLMConfig properties. The constructor does not wait: `await_port` does.
    """

    def __init__(self, role: LLMRole, cluster_id: int, **settings: object) -> None:
        super().__init__()
        self.cluster_id = cluster_id
        #: where others link to: its listener, or the proxy before that
        self.port = 0
        self._proxy: FaultProxy | None = None
        settings.setdefault("listen_ip_info", "127.0.0.1:0")
        self.begin(Node.start, role, cluster_id, **settings)

    @property
    def proxy(self) -> FaultProxy:
        """The network before its port, whose faults every link that was made to it meets."""
        if self._proxy is None:
            raise RuntimeError(
                f"cluster {self.cluster_id} has no proxy: start it with proxied=True"
            )
        return self._proxy

    def await_port(self, *, proxied: bool = False) -> None:
        """Waits until the cluster listens. Raises what starting it raised."""
        port = self.result()
        assert isinstance(port, int)
        if proxied:
            self._proxy = FaultProxy(port)
        self.port = self._proxy.port if self._proxy else port

    def kill(self) -> None:
        """SIGKILL, waited for. May be called again."""
        super().kill()
        if self._proxy is not None:
            self._proxy.close()


@contextmanager
def linked_clusters(
    num_clusters: int = 2,
    *,
    roles: Sequence[LLMRole] | None = None,
    proxied: bool = False,
    **settings: object,
) -> Iterator[list[ClusterProcess]]:
    """Clusters 1, 2, ... in a process each, every two of them linked; ended when the block is left.

    Without `roles` the first is PROMPT, the others are DECODER. `settings` are LLMConfig properties
    for all of them. With `proxied` each has a FaultProxy before its port, and the bytes go through
    it as well: `transfer_path` is "tcp".

    Raises LLMException when two cannot be linked, and what starting them raises.
    """
    if roles is None:
        roles = [LLMRole.PROMPT, *[LLMRole.DECODER] * (num_clusters - 1)]
    if proxied:
        settings.setdefault("transfer_path", "tcp")
    with ExitStack() as stack:
        clusters = [
            stack.enter_context(ClusterProcess(role, cluster_id, **settings))
            for cluster_id, role in enumerate(roles, start=1)
        ]
        for cluster in clusters:
            cluster.await_port(proxied=proxied)
        for index, caller in enumerate(clusters):
            for listener in clusters[:index]:
                _link(caller, listener)
        yield clusters


def _link(caller: ClusterProcess, listener: ClusterProcess) -> None:
    status = caller.call(Node.link, listener.port, listener.cluster_id)
    if status is not LLMStatusCode.LLM_SUCCESS:
        raise LLMException(
            f"cluster {caller.cluster_id} could not link to cluster {listener.cluster_id}: "
            f"{status}; the process's log says why",
            status_code=status,
        )
