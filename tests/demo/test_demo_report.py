"""What the demo says in the end."""

from __future__ import annotations

from pathlib import Path

from command_line import figures

from llm_datadist.cli.demo.request import HandOver, Linked, Prompt, Pulled, Request, Token
from llm_datadist.cli.demo.screens import Report
from llm_datadist.cli.demo.settings import LinkPath, ModelSource, Settings

SETTINGS = Settings(ModelSource(Path("/models/tiny")), 4, 16, 0, LinkPath.AUTO)


def answered(tokens: list[int], plain_tokens: list[int]) -> Request:
    """A request that decode answered with `tokens`, and one process alone with `plain_tokens`."""
    request = Request(0, Prompt("Why?"), submitted_s=100.0)
    request.note_hand_over(
        HandOver(0, num_tokens=20, num_blocks=2, handle="{}", first_token=tokens[0])
    )
    request.note_pulled(Pulled(0, nbytes=2**20, duration_s=0.002))
    for delay_s, token in enumerate(tokens, start=1):
        is_last = delay_s == len(tokens)
        request.note_token(Token(0, token, f"<{token}>", is_last), 100.0 + delay_s)
    request.plain_tokens = plain_tokens
    return request


def test_all_identical_is_proven() -> None:
    report = Report(SETTINGS, Linked("cma", ""), [answered([1, 2], [1, 2])] * 2)
    assert report.verdict == "demo: 2/2 identical"
    assert report.is_proven


def test_one_different_token_is_no_proof() -> None:
    requests = [answered([1, 2], [1, 2]), answered([1, 2], [1, 3])]
    report = Report(SETTINGS, Linked("cma", ""), requests)
    assert report.verdict == "demo: 1/2 identical"
    assert not report.is_proven


def test_a_shorter_answer_is_not_identical() -> None:
    assert not answered([1, 2], [1, 2, 3]).is_identical


def test_a_request_measures_its_transfer_and_its_first_token() -> None:
    request = answered([1, 2], [1, 2])
    assert request.kv_mib == 1.0
    assert request.gb_per_s == 2**20 / 0.002 / 1e9
    assert request.time_to_first_token_s == 1.0
    assert request.text == "<1><2>"
    assert request.finished_s == 102.0


def test_the_figures_are_written_as_json(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    Report(SETTINGS, Linked("tcp", "not permitted"), [answered([1], [2])]).write_json(file)
    found = figures(file)
    assert (found["path"], found["path_reason"]) == ("tcp", "not permitted")
    assert (found["num_identical"], found["requests"][0]["identical"]) == (0, False)
    assert (found["requests"][0]["prompt_tokens"], found["requests"][0]["blocks"]) == (20, 2)
