"""`import hixl`: a distribution of its own, which nobody gets by accident."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import Distribution, distributions
from typing import TYPE_CHECKING

import outside
import pytest

from llm_datadist import hixl as ours

if TYPE_CHECKING:
    from pathlib import Path

SHIM = outside.ROOT / "shims" / "hixl"
SAYS_IT = "import hixl, llm_datadist.hixl as h; print(hixl.Hixl is h.Hixl, hixl.SUCCESS)"


@pytest.mark.slow
@pytest.mark.shows("engine.shim")
@pytest.mark.parametrize("wanted", [pytest.param(".", marks=pytest.mark.long), ".[hixl-shim]"])
def test_the_shim_comes_with_the_library_from_a_checkout(tmp_path: Path, wanted: str) -> None:
    """As docs/hixl.md says, in one command."""
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("".join(f"{each.name}=={each.version}\n" for each in others()))
    outside.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--quiet"]
    outside.run(
        [*pip, "install", "--no-compile", "-c", constraints, wanted, SHIM],
        outside.ROOT,
        timeout_s=300,
    )
    assert outside.run([python, "-c", SAYS_IT], tmp_path) == "True 0\n"


def others() -> list[Distribution]:
    ours = ("llm-datadist", "llm-datadist-hixl")
    return [each for each in distributions() if each.name not in ours]


@pytest.mark.shows("engine.shim")
def test_nobody_gets_the_name_by_accident(tmp_path: Path) -> None:
    """Not with the library, nor from the folder of a checkout."""
    tried = "import importlib.util as u; print(u.find_spec('hixl'))"
    assert outside.run([sys.executable, "-c", tried], tmp_path) == "None\n"
    assert outside.run([sys.executable, "-c", tried], outside.ROOT) == "None\n"


@pytest.mark.shows("engine.shim")
def test_the_shim_has_every_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SHIM / "src"))
    hixl = importlib.import_module("hixl")
    assert hixl.__all__ == ours.__all__
    assert all(getattr(hixl, name) is getattr(ours, name) for name in ours.__all__)
