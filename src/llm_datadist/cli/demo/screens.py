"""What the demo shows: the answers as they grow; in the end a table, and JSON."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from llm_datadist.cli.demo.request import Linked, Request
    from llm_datadist.cli.demo.settings import ModelSource, Settings


class LoadingBars:
    """One bar for each worker."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bars = {
            worker: progress.add_task(worker, total=1.0, doing="starting")
            for worker in ("prefill", "decode")
        }

    def show(self, worker: str, fraction: float, doing: str) -> None:
        """Move a bar."""
        self._progress.update(self._bars[worker], completed=fraction, doing=doing)


class Terminal:
    """The terminal, which shows one answer after the other.

    Several answers grow at the same time. The oldest unfinished one streams; the others are held
    back, and appear at once up to where they are when their turn comes.
    """

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        #: the request whose answer streams, and the characters shown of it; None: not its heading
        self._current = 0
        self._num_shown: int | None = None

    def show_start(self, model: ModelSource, num_threads: int) -> None:
        """Say what is about to happen."""
        threads = f"{num_threads} thread{'s' if num_threads > 1 else ''}"
        self._say(f"{model.name} twice on the CPU, {threads} each: prefill and decode", "bold")

    @contextmanager
    def loading_bars(self) -> Iterator[LoadingBars]:
        """Bars that go away when both workers are ready."""
        with self._progress() as progress:
            yield LoadingBars(progress)

    def show_link(self, linked: Linked) -> None:
        """Say how decode reads prefill's memory, and why not faster."""
        self._say(f"decode is linked to prefill, path: {linked.path}", "bold")
        if linked.path_reason:
            self._say(f"This is not the fastest path: {linked.path_reason}", "yellow")

    def show_answers(self, requests: Sequence[Request]) -> None:
        """Print what is new of the answers, in the order of the requests."""
        while self._current < len(requests) and requests[self._current].tokens:
            request = requests[self._current]
            if self._num_shown is None:
                self._show_heading(request)
                self._num_shown = 0
            # without the blank lines around it; those inside come with the text that follows them
            text = request.text.strip()
            self._console.out(text[self._num_shown :], end="", highlight=False)
            self._num_shown = len(text)
            if not request.is_finished:
                return
            self._console.out("")
            self._current, self._num_shown = self._current + 1, None

    def proving_bar(self, requests: Sequence[Request]) -> Iterator[Request]:
        """Go through `requests` under a bar."""
        with self._progress() as progress:
            bar = progress.add_task("proof", total=len(requests), doing="")
            for request in requests:
                progress.update(
                    bar, doing=f"prompt {request.request_id + 1} by plain generation in one process"
                )
                yield request
                progress.advance(bar)

    def show_report(self, table: Table, verdict: str) -> None:
        """Show the end of it."""
        self._console.out("")
        self._console.print(table)
        self._say(verdict, "bold")

    def _show_heading(self, request: Request) -> None:
        *context, question = request.prompt.text.split("\n\n")
        self._console.out("")
        self._say(f"[{request.request_id + 1}] {'… ' if context else ''}{question}", "bold cyan")
        blocks = "1 block" if request.num_blocks == 1 else f"{request.num_blocks} blocks"
        self._say(
            f"    {request.num_tokens} prompt tokens; {blocks} pulled: "
            f"{request.kv_mib:.1f} MiB in {request.transfer_s * 1e3:.1f} ms",
            "dim",
        )

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description:>7}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[doing]}"),
            console=self._console,
            transient=True,
            # a pipe or a log file gets no bars
            disable=not self._console.is_terminal,
        )

    def _say(self, text: str, style: str) -> None:
        self._console.print(Text(text, style), soft_wrap=True)


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
        file.write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n", encoding="utf-8")


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
