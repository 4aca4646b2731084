"""vLLM's own checks of a prefill and a decode, and its own proxy, run as they are.

They are in vLLM's source distribution, not in its wheels, and are written for NixlConnector: they
know nothing of ours.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from rich.table import Table
from servers import MODEL_NAME

from llm_datadist.cli.failure import SetupError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from servers import Pair, Process

_FOLDER = "tests/v1/kv_connector/nixl_integration"
_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Check:
    """One program of vLLM's."""

    name: str
    is_good: bool
    #: the last line that it said
    said: str


@dataclass(frozen=True, slots=True)
class Upstream:
    """All of them."""

    checks: list[Check]

    @property
    def is_good(self) -> bool:
        """Whether all ended well."""
        return all(check.is_good for check in self.checks)

    @property
    def verdict(self) -> str:
        """For the closing line."""
        return f"upstream {sum(check.is_good for check in self.checks)}/{len(self.checks)}"

    def figures(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    def table(self) -> Table:
        """A row a program."""
        table = Table("program", "ended", "its last words")
        for check in self.checks:
            table.add_row(check.name, "well" if check.is_good else "WITH AN ERROR", check.said)
        return table


def checks_in(source: Path | None) -> Path:
    """Where they are, and the proxy, in vLLM's source distribution. Raises SetupError."""
    if source is None or not (source / _FOLDER).is_dir():
        raise SetupError(
            "upstream: --vllm-source wants the unpacked source distribution of the vLLM that "
            f"is installed, which has {_FOLDER}."
        )
    return source / _FOLDER


def run_checks(
    folder: Path, plain: Process, pair: Pair, logs: Path, report: Callable[[str], None]
) -> Upstream:
    """The pair's proxy is vLLM's."""
    ports = {
        "PREFILL_HOST": "127.0.0.1",
        "DECODE_HOST": "127.0.0.1",
        "PROXY_HOST": "127.0.0.1",
        "PREFILL_PORT": str(pair.prefill.port),
        "DECODE_PORT": str(pair.decode.port),
        "PROXY_PORT": str(pair.proxy.port),
    }
    edges = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", "-c", os.devnull]
    edges.append(str(folder / "test_edge_cases.py"))
    accuracy = [str(folder / "test_disagg_accuracy.py"), "--model_name", MODEL_NAME]
    accuracy += ["--file_name", str(logs / "baseline.json")]
    programs = {
        "test_edge_cases.py": edges,
        "test_disagg_accuracy.py, alone": [*accuracy, "--service_url", plain.base_url],
        "test_disagg_accuracy.py, both": [
            *accuracy, "--service_url", pair.proxy.base_url, "--mode", "disagg",
        ],
    }  # fmt: skip
    checks = []
    for name, arguments in programs.items():
        report(name)
        checks.append(_run(name, arguments, ports, logs))
    return Upstream(checks)


def _run(name: str, arguments: Sequence[str], ports: dict[str, str], logs: Path) -> Check:
    ran = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | ports,
        cwd=logs,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=_TIMEOUT_S,
        check=False,
    )
    said = ran.stdout.decode(errors="replace")
    (logs / f"{name.replace(', ', '-')}.log").write_text(said, encoding="utf-8")
    lines = said.strip().splitlines()
    return Check(name, ran.returncode == 0, lines[-1][:100] if lines else "")
