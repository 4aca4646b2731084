"""What the demo shows while it runs."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.table import Table

    from llm_datadist.cli.demo.messages import Linked, Role
    from llm_datadist.cli.demo.model_source import ModelSource
    from llm_datadist.cli.demo.request import Request


class LoadingBars:
    """One bar for each worker."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        roles: tuple[Role, ...] = ("prefill", "decode")
        self._bars = {role: progress.add_task(role, total=1.0, doing="starting") for role in roles}

    def show(self, role: Role, fraction: float, doing: str) -> None:
        """Move a bar."""
        self._progress.update(self._bars[role], completed=fraction, doing=doing)


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
