"""The site builds without a warning, needs no network, and its reference is complete."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from doc_blocks import ROOT

import llm_datadist

if TYPE_CHECKING:
    from pathlib import Path

#: where nobody listens: what is fetched fails, and a failure is a warning of mkdocs
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)],
        cwd=ROOT,
        env={**os.environ, "HTTP_PROXY": NOWHERE, "HTTPS_PROXY": NOWHERE},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return directory


def test_a_reader_loads_nothing_from_elsewhere(site: Path) -> None:
    loads = re.compile(
        r"<(?:script|img|iframe)[^>]*src=\"(https?:[^\"]+)|<link[^>]*href=\"(https?:[^\"]+)"
    )
    pages = list(site.rglob("*.html"))
    assert len(pages) > 10
    assert {page.name: found for page in pages if (found := loads.findall(page.read_text()))} == {}


def test_the_reference_has_every_public_name(site: Path) -> None:
    api = (site / "api" / "index.html").read_text()
    names = set(llm_datadist.__all__) - {"LlmConfig"}  # another name of LLMConfig
    assert {name for name in names if f'id="llm_datadist.{name}"' not in api} == set()


def test_the_reference_has_every_option_with_its_words(site: Path) -> None:
    api = (site / "api" / "index.html").read_text()
    options = [name for name in vars(llm_datadist.LLMConfig) if not name.startswith("_")]
    missing = {name for name in options if f'id="llm_datadist.LLMConfig.{name}"' not in api}
    assert missing == {"gen_options"}  # another name of generate_options


def test_what_is_cited_is_linked_to_the_specification(site: Path) -> None:
    links = {
        page: re.findall(r'href="([^"#]*specification[^"#]*)#([^"]+)"', page.read_text())
        for page in sorted(site.rglob("*.html"))
        if page.name == "index.html"
    }
    assert len(links[site / "api" / "index.html"]) > 200
    assert len(links[site / "conformance" / "index.html"]) > 50
    anchors = {
        page.parent: set(re.findall(r'id="([^"]+)"', page.read_text()))
        for page in sorted(site.rglob("specification/**/index.html"))
    }
    astray = [
        f"{page.relative_to(site)}: {url}#{anchor}"
        for page, found in links.items()
        for url, anchor in found
        if anchor not in anchors.get((page.parent / url).resolve(), ())
    ]
    assert astray == []
