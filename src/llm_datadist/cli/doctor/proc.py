"""What the kernel tells in files."""

from __future__ import annotations

from pathlib import Path

STATUS = Path("/proc/self/status")
MEMINFO = Path("/proc/meminfo")


def field_of(file: Path, name: str) -> str:
    """The value behind `name:`. Raises OSError, LookupError."""
    for line in file.read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return value.strip()
    raise LookupError(f"{file} has no line {name}")


def text_of(file: Path) -> str | None:
    """The file without blanks around it; None where this kernel or container has none."""
    try:
        return file.read_text().strip()
    except OSError:
        return None
