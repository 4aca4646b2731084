"""What the kernel says in files: of a process, of memory."""

from __future__ import annotations

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def free_nbytes() -> tuple[int, bool]:
    """What can be taken without harm, and whether a container's limit says so."""
    available = int(field_of(_MEMINFO, "MemAvailable").removesuffix(" kB")) * 1024
    most, taken = text_of(_CGROUP / "memory.max"), text_of(_CGROUP / "memory.current")
    if most is None or taken is None or most == "max":
        return available, False
    left = max(0, int(most) - int(taken))
    return (left, True) if left < available else (available, False)


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
