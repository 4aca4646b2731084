"""Whoever answers `llm-datadist top` may be anybody: its figures spoil nobody else's row."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
from msgspec.structs import replace
from typer.testing import CliRunner
from wire import Wire, impostor

from llm_datadist import LLMException, LLMRole, LLMStatusCode
from llm_datadist.cli import app
from llm_datadist.core import messages as m
from llm_datadist.core.stats import (
    MAX_TOLD,
    ClusterStats,
    HeldKey,
    Histogram,
    LinkStats,
    OperationStats,
    PoolStats,
)
from llm_datadist.endpoint import Endpoint
from llm_datadist.peer.asking import ask_stats
from llm_datadist.testing.timing import takes_at_most

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_datadist.testing.cluster import Node

TIMES = Histogram((3, *[0] * 22), 1.0)
OPERATION = OperationStats("pull", 1, "tcp", 3, (), 4096, 1, TIMES, TIMES, TIMES, TIMES)
LINK = LinkStats(1, "tcp", "linked")
POOL = PoolStats("DEVICE", "pages", 2**30, 2**20, 2**20)
HONEST = ClusterStats(
    7, 10.0, 1, 0, 0, True, HeldKey(1, 2.0), (LINK,), (POOL,), (OPERATION,)
)  # fmt: skip


def answers(stats: ClusterStats) -> Callable[[Wire], None]:
    def serve(wire: Wire) -> None:
        wire.expect(m.AskStats)
        wire.send(m.Stats(stats))
        wire.is_ended()

    return serve


def top(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["top", *arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def strictly(text: str) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


#: what can be shown
EXTREMES = {
    "just started": replace(HONEST, uptime_s=0.0),
    "no time at all": replace(HONEST, uptime_s=5e-324),
    "age": replace(HONEST, uptime_s=1e12, oldest_key=HeldKey(1, 1e12)),
    "counts": replace(
        HONEST,
        cluster_id=2**64 - 1,
        operations=(replace(OPERATION, nbytes=2**62, duration=Histogram((2**62,) * 23, 1e12)),),
        pools=(PoolStats("DEVICE", "pages", 1, 2**62, 2**62),),
    ),
    "nothing": ClusterStats(0, 0.0, 0, 0, 0, False),
    "as many links as may be": replace(HONEST, links=(LINK,) * MAX_TOLD),
}
NUMBERS = [math.nan, math.inf, -math.inf, -1.0, 1e13, 1e300]
#: what is no answer
LIES = {
    **{f"uptime {number}": replace(HONEST, uptime_s=number) for number in NUMBERS},
    **{f"age {number}": replace(HONEST, oldest_key=HeldKey(1, number)) for number in NUMBERS},
    **{
        f"time {number}": replace(
            HONEST, operations=(replace(OPERATION, lookup=Histogram(TIMES.counts, number)),)
        )
        for number in NUMBERS
    },
    "bytes": replace(HONEST, operations=(replace(OPERATION, nbytes=2**63),)),
    "a negative count": replace(HONEST, num_links=-1),
    "links without end": replace(HONEST, links=(LINK,) * (MAX_TOLD + 1)),
    "pools without end": replace(HONEST, pools=(POOL,) * (MAX_TOLD + 1)),
    "failures without end": replace(
        HONEST, operations=(replace(OPERATION, failures=(("LLM_FAILED", 1),) * (MAX_TOLD + 1)),)
    ),
    "a long word": replace(HONEST, links=(replace(LINK, path="x" * 100_000),)),
}


@pytest.mark.parametrize("stats", EXTREMES.values(), ids=EXTREMES)
def test_figures_that_can_be_are_shown(stats: ClusterStats) -> None:
    with impostor(answers(stats)) as port:
        at = f"127.0.0.1:{port}"
        code, table = top(at, "--once")
        assert (code, str(stats.cluster_id) in table) == (0, True)
        code, said = top(at, "--json")
    assert (code, strictly(said)["clusters"][0]["stats"]["cluster_id"]) == (0, stats.cluster_id)


@pytest.mark.parametrize("stats", LIES.values(), ids=LIES)
def test_figures_that_cannot_be_are_no_answer(stats: ClusterStats) -> None:
    with impostor(answers(stats)) as port:
        with pytest.raises(LLMException, match="answered garbage") as error:
            ask_stats(Endpoint("127.0.0.1", port), None, 5.0)
        code, said = top(f"127.0.0.1:{port}", "--json")
    assert error.value.status_code == LLMStatusCode.LLM_FAILED
    assert code == 3
    assert "garbage" in strictly(said)["clusters"][0]["problem"]


@pytest.mark.parametrize("name", ["uptime nan", "uptime inf", "links without end"])
def test_the_rows_of_the_others_are_there(node: Node, name: str) -> None:
    honest = node.start(LLMRole.PROMPT, 4711, listen_ip_info="127.0.0.1:0")
    with impostor(answers(LIES[name])) as port:
        code, table = top(f"127.0.0.1:{port}", f"127.0.0.1:{honest}", "--once")
    assert code == 3
    assert "garbage" in table
    assert "4711" in table


def test_an_answer_that_announces_much_is_not_waited_for() -> None:
    def serve(wire: Wire) -> None:
        wire.expect(m.AskStats)
        wire.send_bytes(m.HEADER.pack(m.MAGIC, m.MAX_STATS_NBYTES + 1))
        wire.is_ended()

    with impostor(serve) as port, takes_at_most(2.0), pytest.raises(LLMException, match="cap"):
        ask_stats(Endpoint("127.0.0.1", port), None, 10.0)


def test_an_answer_in_drops_ends_with_the_timeout() -> None:
    def serve(wire: Wire) -> None:
        wire.expect(m.AskStats)
        frame = m.encode(m.Stats(HONEST))
        wire.socket.settimeout(0.02)
        for index in range(len(frame)):
            wire.send_bytes(frame[index : index + 1])
            try:
                wire.receive_bytes(1)  # nothing comes, but the end
            except TimeoutError:
                continue

    with impostor(serve) as port, takes_at_most(1.0), pytest.raises(LLMException) as error:
        ask_stats(Endpoint("127.0.0.1", port), None, 0.4)
    assert error.value.status_code == LLMStatusCode.LLM_TIMEOUT
