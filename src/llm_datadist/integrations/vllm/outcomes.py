"""What became of loads, on its way from the threads that know to the engine's, which asks."""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING

from llm_datadist.integrations.vllm.printable import printable, shown_id

if TYPE_CHECKING:
    from llm_datadist.integrations.vllm.step import Pull

logger = logging.getLogger(__name__)


class Outcomes:
    """Loads that have ended. Any thread tells of them; one, the engine's, takes them.

    Without a lock, which in a forked child nobody might ever release.
    """

    def __init__(self) -> None:
        #: with the seconds that it took, or None if it failed
        self._ends: deque[tuple[Pull, float | None]] = deque()
        #: of what `take_received` has told of
        self._failed_blocks: set[int] = set()
        self._pulls: list[tuple[float, int]] = []
        self._num_failed = 0

    def received(self, pull: Pull, seconds: float) -> None:
        """Its blocks are here."""
        self._ends.append((pull, seconds))

    def failed(self, pull: Pull, error: BaseException) -> None:
        """Its blocks could not be had, and it is said why."""
        self._ends.append((pull, None))
        source = pull.source
        logger.error(
            "%s: its KV cannot be read from %s at %s:%d: %s",
            shown_id(pull.request_id),
            source.remote_engine_id,
            source.remote_host,
            source.remote_port,
            printable(error),
        )

    def take_received(self) -> set[str]:
        """Requests whose pull is over since the last call; failed ones are among them."""
        ended = set()
        while self._ends:
            pull, seconds = self._ends.popleft()
            ended.add(pull.request_id)
            if seconds is None:
                self._failed_blocks.update(pull.dst_blocks)
                self._num_failed += 1
            else:
                self._pulls.append((seconds, len(pull.dst_blocks)))
        return ended

    def take_failed_blocks(self) -> set[int]:
        """Blocks that hold nothing of use, of the requests that `take_received` has told of."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_counts(self) -> tuple[list[tuple[float, int]], int]:
        """Of the pulls that were told of since the last call: seconds and blocks, failures."""
        pulls, self._pulls = self._pulls, []
        num_failed, self._num_failed = self._num_failed, 0
        return pulls, num_failed
