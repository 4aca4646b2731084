"""Run by hand, by `make planners`: `python -m planners vllm`, `mooncake` or `speed` in tests/.

`vllm` takes an environment with vLLM, the other two one with Mooncake.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table

from planners import agreement, refusals, speed

if TYPE_CHECKING:
    from collections.abc import Iterable

app = typer.Typer(add_completion=False)
_console = Console()


@app.command()
def vllm() -> None:
    """Ranks, heads and bytes against those of vLLM's NIXL connector."""
    _report_refusals(refusals.by_vllm())
    _report("vLLM", agreement.against_vllm())


@app.command()
def mooncake() -> None:
    """Ranks, heads and bytes against those of Mooncake's planner."""
    _report_refusals(refusals.by_mooncake())
    _report("Mooncake", agreement.against_mooncake())


@app.command(name="speed")
def show_speed(rounds: int = 5) -> None:
    """Seconds beside Mooncake's planner, and what 128 k tokens take; medians."""
    table = Table("Llama-3-70B, TP8 to TP4, NHD, 768 tokens")
    for heading in ("segments", "ours, ms", "Mooncake's, ms", "times as long"):
        table.add_column(heading, justify="right")
    for contest in speed.beside_mooncake(rounds):
        table.add_row(
            contest.what, f"{contest.num_segments:,}", f"{contest.our_s * 1e3:.1f}",
            f"{contest.their_s * 1e3:,.0f}", f"{contest.ratio:,.0f}",
        )  # fmt: skip
    _console.print(table)
    table = Table("Llama-3-70B, one destination, HND, 131,072 tokens")
    for heading in ("segments", "ms", "ns a segment", "most memory, MiB"):
        table.add_column(heading, justify="right")
    for size in speed.of_long_requests(rounds):
        table.add_row(
            size.what, f"{size.num_segments:,}", f"{size.seconds * 1e3:.1f}",
            f"{size.ns_per_segment:.2f}", f"{size.peak_nbytes / 2**20:.1f}",
        )  # fmt: skip
    _console.print(table)
    first, again = speed.of_layouts(rounds)
    _console.print(f"layouts compared: {first * 1e6:.0f} µs, again: {again * 1e6:.1f} µs")


def _report_refusals(found: Iterable[refusals.Refusal]) -> None:
    table = Table("asked", "they say", "our segments")
    for refusal in found:
        table.add_row(refusal.what, refusal.said or "planned", f"{refusal.num_segments:,}")
    _console.print(table)


def _report(name: str, tally: agreement.Tally) -> None:
    _console.print(
        f"{name}: {tally.problems:,} problems, {tally.destinations:,} destinations, "
        f"{tally.heads:,} heads of a layer, {tally.nbytes:,} bytes: "
        f"{len(tally.disagreements)} disagreements. {tally.other_replicas:,} destinations read "
        f"another rank with the same heads unless it is told theirs first."
    )
    for line in tally.disagreements[:20]:
        _console.print(line, markup=False)
    if tally.disagreements:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
