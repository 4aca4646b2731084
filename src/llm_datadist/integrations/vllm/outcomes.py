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
        #: with the seconds that it took and its bytes, or None if it failed
        self._ends: deque[tuple[Pull, tuple[float, int] | None]] = deque()
        #: of what `take_received` has told of
        self._failed: set[str] = set()
        self._pulls: list[tuple[float, int]] = []
        self._num_failed = 0

    def received(self, pull: Pull, seconds: float, nbytes: int) -> None:
        """Its blocks are here."""
        self._ends.append((pull, (seconds, nbytes)))

    def failed(self, pull: Pull, error: BaseException) -> None:
        """Its blocks could not be had, and it is said why."""
        self._ends.append((pull, None))
        logger.error(
            "%s: its KV cannot be read from %s: %s",
            shown_id(pull.request_id), pull.source.producer, printable(error),
        )  # fmt: skip

    def take_received(self) -> set[str]:
        """Requests whose pull is over since the last call; failed ones are among them."""
        ended = set()
        while self._ends:
            pull, figures = self._ends.popleft()
            ended.add(pull.request_id)
            if figures is None:
                self._failed.add(pull.request_id)
                self._num_failed += 1
            else:
                self._pulls.append(figures)
        return ended

    def take_failed(self) -> set[str]:
        """Of the requests that `take_received` has told of, those whose blocks are of no use."""
        failed, self._failed = self._failed, set()
        return failed

    def take_counts(self) -> tuple[list[tuple[float, int]], int]:
        """Of the pulls that were told of since the last call: seconds and bytes, failures."""
        pulls, self._pulls = self._pulls, []
        num_failed, self._num_failed = self._num_failed, 0
        return pulls, num_failed
