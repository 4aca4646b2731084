"""Runs the tests of the areas in which something changed; arguments are pytest's. `make affected`

What changed is what differs from BASE, or else from where this branch left origin/main or main, or
else from HEAD; files that git does not know yet count. `areas.toml` says which tests belong where.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it where the standard library lacks it
    import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Iterable

ROOT = Path(__file__).parents[2]
MAP = Path(__file__).with_name("areas.toml")
EVERYTHING = "tests/conftest.py"


@dataclass(frozen=True)
class Area:
    """A part of the project: globs of its files, and of the tests that show that it works."""

    name: str
    files: list[str]
    tests: list[str]

    def has(self, path: str) -> bool:
        return any(matches(path, glob) for glob in self.files)


def matches(path: str, glob: str) -> bool:
    """Whether a path, seen from the root, is one of a glob's; it need not exist any more."""
    pattern = re.escape(glob).replace(r"\*\*", ".*").replace(r"\*", "[^/]*")
    return re.fullmatch(pattern, path) is not None


def areas() -> list[Area]:
    return [Area(name, **entry) for name, entry in tomllib.loads(MAP.read_text()).items()]


def test_files() -> list[str]:
    return sorted(str(file.relative_to(ROOT)) for file in ROOT.glob("tests/**/test_*.py"))


def affected(changed: Iterable[str]) -> list[str]:
    """The test files to run after these paths changed."""
    wanted: set[str] = set()
    for path in changed:
        wanted.update(glob for area in areas() if area.has(path) for glob in area.tests)
        wanted.update(_tests_that_use(path))
    return [file for file in test_files() if any(matches(file, glob) for glob in wanted)]


def _tests_that_use(path: str) -> list[str]:
    """Of a file in tests/: a test itself; of what tests share, all in its folder."""
    folder, _, name = path.rpartition("/")
    if path == EVERYTHING:
        return ["tests/**"]
    if not path.startswith("tests/"):
        return []
    return [path] if name.startswith("test_") else [f"{folder}/**"]


def changed_since(base: str, root: Path = ROOT) -> list[str]:
    """The paths that differ from a commit, and those that git does not know yet."""
    known = _git(root, "diff", "--name-only", "--no-renames", base)
    return sorted({*known, *_git(root, "ls-files", "--others", "--exclude-standard")})


def default_base(root: Path = ROOT) -> str:
    """Where this branch left the main one, if there is one."""
    for ref in ("refs/remotes/origin/main", "refs/heads/main"):
        if _git(root, "for-each-ref", ref):
            return _git(root, "merge-base", "HEAD", ref)[0]
    return "HEAD"


def _git(root: Path, *arguments: str) -> list[str]:
    done = subprocess.run(
        ["git", "-c", "core.quotePath=false", *arguments],
        cwd=root,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def summary(base: str, changed: list[str]) -> str:
    parts = areas()
    names = [area.name for area in parts if any(map(area.has, changed))]
    elsewhere = [path for path in changed if not path.startswith("tests/")]
    strays = [path for path in elsewhere if not any(area.has(path) for area in parts)]
    lines = [f"{len(changed)} files differ from {base}; areas: {', '.join(names) or 'none'}"]
    if strays:
        lines.append(f"in no area of {MAP.name}: {', '.join(strays)}")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    base = os.environ.get("BASE") or default_base()
    changed = changed_since(base)
    print(summary(base, changed), flush=True)  # noqa: T201
    files = affected(changed)
    if not files:
        return 0
    command = [sys.executable, "-m", "pytest", *arguments, *files]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
