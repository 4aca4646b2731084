"""The bed: `python -m bed [PART ...]` in tests/, or `make bed`."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from xml.etree import ElementTree

import typer
from rich.console import Console
from rich.table import Table

from bed import HERE, SHARED
from bed.kernel import fetch, install
from bed.machine import accelerator, booted, is_fast
from bed.parts import PARTS, Part

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Sequence

    from bed.kernel import Kernel

#: of the virtual environment, which the machines see
_FOLDER = Path(sys.prefix) / "bed"
_POLL_S = 0.5


@dataclass
class Outcome:
    """A part that was run."""

    part: Part
    took_s: float
    #: tests by how they ended
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    #: what failed or was skipped, and why; what was measured
    notes: tuple[str, ...] = ()

    @property
    def is_good(self) -> bool:
        return self.passed > 0 and not self.failed


def main(
    parts: Annotated[
        list[str] | None, typer.Argument(metavar="[PART]...", help="These parts; all without any.")
    ] = None,
    select: Annotated[str, typer.Option("-k", help="Of their tests those that match.")] = "",
) -> None:
    """Boots a kernel for each part and runs the part's tests in it; exits with 1 if any failed."""
    names = [part.name for part in PARTS]
    if unknown := set(parts or ()) - set(names):
        raise typer.BadParameter(f"no part {', '.join(unknown)}; there are {', '.join(names)}")
    console = Console()
    with console.status("installing") as status:
        install()
        status.update("fetching and packing the kernel")
        kernel = fetch(_FOLDER)
        status.update("trying KVM")
        accelerated = accelerator(kernel)
        outcomes = []
        for part in PARTS:
            if not parts or part.name in parts:
                status.update(f"{part.name}: {part.about}")
                outcomes.append(run(part, kernel, accelerated, select))
    report(outcomes, console)
    how = "KVM" if is_fast(accelerated) else "emulated: how fast anything is says nothing"
    console.print(f"{kernel.image.name}, {how}; consoles: {_FOLDER}/PART/console.log")
    raise typer.Exit(not all(outcome.is_good for outcome in outcomes))


def run(part: Part, kernel: Kernel, accelerated: Sequence[str], select: str) -> Outcome:
    begun = time.monotonic()
    near = _shared_folder(part.name)
    tests = [
        sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "no:xdist",
        # of the families this one says what tests record
        "-o", "faulthandler_timeout=600", "-o", "junit_family=xunit1",
        "--tb=short", "--durations=5",
        f"--junitxml={SHARED}/report.xml", "-k", select, str(HERE / "inside" / f"{part.name}.py"),
    ]  # fmt: skip
    with ExitStack() as machines:
        nic = ["-nic", "none"]
        if part.is_pair:
            far = _shared_folder(f"{part.name}-far")
            meeting = far / "wire"
            _write_script(far, kernel, part, [sys.executable, "-m", "bed.inside.far"])
            machines.enter_context(
                booted(kernel, accelerated, far, part.memory_mib, _nic(meeting, is_near=False))
            )
            nic = _nic(meeting, is_near=True)
            _wait_for(meeting)
        _write_script(near, kernel, part, tests)
        machine = machines.enter_context(booted(kernel, accelerated, near, part.memory_mib, nic))
        is_late = not _ended(machine, part.limit_s)
    outcome = _outcome(part, near / "report.xml", time.monotonic() - begun)
    if is_late:
        outcome.failed += 1
        outcome.notes += (f"not done within {part.limit_s:.0f} s",)
    return outcome


def report(outcomes: Sequence[Outcome], console: Console) -> None:
    table = Table("part", "shows")
    for heading in ("passed", "failed", "skipped", "took s"):
        table.add_column(heading, justify="right")
    for outcome in outcomes:
        table.add_row(
            outcome.part.name, outcome.part.about, str(outcome.passed), str(outcome.failed),
            str(outcome.skipped), f"{outcome.took_s:.0f}", style=None if outcome.is_good else "red",
        )  # fmt: skip
    console.print(table)
    for outcome in outcomes:
        for note in outcome.notes:
            console.print(f"{outcome.part.name}: {note}", markup=False, highlight=False)


def _shared_folder(name: str) -> Path:
    folder = _FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _write_script(shared: Path, kernel: Kernel, part: Part, command: Sequence[str]) -> None:
    tests = HERE.parent
    paths = f"{tests.parent}/src:{tests}:{tests}/e2e"
    modprobe = ["modprobe", "--dirname", str(kernel.root), "--all", *part.modules]
    lines = [
        "export PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8",
        f"export PYTHONPATH={shlex.quote(paths)} PYTHONUNBUFFERED=1",
        f"export BED_KERNEL={shlex.quote(str(kernel.root))}",
        "ip link set lo up",
        "ulimit -l unlimited",
        "ulimit -n 65536",
        shlex.join(modprobe) if part.modules else "",
        f"cd {shlex.quote(str(tests))}",
        shlex.join(command),
    ]
    (shared / "run").write_text("\n".join(lines) + "\n")


def _nic(meeting: Path, *, is_near: bool) -> list[str]:
    """A wire between two machines: one listens, the other one dials."""
    side = "near" if is_near else "far"
    server = "off" if is_near else "on"
    mac = "52:54:00:00:00:01" if is_near else "52:54:00:00:00:02"
    return [
        "-netdev", f"stream,id={side},server={server},addr.type=unix,addr.path={meeting}",
        "-device", f"virtio-net-pci,netdev={side},mac={mac},romfile=",
    ]  # fmt: skip


def _wait_for(path: Path) -> None:
    until = time.monotonic() + 30
    while not path.exists() and time.monotonic() < until:
        time.sleep(_POLL_S)


def _ended(machine: subprocess.Popen[bytes], limit_s: float) -> bool:
    """Whether it came to its end within the limit."""
    until = time.monotonic() + limit_s
    while machine.poll() is None:
        if time.monotonic() > until:
            return False
        time.sleep(_POLL_S)
    return True


def _outcome(part: Part, xml: Path, took_s: float) -> Outcome:
    """What the tests say of themselves; nothing where they did not come to their end."""
    outcome = Outcome(part, took_s)
    if not xml.exists():
        outcome.notes = ("it did not come to its tests' end: its console says why",)
        return outcome
    notes = []
    for test in ElementTree.parse(xml).iter("testcase"):
        name = test.get("name")
        said = {each.tag: each.get("message", "") for each in test}
        if "failure" in said or "error" in said:
            outcome.failed += 1
            notes.append(f"FAILED {name}: {said.get('failure', said.get('error'))}"[:300])
        elif "skipped" in said:
            outcome.skipped += 1
            notes.append(f"skipped {name}: {said['skipped']}")
        else:
            outcome.passed += 1
        measured = test.iterfind("properties/property[@name='measured']")
        notes.extend(f"{name}: {each.get('value')}" for each in measured)
    outcome.notes = tuple(notes)
    return outcome


if __name__ == "__main__":
    typer.run(main)
