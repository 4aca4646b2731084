"""The pytest plugin, in the pytest runs of other projects."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

import outside

if TYPE_CHECKING:
    from pathlib import Path

PAGE = outside.ROOT / "docs" / "testing.md"
#: of a project that has the package installed, before its tests import it
CONFTEST = """
import sys

def pytest_configure(config):
    assert config.pluginmanager.hasplugin("llm_datadist")
    assert [name for name in sys.modules if name.startswith("llm_datadist")] == []
"""
KIT_WITHOUT_PYTEST = """
import sys
sys.modules["pytest"] = None
from llm_datadist.testing import assertions, cluster, faults, fixtures, linked, process, timing
"""


def blocks_of_the_page() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_five_lines_are_those_of_the_example() -> None:
    conftest = (outside.EXAMPLE / "tests" / "conftest.py").read_text()
    assert blocks_of_the_page()[0] == conftest
    assert len([line for line in conftest.splitlines() if line]) == 5


def test_the_page_s_tests_pass_and_the_plugin_imports_nothing_before(tmp_path: Path) -> None:
    page = blocks_of_the_page()[1:]
    (tmp_path / "test_page.py").write_text("\n".join(page))
    (tmp_path / "conftest.py").write_text(CONFTEST)
    assert f"{len(page)} passed" in outside.run_pytest(tmp_path)


def test_the_kit_needs_no_pytest(tmp_path: Path) -> None:
    outside.run([sys.executable, "-W", "error", "-c", KIT_WITHOUT_PYTEST], tmp_path)
