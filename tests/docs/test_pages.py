"""The code on the pages of docs/ does what the pages say. `doc_blocks` has the rules."""

from __future__ import annotations

import importlib.util
import socket
from typing import TYPE_CHECKING

import pytest
import trustme
from doc_blocks import DOCS, LANGUAGES, NOT_RUN, READMES, blocks_of, run_page

if TYPE_CHECKING:
    from pathlib import Path

#: the code of testing.md needs its example project: tests/e2e/test_testing_kit.py runs it
PAGES = sorted(page for page in DOCS.rglob("*.md") if page.name != "testing.md")
TRANSLATED = sorted((DOCS / "zh").glob("*.md"))
#: what the code of a page needs, and not everybody has
NEEDS = {"transformers.md": "transformers"}
#: the blocks that cannot run on one machine
MOST_NOT_RUN = 3


def name_of(page: Path) -> str:
    return str(page.relative_to(DOCS))


@pytest.fixture(scope="module")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages suppose to lie in /etc/kv."""
    directory = tmp_path_factory.mktemp("kv")
    authority = trustme.CA()
    mine = authority.issue_cert("kv")
    authority.cert_pem.write_to_path(directory / "ca.pem")
    mine.cert_chain_pems[0].write_to_path(directory / "me.pem")
    mine.private_key_pem.write_to_path(directory / "me.key")
    (directory / "secret").write_text("0123456789abcdef")
    return directory


@pytest.mark.parametrize("page", [page for page in PAGES if page not in TRANSLATED], ids=name_of)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, credentials: Path) -> None:
    needed = NEEDS.get(page.name)
    if needed and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    run_page(page, tmp_path, {"26000": port, "/etc/kv": str(credentials)})


@pytest.mark.parametrize("page", TRANSLATED, ids=name_of)
def test_a_translation_has_the_code_of_its_original(page: Path) -> None:
    original = blocks_of(DOCS / page.name)
    assert original
    assert blocks_of(page) == original


def test_few_blocks_are_not_run() -> None:
    blocks = [block for page in PAGES + READMES for block in blocks_of(page)]
    skipped = [block.text.splitlines()[0] for block in blocks if not block.is_run]
    assert len(skipped) <= MOST_NOT_RUN, skipped
    assert all(len(reason) > len(NOT_RUN) for reason in skipped)


def test_every_block_says_what_it_is() -> None:
    """A language that nobody knows here would not be run."""
    found = {block.language for page in PAGES + READMES for block in blocks_of(page)}
    assert found <= LANGUAGES
