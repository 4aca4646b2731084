"""The gate, and what else is looked through while others change it."""

from __future__ import annotations

import ast
import gc
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import llm_datadist
from llm_datadist.locks import holds_lock, make_lock
from llm_datadist.running.gate import Gate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROUNDS = 200
SOURCE = Path(llm_datadist.__file__).parent
SHARED = ("running", "peer", "owner", "links", "hixl", "transfers", "observe")
SEVERAL = {
    *((maker, "items") for maker in ("list", "tuple", "sorted")),
    *(("tuple", view) for view in ("keys", "values")),
}


class Strikes:
    """Garbage, of which only the collector rids; then it does something."""

    def __init__(self, do: Callable[[], object]) -> None:
        self.itself, self.do = self, do

    def __del__(self) -> None:
        self.do()


@contextmanager
def collecting_at(allocations: int) -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(allocations)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@pytest.mark.parametrize("look", ["count", "uses_beside", "cut"])
def test_who_enters_out_of_a_finalizer_breaks_off_nobody_who_looks(look: str) -> None:
    gate, used = Gate(), object()
    for _ in range(10):
        gate.enter(object(), None, used)
    for number in range(ROUNDS):
        Strikes(lambda: gate.enter(object(), None, used))
        with collecting_at(1 + number % 7):
            getattr(gate, look)(used)
    gc.collect()
    assert gate.count(used) == 10 + ROUNDS


def test_locks_that_finalizers_make_break_off_nobody_who_looks() -> None:
    kept = [make_lock() for _ in range(10)]
    for number in range(ROUNDS):
        Strikes(lambda: kept.append(make_lock()))
        with collecting_at(1 + number % 7):
            assert not holds_lock()
    with kept[0]:
        assert holds_lock()
        assert not holds_lock(kept[0])


def test_nothing_that_others_change_is_looked_through_in_several_steps() -> None:
    """`list(d)`, `list(d.values())` and `dict(d)` are one; see running/gate.py."""
    found = [
        f"{file.relative_to(SOURCE)}:{call.lineno}"
        for package in SHARED
        for file in (SOURCE / package).rglob("*.py")
        for call in ast.walk(ast.parse(file.read_text()))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.args
        and (call.func.id, _view_of(call.args[0])) in SEVERAL
    ]
    assert found == []


def _view_of(made_of: ast.expr) -> str:
    """`values` of `self._streams.values()`; nothing of a view on a copy."""
    if not (isinstance(made_of, ast.Call) and isinstance(made_of.func, ast.Attribute)):
        return ""
    return "" if isinstance(made_of.func.value, ast.Call) else made_of.func.attr
