"""The example of docs/hixl.md, which `test_pages` runs, is the one in examples/."""

from __future__ import annotations

from doc_blocks import DOCS, ROOT, blocks_of


def test_the_example_is_that_of_the_page() -> None:
    block = next(each for each in blocks_of(DOCS / "hixl.md") if each.title == "hand_over.py")
    assert (ROOT / "examples" / "hixl" / "hand_over.py").read_text() == block.text
    code = [line for line in block.text.splitlines() if line]
    assert len(code) <= 20
