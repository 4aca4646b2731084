"""Peers whose words would do something on a terminal, or in a log: they are shown, not obeyed."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from wire import Wire, impostor, linked_caller, owner

from llm_datadist import BlocksCacheKey, LLMException, LLMRole, LLMStatusCode
from llm_datadist.core import messages as m
from llm_datadist.observe.log import LOGGER_NAME

if TYPE_CHECKING:
    from llm_datadist.testing.cluster import Node

HARM = "\x1b]0;title\x07\x1b[2J\x9b31m\u202ered\r\n[ERROR] LLM_DATADIST(1,Main): a forged line"
#: what is left of it
SHOWN = "\\x1b]0;title\\x07\\x1b[2J\\x9b31m\\u202ered\\r\\n[ERROR]"


def refuse(wire: Wire) -> None:
    wire.receive()
    wire.send(m.Refused(LLMStatusCode.LLM_FAILED, HARM))
    wire.is_ended()


def test_a_refusal_is_one_line_of_the_log(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    node.start(LLMRole.DECODER, 2)
    with caplog.at_level(logging.INFO, LOGGER_NAME), impostor(refuse) as port:
        assert node.link(port, 1) == LLMStatusCode.LLM_FAILED
    assert SHOWN in caplog.text
    assert all(message.isprintable() for message in caplog.messages)


@pytest.mark.parametrize("how", [(), ("--json",)], ids=["screen", "json"])
def test_the_doctor_shows_a_refusal_in_its_place(how: tuple[str, ...]) -> None:
    with impostor(refuse) as port:
        done = subprocess.run(
            [sys.executable, "-m", "llm_datadist", "doctor", "--peer", f"127.0.0.1:{port}", *how],
            capture_output=True, text=True, timeout=60, check=False,
            env={"PYTHONPATH": ":".join(sys.path), "COLUMNS": "300"},
        )  # fmt: skip
    assert done.returncode == 1
    assert all(line.isprintable() for line in done.stdout.split("\n"))
    assert "\n[ERROR]" not in done.stdout
    assert "x1b]0;title" in done.stdout


def test_why_a_path_is_not_used_is_one_line(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    port = node.start(LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0")
    with caplog.at_level(logging.INFO, LOGGER_NAME), linked_caller(port, unmet=HARM):
        [link] = node.datadist.links()
        [told] = node.datadist.stats().links
    assert SHOWN in link.path_reason
    assert link.path_reason.isprintable()
    assert told.path_reason == link.path_reason
    assert all(message.isprintable() for message in caplog.messages)


def test_the_refusal_of_a_pull_is_one_line(node: Node) -> None:
    def answer(wire: Wire, request: m.AnyMessage) -> None:
        wire.send(m.Refused(LLMStatusCode.LLM_FAILED, HARM))

    node.start(LLMRole.DECODER, 2)
    with impostor(owner(answer)) as port:
        assert node.link(port, 1) == LLMStatusCode.LLM_SUCCESS
        with pytest.raises(LLMException) as error:
            node.manager.pull_blocks(BlocksCacheKey(1, 0), node.blocks_cache(), [0], [0])
    assert SHOWN in str(error.value)
    assert str(error.value).isprintable()


def test_an_answer_that_is_none_is_one_line(node: Node) -> None:
    def answer(wire: Wire, request: m.AnyMessage) -> None:
        wire.send(m.ListExports(HARM))

    node.start(LLMRole.DECODER, 2)
    with impostor(owner(answer)) as port:
        assert node.link(port, 1) == LLMStatusCode.LLM_SUCCESS
        with pytest.raises(LLMException) as error:
            node.manager.pull_blocks(BlocksCacheKey(1, 0), node.blocks_cache(), [0], [0])
    assert str(error.value).isprintable()
