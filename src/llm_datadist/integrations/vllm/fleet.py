"""A worker in a directory: it is announced there, and finds those of other engines by who they are.

The follower links to nobody: whether a link is wanted, and to whom it leads, is `linking.py`'s to
know. It ends the links of those that have left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llm_datadist import LLMDataDist
    from llm_datadist.endpoint import Endpoint
    from llm_datadist.integrations.vllm.handover import Source
    from llm_datadist.integrations.vllm.ranks import Origin
    from llm_datadist.integrations.vllm.settings import Settings


class Fleet:
    """What one worker says and knows there. Thread-safe.

    It must be able to be read from by then: others come as soon as it is announced. Raises as
    `LLMDataDist.follow`.
    """

    def __init__(
        self, datadist: LLMDataDist, settings: Settings, worker: int, advertised: Endpoint | None
    ) -> None:
        """`advertised`: where it is dialled, if it is."""
        extra = settings.extra
        assert extra.directory is not None
        self._patience_s = extra.link_timeout_s
        self._follower = datadist.follow(
            extra.directory,
            advertised="" if advertised is None else str(advertised),
            labels={**extra.labels, "engine": settings.engine_id, "worker": str(worker)},
            ttl_s=extra.directory_ttl_s,
        )

    def endpoint(self, origin: Origin[Source]) -> Endpoint:
        """Where that worker is dialled. One that was just started is waited for.

        Raises ConnectionError, LookupError as `Source.address`.
        """
        record = self._follower.find(origin.cluster_id, self._patience_s)
        if record is None:
            raise ConnectionError("the directory has no such start of it (any more)")
        if record.endpoint is None:
            raise ConnectionError("the directory has no address of it")
        return record.endpoint

    def leave(self) -> None:
        """Says that the worker has left, and waits for nothing. May be called again."""
        self._follower.begin_end()
