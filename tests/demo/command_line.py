"""The real command, in a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-m", "llm_datadist"]

#: well above what a run takes; a hang is a failure, not a wait for ever
TIMEOUT_S = 240


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run `command` to its end, and with it all processes that it has started."""
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def run_demo(*options: str) -> subprocess.CompletedProcess[str]:
    """Run `llm-datadist demo` with `options`."""
    return run(*COMMAND, "demo", *options)


def start_demo(*options: str) -> subprocess.Popen[str]:
    """Start `llm-datadist demo` as a terminal does: at the head of its own process group."""
    return subprocess.Popen(
        [*COMMAND, "demo", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_heed_interrupts,
    )


def _heed_interrupts() -> None:
    """A shell in the background, such as some CI's, has its children ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def read_until(process: subprocess.Popen[str], text: str) -> None:
    """Read what `process` prints until a line has `text` in it."""
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"the process has ended without printing {text!r}")


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """The process ids of prefill and decode, in this order."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return sorted(int(child) for child in children if _is_worker(child))


def figures(file: Path) -> dict[str, Any]:
    """What `--json` wrote."""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _is_worker(pid: str) -> bool:
    # beside the workers, multiprocessing has a process of its own
    return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
