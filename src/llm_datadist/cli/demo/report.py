"""What the demo found: as a table, and as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from llm_datadist.cli.demo.messages import Linked
    from llm_datadist.cli.demo.request import Request
    from llm_datadist.cli.demo.settings import Settings


@dataclass(frozen=True, slots=True)
class Report:
    """The figures of one run."""

    settings: Settings
    linked: Linked
    requests: Sequence[Request]

    @property
    def verdict(self) -> str:
        """The last line of the demo."""
        return f"demo: {self.num_identical}/{len(self.requests)} identical"

    @property
    def num_identical(self) -> int:
        """How many answers are those of plain generation, token by token."""
        return sum(request.is_identical for request in self.requests)

    @property
    def is_proven(self) -> bool:
        """Whether all of them are."""
        return self.num_identical == len(self.requests)

    def to_table(self) -> Table:
        """A row a request."""
        table = Table(padding=(0, 1))
        for heading in (
            "prompt\ntokens",
            "blocks",
            "KV\nMiB",
            "path",
            "transfer\nms",
            "GB/s",
            "first\ntoken s",
            "identical",
        ):
            table.add_column(heading, justify="right")
        for request in self.requests:
            table.add_row(
                str(request.num_tokens),
                str(request.num_blocks),
                f"{request.kv_mib:.1f}",
                self.linked.path,
                f"{request.transfer_s * 1e3:.2f}",
                f"{request.gb_per_s:.2f}",
                f"{request.time_to_first_token_s:.2f}",
                "yes" if request.is_identical else "NO",
            )
        return table

    def write_json(self, file: Path) -> None:
        """Write all figures, the tokens included, to `file`."""
        figures = {
            "model": self.settings.model.name,
            "block_tokens": self.settings.block_tokens,
            "max_new_tokens": self.settings.max_new_tokens,
            "threads_per_process": self.settings.num_threads,
            "path": self.linked.path,
            "path_reason": self.linked.path_reason,
            "num_identical": self.num_identical,
            "requests": [_figures(request) for request in self.requests],
        }
        file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _figures(request: Request) -> dict[str, object]:
    return {
        "prompt_tokens": request.num_tokens,
        "blocks": request.num_blocks,
        "kv_bytes": request.nbytes,
        "transfer_ms": request.transfer_s * 1e3,
        "gb_per_s": request.gb_per_s,
        "submitted_s": request.submitted_s,
        "finished_s": request.finished_s,
        "time_to_first_token_s": request.time_to_first_token_s,
        "identical": request.is_identical,
        "tokens": request.tokens,
        "plain_tokens": request.plain_tokens,
        "text": request.text,
    }
