"""`llm-datadist doctor` says what is so here, and ends with the code that it documents."""

from __future__ import annotations

import json
import re
import socket
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import trustme
from doctor_command import WITHOUT_FOREIGN_MEMORY, ask, ask_here, doctor, limited_to
from typer.testing import CliRunner

from certificates import Authority
from llm_datadist.cli import app

SECRET = "a secret of more than sixteen bytes"


def test_a_machine_on_which_all_is_well_is_measured() -> None:
    said = ask(measures=True)
    assert said.problems() == set()
    for name in ("memcpy", "cma", "tcp"):
        assert said.findings[name]["data"]["gb_per_s"] > 0
    assert "every byte verified" in said.text("cma")
    assert said.findings["packages"]["data"]["protocol"] == 1
    assert said.findings["system"]["data"]["cores"] >= 1


@pytest.mark.long
def test_where_foreign_memory_is_denied_links_are_said_to_be_slow() -> None:
    # all that links log, in both processes, has to stay out of the JSON
    said = ask(measures=True, wrapper=WITHOUT_FOREIGN_MEMORY, ASCEND_GLOBAL_LOG_LEVEL="1")
    assert said.problems() == {"seccomp", "cma"}
    assert "process_vm_readv is refused (Operation not permitted)" in said.text("seccomp")
    assert "--cap-add SYS_PTRACE" in said.text("seccomp")
    assert "does not work: no path works in both directions (cma: " in said.text("cma")
    assert said.findings["tcp"]["data"]["gb_per_s"] > 0


def test_the_screen_has_a_row_for_each_finding_and_a_verdict() -> None:
    done = doctor("--no-measure", wrapper=limited_to(150), COLUMNS="200")
    assert done.returncode == 1
    for row in ("same host (cma)", "  ok             ptrace scope", "  problem        descriptors"):
        assert f"\n{row}" in f"\n{done.stdout}"
    assert "150: enough for 1 link at its busiest" in done.stdout
    assert "→ raise the hard limit" in done.stdout
    assert done.stdout.endswith("\ndoctor: to mend: descriptors\n")


def lines_of(width: int, height: int, *arguments: str) -> list[str]:
    """What a terminal of that size shows."""
    done = doctor(
        "--listen", "0.0.0.0:0", *arguments,
        COLUMNS=str(width), LINES=str(height), FORCE_COLOR="1", TERM="xterm",
    )  # fmt: skip
    assert done.returncode == 1
    return re.sub(r"\x1b\[[0-9;]*m", "", done.stdout).splitlines()


def test_a_small_terminal_gets_what_is_to_be_done_and_the_names_of_the_rest() -> None:
    lines = lines_of(80, 24)
    assert len(lines) < 24
    assert max(map(len, lines)) <= 80
    assert lines[0].rstrip() == "to mend"
    assert lines[1].startswith("  listening ")
    assert any(line.startswith("  speed ") and "memcpy " in line for line in lines)
    assert lines[-1] == "doctor: to mend: listening; --all says more"


def test_every_finding_is_shown_where_there_is_room_and_where_it_is_asked_for() -> None:
    for lines in (lines_of(200, 60, "--no-measure"), lines_of(80, 24, "--no-measure", "--all")):
        assert "same host (cma)" in [line.rstrip() for line in lines]
        assert lines[-1] == "doctor: to mend: listening"


def test_what_the_environment_forbids_a_cluster_is_said_of_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        missing = json.dumps({"secret_file": str(tmp_path / "missing")})
        said = ask(
            "--listen", f"127.0.0.1:{port}", measures=True, security=missing, LLM_DATADIST_PATH="x"
        )
    assert said.problems() == {"paths", "listening", "link security", "allowed paths"}
    assert "another process has it" in said.text("listening")
    assert f"ss -ltnp sport = :{port}" in said.text("listening")
    assert f"there is no file {tmp_path}" in said.text("link security")
    assert "no cluster works here: " in said.text("paths")
    assert "must be one of auto, cma, tcp, nixl" in said.text("allowed paths")


def test_an_address_beyond_loopback_needs_security() -> None:
    said = ask_here("--listen", "0.0.0.0:0", LLM_DATADIST_PATH="tcp")
    assert said.problems() == {"listening"}
    assert "whoever reaches it can link" in said.text("listening")
    assert said.state_of("link security") == "note"
    assert said.findings["allowed paths"]["data"] == {"path": "tcp"}


def test_a_secret_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(SECRET)
    file.chmod(0o644)
    security = json.dumps({"secret_file": str(file)})
    said = ask_here("--listen", "0.0.0.0:0", security=security)
    assert said.problems() == {"link security"}
    assert f"chmod o-r {file}" in said.text("link security")
    file.chmod(0o600)
    assert ask_here(security=security).state_of("link security") == "ok"


@pytest.mark.parametrize(
    ("days", "signer", "state", "message"),
    [
        (90, 0, "ok", "ends in 90 days"),
        (5, 0, "problem", "renew it now"),
        (-1, 0, "problem", "has expired"),
        (90, 1, "problem", "is of another authority"),
    ],
    ids=["good", "ending", "ended", "of-another-ca"],
)
def test_a_certificate_is_tried_against_its_ca(
    days: int, signer: int, state: str, message: str, tmp_path: Path
) -> None:
    cas = trustme.CA(), trustme.CA()
    now = datetime.now(timezone.utc)
    end, begin = now + timedelta(days=days, hours=1), now - timedelta(days=10)
    leaf = cas[signer].issue_cert("cluster.example", not_before=begin, not_after=end)
    files = {name: tmp_path / f"{name}.pem" for name in ("ca", "certificate", "key")}
    cas[0].cert_pem.write_to_path(str(files["ca"]))
    files["certificate"].write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
    files["key"].touch(0o600)
    leaf.private_key_pem.write_to_path(str(files["key"]))
    said = ask_here(security=json.dumps({name: str(file) for name, file in files.items()}))
    assert said.state_of("link security") == state
    assert message in said.text("link security")


def test_under_tls_it_says_what_seals_and_why_not_the_kernel(tmp_path: Path) -> None:
    said = ask_here(security=Authority().issue(tmp_path).option())
    encryption = said.findings["link security"]["data"]["encryption"]
    if Path("/proc/net/tls_stat").exists():  # of the kernel's module
        assert encryption == "ktls"
        assert "sealed by the kernel" in said.text("link security")
    else:
        assert encryption == "tls-records"
        assert "sealed in records of our own: the kernel " in said.text("link security")


@pytest.mark.skipif(Path("/proc/driver/nvidia/gpus").is_dir(), reason="nvidia-smi is not asked")
def test_a_check_that_fails_is_a_finding_and_the_others_go_on(tmp_path: Path) -> None:
    broken = tmp_path / "nvidia-smi"
    broken.write_bytes(b"\x7fELF")
    broken.chmod(0o755)
    said = ask_here(PATH=str(tmp_path))
    assert said.problems() == {"gpus"}
    assert "could not be checked: OSError: [Errno 8] Exec format error" in said.text("gpus")
    assert said.state_of("packages") == "ok"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--peer", "nowhere"],
        ["--peer", "localhost:70000"],
        ["--listen", "localhost:1"],
        ["--listen", "127.0.0.1"],
    ],
    ids=" ".join,
)
def test_wrong_usage_has_a_code_of_its_own(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, ["doctor", *arguments])
    assert done.exit_code == 2
    assert f"Invalid value for {arguments[0]}: " in done.output
