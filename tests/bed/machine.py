"""A virtual machine: QEMU with this machine's files, one shared folder, and a console in a file.

With KVM where a kernel boots under it, else emulated: ten to twenty times slower.
"""

from __future__ import annotations

import os
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from bed.kernel import Kernel

_EMULATED: Final = ("-accel", "tcg,thread=multi", "-cpu", "max")
_KVM: Final = ("-accel", "kvm", "-cpu", "host")
#: a kernel with nothing to do comes and goes in less
_TRIAL_S: Final = 10.0


def accelerator(kernel: Kernel) -> tuple[str, ...]:
    """How QEMU runs fastest here: by KVM only where a kernel comes up, which some do not.

    A host may lend /dev/kvm and lack what Debian's kernel does in it.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return _EMULATED
    # it finds no first process, panics, and by `panic=-1` reboots, which ends QEMU
    command = [*_qemu(kernel, _KVM, "rdinit=/none"), "-nic", "none", "-m", "512"]
    with (kernel.initrd.parent / "kvm.log").open("wb") as log:
        try:
            ended = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                timeout=_TRIAL_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return _EMULATED
    return _KVM if ended.returncode == 0 else _EMULATED


def is_fast(accelerator: Sequence[str]) -> bool:
    return accelerator == _KVM


@contextmanager
def booted(
    kernel: Kernel, accelerator: Sequence[str], shared: Path, memory_mib: int, nic: Sequence[str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A machine that runs `shared/run` and ends; its console is `shared/console.log`."""
    files = "local,security_model=none,multidevs=remap"
    command = [
        *_qemu(kernel, accelerator, "rdinit=/init"),
        *nic, "-m", str(memory_mib), "-smp", "2",
        "-virtfs", f"{files},path=/,mount_tag=files,readonly=on",
        "-virtfs", f"{files},path={shared},mount_tag=shared",
    ]  # fmt: skip
    with (shared / "console.log").open("wb") as console:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def _qemu(kernel: Kernel, accelerator: Sequence[str], todo: str) -> list[str]:
    return [
        "qemu-system-x86_64", *accelerator, "-nographic", "-no-reboot",
        "-kernel", str(kernel.image), "-initrd", str(kernel.initrd),
        "-append", f"console=ttyS0 quiet panic=-1 {todo}",
    ]  # fmt: skip
