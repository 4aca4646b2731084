"""How long the threads of a follower wait before they ask a directory again that failed."""

from __future__ import annotations

import random
from typing import Final

_FIRST_S: Final = 0.2


class Pauses:
    """Growing, each of another length, up to a longest one."""

    def __init__(self, longest_s: float) -> None:
        self._longest_s = longest_s
        self._count = 0

    def next_s(self) -> float:
        """The next one."""
        longest_s = min(self._longest_s, _FIRST_S * 2.0 ** min(self._count, 20))
        self._count += 1
        return longest_s * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """It worked."""
        self._count = 0
