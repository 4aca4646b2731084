"""What releases have put on the wire is understood and written as ever. RELEASING.md, The wire."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, get_args

import msgspec
import pytest
from record import FOLDER, Recorded, difference, file_of, recorded, what_to_do

from llm_datadist.core import messages as m
from llm_datadist.core.link import Identity, ListenerLink
from llm_datadist.core.link_actions import Send
from llm_datadist.core.stats import ClusterStats

if TYPE_CHECKING:
    from collections.abc import Callable

VERSION = m.PROTOCOL_VERSION
VERSIONS = [int(re.findall(r"\d+", file.name)[0]) for file in FOLDER.glob("protocol-*.json")]


def first(version: int, kind: type[m.Message]) -> Recorded:
    return next(each for each in recorded(version) if each.message == kind.__name__)


def test_this_protocol_version_is_recorded() -> None:
    assert file_of(VERSION).exists(), "run `python tests/protocol/record.py`"


def test_frames_of_this_protocol_are_understood_and_written_as_they_were() -> None:
    found = [text for old in recorded(VERSION) if (text := difference(old)) is not None]
    assert not found, "\n".join([*found, what_to_do(VERSION)])


def test_every_type_of_message_is_recorded() -> None:
    types = {kind.__name__ for kind in get_args(m.AnyMessage)}
    missing = types - {each.message for each in recorded(VERSION)}
    assert not missing, f"add {missing} to tests/protocol/samples.py. {what_to_do(VERSION)}"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", [m.Hello, m.Refused])
def test_what_two_versions_say_when_they_meet_is_understood(
    version: int, kind: type[m.Message]
) -> None:
    old = first(version, kind)
    assert difference(old) is None
    assert old.says.get("version", version) == version


def test_a_later_protocol_is_refused_with_both_versions_although_its_hello_has_more() -> None:
    tag, _, *fields = msgspec.msgpack.decode(first(VERSION, m.Hello).body)
    hello = m.decode(msgspec.msgpack.encode([tag, VERSION + 1, *fields, "more", 7]))
    assert isinstance(hello, m.Hello)
    me = Identity(5, bytes(16), True, {}, m.ProbeTarget(0, bytes(16), 0, 0))
    sent, *_ = ListenerLink(me).admit(hello, is_known=False)
    assert isinstance(sent, Send)
    assert isinstance(sent.message, m.Refused)
    assert f"cluster 5 speaks protocol {VERSION}, its peer {VERSION + 1}" in sent.message.message


def decoder_of(kind: Any) -> Callable[[bytes], m.Message]:
    decode: Callable[[bytes], m.Message] = msgspec.msgpack.Decoder(kind).decode
    return decode


LINKED = Recorded("Linked", {"path": "cma"}, m.encode(m.Linked("cma")).hex())


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        pytest.param([("path", str), ("more", int, 0)], "is written as", id="a field more"),
        pytest.param([("reason", str)], "is understood as", id="another meaning"),
    ],
)
def test_a_message_that_was_changed_is_found(fields: list[Any], complaint: str) -> None:
    changed = msgspec.defstruct("Linked", fields, bases=(m.Message,), tag=5)
    assert complaint in str(difference(LINKED, decoder_of(changed)))


def test_a_message_that_is_refused_now_is_found() -> None:
    gone = Recorded("Gone", {}, (m.HEADER.pack(m.MAGIC, 2) + b"\x91\x7f").hex())
    assert "Gone is no longer understood" in str(difference(gone))


def test_a_hello_may_have_more_behind_it() -> None:
    longer = msgspec.defstruct("Hello", [("more", int, 0)], bases=(m.Hello,), tag=1)
    assert difference(first(VERSION, m.Hello), decoder_of(longer)) is None


def test_stats_may_have_more_in_their_maps_and_not_beside_them() -> None:
    old = first(VERSION, m.Stats)
    richer = msgspec.defstruct("Richer", [("more", int, 0)], bases=(ClusterStats,), frozen=True)
    inside = msgspec.defstruct("Stats", [("stats", richer)], bases=(m.Message,), tag=33)
    beside = msgspec.defstruct("Stats", [("more", int, 0)], bases=(m.Stats,), tag=33)
    assert difference(old, decoder_of(inside)) is None
    assert "is written as" in str(difference(old, decoder_of(beside)))


def test_who_changed_the_wire_is_told_what_to_do() -> None:
    hint = what_to_do(VERSION)
    assert "Raise PROTOCOL_VERSION in core/messages.py" in hint
    assert "python tests/protocol/record.py" in hint
