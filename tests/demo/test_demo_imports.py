"""torch is for the workers alone, typer and rich for the command alone."""

from __future__ import annotations

import sys

import pytest
from command_line import COMMAND, run

IMPORTED = "; import sys; print(*{name.partition('.')[0] for name in sys.modules}, sep='\\n')"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("llm_datadist", {"typer", "click", "rich", "torch", "transformers"}),
        ("llm_datadist.integrations", {"torch", "transformers", "numpy"}),
        ("llm_datadist.cli", {"torch", "transformers", "gguf"}),
        ("llm_datadist.cli.demo.proxy", {"torch", "transformers", "gguf"}),
        ("llm_datadist.cli.demo.workers", {"torch", "transformers", "gguf"}),
    ],
)
def test_importing_leaves_the_heavy_packages_alone(module: str, absent: set[str]) -> None:
    done = run(sys.executable, "-c", f"import {module}{IMPORTED}")
    assert done.returncode == 0
    assert not absent & set(done.stdout.split())


def test_help_describes_the_demo() -> None:
    done = run(*COMMAND, "demo", "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "--path" in done.stdout
