"""What `make demo` says before it downloads, with a package index of the test's own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import outside
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SCRIPT = outside.ROOT / "tooling" / "downloads.py"
MB = 1_000_000


class Silent(SimpleHTTPRequestHandler):
    """A folder of folders of wheels is an index, as it lists them."""

    def log_message(self, *_: object) -> None:
        pass


class SaysNoSize(Silent):
    def do_HEAD(self) -> None:
        self.send_error(405)


def add_wheel(index: Path, name: str, nbytes: int, *requirements: str) -> Path:
    wheel = index / name / f"{name.replace('-', '_')}-1.0-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    info = f"{name.replace('-', '_')}-1.0.dist-info"
    needs = "".join(f"Requires-Dist: {each}\n" for each in requirements)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("weights", bytes(nbytes))
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{needs}"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def index(tmp_path: Path) -> Path:
    folder = tmp_path / "index"
    add_wheel(folder, "the-model", 3 * MB, "small", "nvidia-large")
    add_wheel(folder, "small", 1 * MB)
    add_wheel(folder, "nvidia-large", 20 * MB)
    return folder


@pytest.fixture
def handler() -> type[Silent]:
    return Silent


@pytest.fixture
def address(index: Path, handler: type[Silent]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(index)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def say(address: str, *commands: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    pip = {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": address,
        "PIP_NO_CACHE_DIR": "1",
        "PIP_RETRIES": "0",
    }
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *commands],
        env={**environment, **pip},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_packages_are_named_with_their_sizes_the_largest_first(address: str) -> None:
    first, *packages, hint = say(address, "the-model")
    assert first == "To download, less what pip has cached: 24.0 MB"
    assert packages == [
        "  nvidia-large 1.0: 20.0 MB",
        "  the-model 1.0: 3.0 MB",
        "  small 1.0: 1.0 MB",
    ]
    assert hint.startswith("This is torch's CUDA build.")


def test_several_commands_are_added_up(address: str) -> None:
    assert say(address, "small", "--no-deps the-model") == [
        "To download, less what pip has cached: 4.0 MB",
        "  the-model 1.0: 3.0 MB",
        "  small 1.0: 1.0 MB",
    ]


def test_what_lies_on_this_machine_is_not_downloaded(index: Path, address: str) -> None:
    (wheel,) = (index / "small").iterdir()
    assert say(address, str(wheel)) == ["Nothing to download."]


@pytest.mark.parametrize("handler", [SaysNoSize])
def test_without_sizes_the_names_are_left(index: Path, address: str) -> None:
    (wheel,) = (index / "small").iterdir()
    page = f'<a href="{wheel.name}" data-core-metadata="true">{wheel.name}</a>'
    wheel.with_name("index.html").write_text(page)
    metadata = "Metadata-Version: 2.1\nName: small\nVersion: 1.0\n"
    wheel.with_name(f"{wheel.name}.metadata").write_text(metadata)
    assert say(address, "small") == [
        "To download, less what pip has cached: size unknown",
        "  small 1.0: size unknown",
    ]


def test_what_pip_refuses_stops_nothing(address: str) -> None:
    (line,) = say(address, "not-there")
    assert line.startswith("What will be downloaded cannot be told beforehand: ")
    assert "not-there" in line
