"""Checks that all packages of an environment have the versions that a lock names for it.

    python tooling/locked.py lock.txt [SITE-PACKAGES]

Exit code 1, and a line for each that has not. A local version (torch's +cpu) is the version
itself, as it is for pip.
"""

from __future__ import annotations

import sys
import sysconfig
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

#: what the lock is for
_OURS = "llm-datadist"


def main(lock: Path, folder: str) -> int:
    """The exit code."""
    locked = versions_in(lock)
    installed = {
        canonicalize_name(each.name): Version(each.version).public
        for each in distributions(path=[folder])
        if each.name != _OURS
    }
    wrong = [
        f"{name} {version} is installed, and {lock.name} has {locked.get(name, 'none')}"
        for name, version in sorted(installed.items())
        if version != locked.get(name)
    ]
    print(*wrong or [f"{len(installed)} packages are as {lock.name} says"], sep="\n")
    return 1 if wrong else 0


def versions_in(lock: Path) -> dict[str, str]:
    """The version of each package for the Python that runs this."""
    lines = [line.partition("#")[0].strip() for line in lock.read_text().splitlines()]
    requirements = [Requirement(line) for line in lines if line]
    return {
        canonicalize_name(each.name): str(each.specifier).removeprefix("==")
        for each in requirements
        if each.marker is None or each.marker.evaluate()
    }


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), (*sys.argv[2:], sysconfig.get_path("purelib"))[0]))
