"""32 threads that mix every operation of a cluster, against two peers that pull as well.

They run in a program of their own, in Python's development mode and under a watchdog: what hangs
is a traceback of all threads, and what asyncio or the collector complains about is a failure.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from soak.tally import Tally

#: start, the final checks and the end of the program
AROUND_S = 60.0
COMPLAINTS = ("ResourceWarning", "never awaited", "Exception ignored", "Fatal", "Traceback")
#: the rare operations, such as linking, may not get far in less
ALL_SUCCEED_S = 20


def mixture(rounds: int, tally: Tally) -> None:
    """As many rounds as seconds."""
    program = [sys.executable, "-X", "dev", "-X", "faulthandler", "-m", "soak.medley"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            [*program, str(rounds), str(tally.seed)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=rounds + 2 * AROUND_S,
        )
    except subprocess.TimeoutExpired as error:
        tally.failure(f"the program did not even end by its watchdog: {error.stderr!r:.4000}")
        return
    complaints = [line for line in done.stderr.splitlines() if any(c in line for c in COMPLAINTS)]
    if done.returncode or complaints:
        tally.failure(f"the program ended with {done.returncode}: {done.stderr[-6000:]}")
        return
    report = json.loads(done.stdout.splitlines()[-1])
    for what in report["wrong"]:
        tally.failure(what)
    for operation in report["operations"] if rounds >= ALL_SUCCEED_S else ["peers pull"]:
        if not report["counts"].get(f"{operation} LLM_SUCCESS"):
            tally.failure(f"{operation} never succeeded: {report['counts']}")
    for _ in range(rounds):
        tally.round(report["worst_over_s"])
