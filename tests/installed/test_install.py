"""What is built: the archives' contents, and the wheel at work in an environment of its own."""

from __future__ import annotations

import re
import shutil
import sys
import tarfile
import zipfile
from email import message_from_bytes
from importlib.metadata import distributions
from pathlib import Path

import outside
import pytest

import llm_datadist

#: what the installed command must be able to do anywhere; `doctor` belongs here
COMMANDS = [["--help"], ["--version"], ["doctor"]]


@pytest.mark.slow
def test_the_wheel_works_in_a_fresh_environment(tmp_path: Path) -> None:
    sdist, wheel = build(tmp_path / "dist")
    check_sdist(sdist)
    check_wheel(wheel)
    folder = tmp_path / "elsewhere"
    shutil.copytree(outside.EXAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    python = install(wheel, tmp_path / "environment")
    for command in COMMANDS:
        outside.run([python.with_name("llm-datadist"), *command], folder)
    assert "LLM_SUCCESS" in outside.run([python, "-W", "error", readme_example(folder)], folder)
    assert "3 passed" in outside.run_pytest(folder, python)


def build(folder: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it."""
    outside.run(
        [sys.executable, "-m", "build", "--no-isolation", "-o", folder, outside.ROOT], folder.parent
    )
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def check_sdist(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {str(Path(*Path(name).parts[1:])) for name in archive.getnames()}
    assert names >= {
        "LICENSE", "README.md", "README.zh-CN.md", "CHANGELOG.md", "Makefile", "pyproject.toml",
        "CONTRIBUTING.md", "RELEASING.md", "SECURITY.md", "changes/README.md",
        ".pre-commit-config.yaml", "constraints.txt", "lock.txt", "tooling/locked.py",
        "src/llm_datadist/py.typed",
        "src/_llm_datadist_pytest.py",
        "tests/conftest.py", "docs/testing.md", "examples/ascend-ci/kv_connector.py",
    }  # fmt: skip
    assert not [name for name in names if "__pycache__" in name or name.startswith(".venv")]


def check_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        fields = message_from_bytes(archive.read(metadata))
    tops = {Path(name).parts[0] for name in names}
    assert tops == {"llm_datadist", "_llm_datadist_pytest.py", Path(metadata).parts[0]}
    assert "llm_datadist/py.typed" in names
    assert fields["Version"] == llm_datadist.__version__
    assert fields["Requires-Python"] == ">=3.10"
    classifiers = fields.get_all("Classifier", [])
    assert "Typing :: Typed" in classifiers
    assert [text for text in classifiers if re.search(r":: 3\.\d+$", text)] == [
        f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 15)
    ]
    assert {"testing", "torch", "integrity"} <= set(fields.get_all("Provides-Extra", []))


def install(wheel: Path, environment: Path) -> Path:
    """The Python of a new environment that has the wheel, with what testing needs, and no more.

    What it needs comes in the versions that are here: what CI installs is locked.
    """
    here = environment.with_name("constraints.txt")
    here.write_text("".join(f"{each.name}=={each.version}\n" for each in distributions()))
    outside.run([sys.executable, "-m", "venv", "--without-pip", environment], wheel.parent)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--quiet"]
    outside.run(
        [*pip, "install", "--no-compile", "-c", here, f"{wheel}[testing]"],
        wheel.parent,
        timeout_s=300,
    )
    return python


def readme_example(folder: Path) -> Path:
    """A pull between two processes, as the README prints it."""
    code = re.findall(r"```python\n(.*?)```", (outside.ROOT / "README.md").read_text(), re.DOTALL)[
        0
    ]
    script = folder / "pull.py"
    script.write_text(code)
    return script
