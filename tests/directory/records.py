"""Records for tests, and watches whose changes are taken until they say what a test waits for."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from llm_datadist.directory import Changes, DirectoryError, Record

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_datadist.directory import Watch

SOON_S = 5.0


def record(
    cluster_id: int = 1, incarnation: int = 1, role: str = "PROMPT", **said: object
) -> Record:
    said.setdefault("listen", f"127.0.0.1:{20000 + cluster_id % 1000}")
    return Record(
        cluster_id=cluster_id,
        incarnation=f"{incarnation:032x}",
        role=role,
        **said,  # type: ignore[arg-type]
    )


def until(watch: Watch, is_right: Callable[[Changes], bool], within_s: float = SOON_S) -> Changes:
    """The first changes that are right; what else comes is left out, a silent directory, too."""
    end = time.monotonic() + within_s
    while (left_s := end - time.monotonic()) > 0:
        try:
            changes = watch.wait(left_s)
        except DirectoryError:
            time.sleep(0.01)  # as whoever follows a directory does between two attempts
            continue
        if is_right(changes):
            return changes
    raise AssertionError(f"it did not come within {within_s} s")


def nothing(watch: Watch, for_s: float) -> bool:
    """Whether nothing comes for so long, but for a directory that is gone."""
    end = time.monotonic() + for_s
    while (left_s := end - time.monotonic()) > 0:
        try:
            if watch.wait(left_s):
                return False
        except DirectoryError:
            time.sleep(0.01)
    return True
