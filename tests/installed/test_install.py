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
COMMANDS = [["--help"], ["--version"], ["doctor"], ["docs"]]
#: every link of every page
FOLLOW = """
import re
from llm_datadist.cli.docs.pages import find, pages
links = re.compile(r"\\]\\(((?!https?:)[^)\\s]+)")
links = {each for page in pages() for each in links.findall(find(page))}
print(len([find(each) for each in links]), "links")
"""


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
    for page in pages_mentioned(python, folder):
        outside.run([python.with_name("llm-datadist"), "docs", page], folder)
    links = re.fullmatch(r"(\d+) links\n", outside.run([python, "-c", FOLLOW], folder))
    assert links is not None
    assert int(links[1]) > 50
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
    assert {"llm_datadist/py.typed", "llm_datadist/pages/specification/caches.md"} <= set(names)
    assert not [name for name in names if "/pages/" in name and not name.endswith(".md")]
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


def pages_mentioned(python: Path, folder: Path) -> set[str]:
    """Those that the package's description names, which has no link of its own, and its source."""
    description = outside.run(
        [python, "-c", "import importlib.metadata as m; print(m.metadata('llm-datadist'))"], folder
    )
    assert re.findall(r"\]\((?!https?:)", description) == []
    sources = (outside.ROOT / "src").rglob("*.py")
    text = "".join([description, *(source.read_text() for source in sources)])
    mentioned = set(re.findall(r"`llm-datadist docs ([^` ]+)`", text))
    assert len(mentioned) > 15
    return mentioned


def readme_example(folder: Path) -> Path:
    """A pull between two processes, as the README prints it."""
    code = re.findall(r"```python\n(.*?)```", (outside.ROOT / "README.md").read_text(), re.DOTALL)[
        0
    ]
    script = folder / "pull.py"
    script.write_text(code)
    return script
