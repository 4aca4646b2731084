"""What link security costs over TCP: the shared workload, plain and secured in turn.

    python tests/bench/sealed.py --rounds 9

Every contestant proves first that it moves the right bytes. The last column of what is printed is
how many times as fast the plain transfer is, a median over the rounds.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from rich.console import Console

from certificates import Authority
from llm_datadist.cli.bench.contest import Entrant, compete
from llm_datadist.cli.bench.contestant import Job
from llm_datadist.cli.bench.ours import Ours
from llm_datadist.cli.bench.report import Report
from llm_datadist.cli.bench.workload import SHAPES
from llm_datadist.options import SECURITY_VARIABLE

AEAD = "cryptography.hazmat.primitives.ciphers.aead"


class TlsAlone(Ours):
    """Without the package cryptography, at the end that calls: both would need it."""

    def __init__(self, job: Job) -> None:
        sys.modules[AEAD] = None  # type: ignore[assignment]  # Python's word for missing
        super().__init__(job)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", choices=SHAPES, default="llama3-8b")
    parser.add_argument("--tensors", type=int, default=0, help="of the cache, for less")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    shape = replace(shape, num_tensors=options.tensors or shape.num_tensors)
    job = Job(shape, path="tcp", threads=options.threads)
    console = Console()
    with tempfile.TemporaryDirectory() as folder, console.status("") as status:
        tls = {SECURITY_VARIABLE: Authority().issue(Path(folder)).option()}
        secret = {SECURITY_VARIABLE: f'{{"secret": "{secrets.token_hex(16)}"}}'}
        entrants = [
            Entrant("plain", Ours, job, {SECURITY_VARIABLE: ""}),
            Entrant("secret", Ours, job, secret),
            Entrant("TLS, records", Ours, job, tls),
            Entrant("TLS alone", TlsAlone, job, tls),
        ]
        report = Report([compete(entrants, options.rounds, status.update)])
    console.print(report.to_screen())
    if options.json:
        report.write_json(options.json)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
