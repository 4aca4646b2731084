"""The map of areas is true: every source has one, every test belongs to some, all paths exist."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest

import affected

if TYPE_CHECKING:
    from pathlib import Path

AREAS = affected.areas()
PATHS = [
    str(path.relative_to(affected.ROOT))
    for top in ("src", "tests", "docs", "examples", "shims", "changes", "")
    for path in affected.ROOT.glob(f"{top}/**/*" if top else "*")
    if path.is_file() and "__pycache__" not in path.parts
]
SOURCES = [path for path in PATHS if path.startswith("src/")]


def test_every_source_is_in_one_area() -> None:
    found = {path: [area.name for area in AREAS if area.has(path)] for path in SOURCES}
    assert {path: names for path, names in found.items() if len(names) != 1} == {}


def test_every_test_belongs_to_an_area() -> None:
    globs = [glob for area in AREAS for glob in area.tests]
    strays = [
        test
        for test in affected.test_files()
        if not any(affected.matches(test, glob) for glob in globs)
    ]
    assert strays == []


@pytest.mark.parametrize("area", AREAS, ids=lambda area: area.name)
def test_every_glob_is_of_something(area: affected.Area) -> None:
    globs = [*area.files, *area.tests]
    assert [glob for glob in globs if not any(affected.matches(path, glob) for path in PATHS)] == []


@pytest.mark.parametrize(
    ("changed", "runs", "does_not_run"),
    [
        pytest.param(
            "src/llm_datadist/memory/arena.py", "tests/unit/test_arena.py",
            "tests/unit/test_log.py", id="a source: the tests of its area",
        ),
        pytest.param(
            "src/llm_datadist/memory/was_deleted.py", "tests/unit/test_arena.py",
            "tests/unit/test_log.py", id="a source that is gone: the tests of its area",
        ),
        pytest.param(
            "tests/bench/test_bench.py", "tests/bench/test_bench.py", "tests/unit/test_arena.py",
            id="a test: itself",
        ),
        pytest.param(
            "tests/e2e/linking.py", "tests/e2e/test_pull.py", "tests/unit/test_arena.py",
            id="what tests share: all in its folder",
        ),
    ],
)  # fmt: skip
def test_what_a_change_runs(changed: str, runs: str, does_not_run: str) -> None:
    files = affected.affected([changed])
    assert runs in files
    assert does_not_run not in files


def test_a_change_of_the_fixtures_of_all_runs_everything() -> None:
    assert affected.affected(["tests/conftest.py"]) == affected.test_files()


def test_what_is_in_no_area_runs_nothing() -> None:
    assert affected.affected(["LICENSE"]) == []


def test_the_summary_names_the_areas_and_what_is_in_none() -> None:
    text = affected.summary(
        "HEAD", ["src/llm_datadist/core/plan.py", "LICENSE", "tests/conftest.py"]
    )
    assert text == "3 files differ from HEAD; areas: core\nin no area of areas.toml: LICENSE"


@pytest.fixture(autouse=True)
def _no_git_but_the_tests_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What git tells its hooks would lead to the repository whose hook runs the tests."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def commit(folder: Path, name: str) -> None:
    (folder / name).write_text(name)
    git(folder, "add", name)
    git(folder, "commit", "-m", name)


def test_what_changed_is_what_differs_from_where_the_branch_began(tmp_path: Path) -> None:
    git(tmp_path, "init", "--initial-branch", "main")
    commit(tmp_path, "old")
    git(tmp_path, "switch", "--create", "branch")
    commit(tmp_path, "committed")
    git(tmp_path, "switch", "main")
    commit(tmp_path, "of others")
    git(tmp_path, "switch", "branch")
    (tmp_path / "old").unlink()
    (tmp_path / "nobody knows it").touch()
    changed = affected.changed_since(affected.default_base(tmp_path), tmp_path)
    assert changed == ["committed", "nobody knows it", "old"]


def test_without_a_main_branch_what_is_not_committed_counts(tmp_path: Path) -> None:
    git(tmp_path, "init", "--initial-branch", "trunk")
    commit(tmp_path, "old")
    assert affected.changed_since(affected.default_base(tmp_path), tmp_path) == []
    (tmp_path / "old").write_text("new")
    assert affected.changed_since(affected.default_base(tmp_path), tmp_path) == ["old"]
