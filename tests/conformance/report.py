"""Writes docs/conformance.md: which test shows which row of rows.toml.

Fails when a row has no test, or a test names no row; with `--check` also when the page is stale.
"""

from __future__ import annotations

import io
import sys
from collections import defaultdict
from contextlib import redirect_stdout
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it where the standard library lacks it
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
ROWS = Path(__file__).with_name("rows.toml")
PAGE = ROOT / "docs" / "conformance.md"

HEAD = """# Conformance

Each row is something that the interface promises, from the [specification](specification.md) and
the seed documents; beside it stand the tests that show it. Written by `make conformance` from
[rows.toml](../tests/conformance/rows.toml) and the marks on the tests; CI fails when a row has no
test. D and O name the decisions of the specification's section 11.
"""


class Marks:
    """A pytest plugin: the tests that show each row, by the row's name."""

    def __init__(self) -> None:
        self.tests: defaultdict[str, set[str]] = defaultdict(set)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            test = item.nodeid.split("[")[0]
            for mark in item.iter_markers("shows"):
                for row in mark.args:
                    self.tests[row].add(test)


def collect() -> Marks:
    marks = Marks()
    output = io.StringIO()
    with redirect_stdout(output):
        status = pytest.main(
            ["--collect-only", "-q", "--rootdir", str(ROOT), str(ROOT / "tests")], plugins=[marks]
        )
    if status != pytest.ExitCode.OK:
        lines = output.getvalue().splitlines()[-30:]
        sys.exit("\n".join([*lines, "the tests could not be collected"]))
    return marks


def render(sections: dict[str, dict[str, str]], tests: dict[str, set[str]]) -> str:
    lines = [HEAD]
    for title, rows in sections.items():
        lines += [f"## {title}", "", "| row | promise | shown by |", "| --- | --- | --- |"]
        for row, promise in rows.items():
            shown = "<br>".join(_link(test) for test in sorted(tests.get(row, ())))
            lines.append(f"| {row} | {promise.replace('|', '&#124;')} | {shown} |")
        lines.append("")
    return "\n".join(lines)


def _link(test: str) -> str:
    path, _, name = test.partition("::")
    return f"[{name.replace('::', '.')}](../{path})"


def main(arguments: list[str]) -> str | None:
    """Writes or checks the page; returns what is wrong, if anything."""
    sections: dict[str, dict[str, str]] = tomllib.loads(ROWS.read_text())
    rows = {row for section in sections.values() for row in section}
    tests = collect().tests
    if unknown := sorted(tests.keys() - rows):
        return f"marks that name no row of {ROWS.name}: {', '.join(unknown)}"
    if missing := sorted(rows - tests.keys()):
        return f"{len(missing)} rows without a test: {', '.join(missing)}"
    page = render(sections, tests)
    if "--check" not in arguments:
        PAGE.write_text(page)
    elif not PAGE.exists() or PAGE.read_text() != page:
        return f"{PAGE.relative_to(ROOT)} is stale: run make conformance"
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
