"""What a call passes through in the library: its own functions, by a profiler's hook."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import llm_datadist

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

_ROOT = str(Path(llm_datadist.__file__).parent)
#: the rows of the house, from the bottom up (the layers of pyproject.toml); a row has no order
_ROWS = (
    ("named_enum", "errors", "checks", "credential_file"),
    ("endpoint", "option_keys", "types", "keys", "pool_config", "link_security", "cluster_info"),
    ("options", "config"),
    ("core",),
    ("observe",),
    ("running",),
    ("memory",),
    ("transport",),
    ("peer",),
    ("owner",),
    ("links",),
    ("layerwise", "cache", "cache_task", "tensor", "cache_tensor", "kv_cache"),
    ("transfers",),
    ("cluster", "cache_transfers", "cache_manager", "kv_cache_manager"),
    ("datadist", "cpp"),
)
_ROW_OF = {name: row for row, names in enumerate(_ROWS) for name in names}


class Way(NamedTuple):
    """The functions of the library that a call entered, and how."""

    calls: int
    files: frozenset[str]
    #: calls from a file into one of a higher row
    climbs: tuple[str, ...]


def way_of(call: Callable[[], object]) -> Way:
    """Runs the call once, in this thread."""
    calls = 0
    files: set[str] = set()
    climbs: list[str] = []

    def on_event(frame: FrameType, event: str, _: object) -> None:
        nonlocal calls
        name = _name(frame)
        if event != "call" or name is None:
            return
        calls += 1
        files.add(name)
        caller = None if frame.f_back is None else _name(frame.f_back)
        if caller is not None and _row(caller) < _row(name):
            climbs.append(f"{caller} -> {name} {frame.f_code.co_name}")

    sys.setprofile(on_event)
    try:
        call()
    finally:
        sys.setprofile(None)
    return Way(calls, frozenset(files), tuple(climbs))


def _name(frame: FrameType) -> str | None:
    """The file within the library; the testing kit is none of it."""
    path = frame.f_code.co_filename
    if not path.startswith(_ROOT):
        return None
    name = path[len(_ROOT) + 1 :]
    return None if name.startswith("testing/") else name


def _row(name: str) -> int:
    return _ROW_OF[name.split("/")[0].removesuffix(".py")]
