"""The commands of the page on security make what clusters link with."""

from __future__ import annotations

import json
import re
import stat
import subprocess
from typing import TYPE_CHECKING

import pytest
from doc_blocks import DOCS, ROOT, TERMINALS, blocks_of

from llm_datadist import LLMRole, LLMStatusCode
from llm_datadist.link_security import LinkSecurity
from llm_datadist.testing.cluster import Node
from llm_datadist.transport.shields import Shields

if TYPE_CHECKING:
    from pathlib import Path

    from llm_datadist.testing.cluster import NodeProcess


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all commands of the page have made, in their order."""
    folder = tmp_path_factory.mktemp("made")
    for block in blocks_of(DOCS / "security.md"):
        if block.title:
            (folder / block.title).write_text(block.text)
        elif block.language in TERMINALS:
            subprocess.run(
                ["bash", "-e", "-c", block.text], cwd=folder, check=True, capture_output=True
            )
    return folder


def who_can_do_what() -> list[tuple[str, str]]:
    """The cells of the page's table, each with what is in front of its row."""
    page = (DOCS / "security.md").read_text()
    table = page.split("## What is protected")[1].split("| -- |", 1)[1].split("\n\n", 1)[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[1:]]
    assert all(len(row) == 4 for row in rows), "who, and three kinds of link security"
    return [(row[0], cell) for row in rows for cell in row[1:]]


@pytest.mark.parametrize(("who", "cell"), who_can_do_what())
def test_each_cell_of_who_can_do_what_leads_to_a_test(who: str, cell: str) -> None:
    named = re.findall(r'\]\(\.\./(tests/\w+/test_\w+\.py) "(test_\w+)"\)', cell)
    assert named, f"{who}: {cell}"
    for file, test in named:
        assert f"\ndef {test}(" in (ROOT / file).read_text(), f"{who}: {test}"


def options(made: Path) -> dict[str, str]:
    files = {"ca": "ca.pem", "certificate": "me.pem", "key": "me.key"}
    return {
        "secret": json.dumps({"secret_file": str(made / "secret")}),
        "tls": json.dumps({field: str(made / file) for field, file in files.items()}),
    }


@pytest.mark.parametrize("kind", ["secret", "tls"])
def test_clusters_link_with_what_was_made(
    node: Node, peer: NodeProcess, made: Path, kind: str
) -> None:
    option = options(made)[kind]
    port = peer.call(
        Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", link_security=option
    )
    node.start(LLMRole.DECODER, 1, link_security=option)  # the certificate is for cluster 1
    assert node.link(port, 1) == LLMStatusCode.LLM_SUCCESS


@pytest.mark.parametrize("name", ["secret", "ca.key", "me.key"])
def test_only_the_owner_can_read_what_must_be_secret(made: Path, name: str) -> None:
    assert not (made / name).stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)


def test_the_certificate_names_its_cluster(made: Path) -> None:
    shields = Shields(LinkSecurity.parse(options(made)["tls"]))
    caller, listener = shields.make(is_caller=True), shields.make(is_caller=False)
    to, data = listener, caller.start()
    while data:
        data, to = to.answer(data), caller if to is listener else listener
    certificate = listener.peer_certificate
    assert certificate is not None
    assert certificate.cluster_ids == {1}
