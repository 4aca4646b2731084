"""Every lock is one that `holds_lock` knows: else a thread waits for another that needs it."""

from __future__ import annotations

import ast
from pathlib import Path

import llm_datadist

SOURCE = Path(llm_datadist.__file__).parent
#: files that make locks of their own, and why no thread of ours waits for another under them
KNOWN = {
    "locks.py": "nothing is called under it",
    "transport/tcp.py": "of one answer: taken with a bound, and never by a thread that has it",
}
#: they are the program's own, as seen from here
USERS = ("integrations", "cli", "testing")
PLAIN = {"Lock", "RLock", "Condition", "Event", "Semaphore", "BoundedSemaphore", "Barrier"}


def plain_locks(file: Path) -> list[str]:
    return [
        f"{file.relative_to(SOURCE)}:{call.lineno}"
        for call in ast.walk(ast.parse(file.read_text()))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and (call.func.value.id, call.func.attr) in {("threading", name) for name in PLAIN}
    ]


def test_no_lock_is_unknown_to_those_who_wait() -> None:
    files = [
        file for file in SOURCE.rglob("*.py") if file.relative_to(SOURCE).parts[0] not in USERS
    ]
    found = {place.rsplit(":", 1)[0] for file in files for place in plain_locks(file)}
    assert found == set(KNOWN)
