"""A shared secret binds the session: who is in the middle can read, and not act in a member's name.

Whatever is done to a frame, nothing of it is carried out, its connection ends, and the log says
why. Between two real processes, over TCP.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from keyed_wire import BY_SECRET, GREETING_NBYTES, HEAD_NBYTES, KeyedWire
from middle import Frame, Middle, flip, shortened, unkeyed
from wire import TRAILER, Wire, impostor

from llm_datadist import BlocksCacheKey, LLMException, LLMRole, LLMStatusCode
from llm_datadist.core import messages as m
from llm_datadist.testing.cluster import Node, NodeProcess, make_array
from llm_datadist.testing.timing import eventually, takes_at_most

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from llm_datadist.testing.cluster import Bytes

SUCCESS = LLMStatusCode.LLM_SUCCESS
TIMEOUT = LLMStatusCode.LLM_TIMEOUT
NOT_YET_LINK = LLMStatusCode.LLM_NOT_YET_LINK
KEY = BlocksCacheKey(1, 0)
SHAPE = (2, 4, 4096)
SYNC_TIMEOUT_MS = 500
SETTINGS: dict[str, Any] = {
    "transfer_path": "tcp", "link_security": BY_SECRET, "sync_kv_timeout": SYNC_TIMEOUT_MS,
}  # fmt: skip
#: what is said of a frame that is not the peer's next one
BETWEEN = "somebody is in between"


# -- run by the owner ------------------------------------------------------------------------------


class Log(logging.Handler):
    """Keeps what is logged in a process."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def start(node: Node, **settings: object) -> int:
    logger, node.log = logging.getLogger("LLM_DATADIST"), Log()  # type: ignore[attr-defined]
    logger.setLevel(logging.WARNING)
    logger.addHandler(node.log)  # type: ignore[attr-defined]
    port = node.start(LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **SETTINGS, **settings)
    node.blocks_cache(*SHAPE, seed=1, key=KEY)
    return port


def logged(node: Node) -> str:
    return "\n".join(node.log.lines)  # type: ignore[attr-defined]


def linked_ids(node: Node) -> list[int]:
    return [link.cluster_id for link in node.datadist.links()]


# -- the ends, and what is between them ------------------------------------------------------------


@pytest.fixture
def middle(node: Node, peer: NodeProcess) -> Iterator[Middle]:
    """Somebody between the owner, cluster 1, and this process, cluster 2, which link there."""
    with Middle(peer.call(start)) as middle:
        node.start(LLMRole.DECODER, 2, **SETTINGS)
        yield middle


@pytest.fixture
def linked(node: Node, middle: Middle) -> Middle:
    """Bytes have moved already, so there is something to say again."""
    assert node.link(middle.port, 1) == SUCCESS
    assert pull(node) == SUCCESS
    return middle


def pull(node: Node) -> LLMStatusCode:
    """No false success: what a pull brings is right."""
    try:
        np.testing.assert_array_equal(pulled(node), make_array(SHAPE, 1))
    except LLMException as error:
        return error.status_code
    return SUCCESS


def pulled(node: Node) -> Bytes:
    """What a pull brings. Raises LLMException."""
    cache, blocks = node.blocks_cache(*SHAPE), list(range(SHAPE[1]))
    node.manager.pull_blocks(KEY, cache, blocks, blocks)
    return node.arrays[cache.cache_id]


#: of a frame, and of an earlier one that went that way on this connection
ALTERATIONS = pytest.mark.parametrize(
    "alter",
    [
        pytest.param(flip(HEAD_NBYTES), id="magic"),
        pytest.param(flip(-1), id="last-byte"),
        pytest.param(flip(5), id="mac"),
        pytest.param(flip(0), id="length"),
        pytest.param(flip(3), id="huge-length"),
        pytest.param(shortened, id="truncated"),
        pytest.param(lambda frame, earlier: earlier, id="replayed"),
        pytest.param(lambda frame, earlier: earlier + frame.data, id="reordered"),
        pytest.param(lambda frame, _: unkeyed(frame) + frame.data, id="injected"),
        pytest.param(lambda frame, _: frame.data[HEAD_NBYTES:], id="without-its-mac"),
        pytest.param(lambda frame, _: b"", id="dropped"),
    ],
)
WAYS = pytest.mark.parametrize("to_caller", [False, True], ids=["questions", "answers"])


# -- streams ---------------------------------------------------------------------------------------


@WAYS
@ALTERATIONS
def test_a_frame_of_a_stream_that_is_altered_is_not_carried_out(
    node: Node, linked: Middle, to_caller: bool, alter: Callable[[Frame, bytes], bytes]
) -> None:  # fmt: skip
    """The pull fails in time, by its deadline where the rest of a frame never comes."""
    kinds = (m.Sending,) if to_caller else (m.Read,)
    [*_, earlier] = [frame.data for frame in linked.seen if isinstance(frame.message, kinds)]
    altered: list[Frame] = []

    def once(frame: Frame) -> bytes:
        if altered or not isinstance(frame.message, kinds):
            return frame.data
        altered.append(frame)
        return alter(frame, earlier)

    linked.alter = once
    with takes_at_most(1.2 * SYNC_TIMEOUT_MS / 1000 + 0.3):
        assert pull(node) in (NOT_YET_LINK, TIMEOUT)
    assert len(altered) == 1
    assert eventually(lambda: pull(node) == SUCCESS), "on another stream"
    assert linked_ids(node) == [1]


@pytest.mark.parametrize("alter", [flip(-1), flip(5)], ids=["last-byte", "mac"])
def test_the_owner_says_that_somebody_is_in_between(
    node: Node, peer: NodeProcess, linked: Middle, alter: Callable[[Frame, bytes], bytes]
) -> None:
    linked.alter = lambda frame: (
        alter(frame, b"") if isinstance(frame.message, m.Read) else frame.data
    )
    assert pull(node) == NOT_YET_LINK
    assert eventually(lambda: BETWEEN in peer.call(logged))


def test_the_caller_says_that_somebody_is_in_between(node: Node, linked: Middle) -> None:
    linked.alter = lambda frame: (
        flip(-1)(frame, b"") if isinstance(frame.message, m.Sending) else frame.data
    )
    with pytest.raises(LLMException, match=BETWEEN):
        node.manager.pull_blocks(KEY, node.blocks_cache(*SHAPE), [0], [0])


def test_the_bytes_of_caches_pass_as_they_are(node: Node, linked: Middle) -> None:
    """Who is in between reads them, and changes them: a secret keys frames alone."""
    heard = []

    def alter(data: bytes) -> bytes:
        heard.append(data)
        return bytes([data[0] ^ 1]) + data[1:]

    linked.alter_bytes = alter
    expected = make_array(SHAPE, 1)
    expected[0, 0, 0] ^= 1
    np.testing.assert_array_equal(pulled(node), expected)
    assert heard[0][: -TRAILER.size] == make_array(SHAPE, 1).tobytes()


def test_verified_transfers_find_changed_bytes(node: Node, peer: NodeProcess) -> None:
    """The checksum travels in a keyed frame."""
    with Middle(peer.call(start, verify_transfers=True)) as middle:
        node.start(LLMRole.DECODER, 2, verify_transfers=True, **SETTINGS)
        assert node.link(middle.port, 1) == SUCCESS
        middle.alter_bytes = lambda data: bytes([data[0] ^ 1]) + data[1:]
        with pytest.raises(LLMException, match="checksums differ"):
            pulled(node)
        middle.alter_bytes = bytes
        assert pull(node) == SUCCESS


# -- the control connection ------------------------------------------------------------------------


@WAYS
@pytest.mark.parametrize("kind", ["unkeyed", "replayed", "reflected"])
def test_a_frame_that_is_added_ends_the_link_and_is_not_carried_out(
    node: Node, peer: NodeProcess, linked: Middle, to_caller: bool, kind: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """A Bye would end it with words between the ends; this ends it because of who is there."""
    caplog.set_level(logging.WARNING, "LLM_DATADIST")
    [hello, welcome] = [
        frame for frame in linked.seen if isinstance(frame.message, m.Hello | m.Welcome)
    ][:2]
    mine, theirs = (welcome, hello) if to_caller else (hello, welcome)
    bye = m.encode(m.Bye())
    data = {
        "unkeyed": len(bye).to_bytes(4, "little") + bytes(HEAD_NBYTES - 4) + bye,
        "replayed": mine.data,
        "reflected": theirs.data,
    }[kind]
    linked.say_on_control(data, to_caller=to_caller)
    assert eventually(lambda: linked_ids(node) == [] == peer.call(linked_ids))
    said = caplog.text if to_caller else peer.call(logged)
    assert BETWEEN in said
    assert m.ByeDone() not in [frame.message for frame in linked.seen]
    assert node.link(linked.port, 1) == SUCCESS
    assert pull(node) == SUCCESS


@pytest.mark.parametrize("kind", [m.Hello, m.Welcome, m.Ready, m.Linked])
@pytest.mark.parametrize("alter", [flip(-1), lambda frame, _: unkeyed(frame)],
                         ids=["altered", "made-up"])  # fmt: skip
def test_a_hand_shake_that_is_altered_makes_no_link(
    node: Node, peer: NodeProcess, middle: Middle, kind: type[m.Message],
    alter: Callable[[Frame, bytes], bytes],
) -> None:  # fmt: skip
    """As when the hand-shake of the secret is passed on as it is, and what follows is not."""
    middle.alter = lambda frame: (
        alter(frame, b"") if isinstance(frame.message, kind) else frame.data
    )
    assert node.link(middle.port, 1) != SUCCESS
    assert linked_ids(node) == []
    assert eventually(lambda: peer.call(linked_ids) == [])
    if kind is m.Hello:
        assert BETWEEN in peer.call(logged)
        assert not [frame for frame in middle.seen if frame.to_caller], "it said nothing to that"
    middle.alter = lambda frame: frame.data
    assert node.link(middle.port, 1) == SUCCESS
    assert pull(node) == SUCCESS


def test_a_greeting_that_comes_back_is_no_proof(node: Node) -> None:
    """The caller's own nonce, and whatever MAC somebody without the secret has at hand."""
    node.start(LLMRole.DECODER, 2, **SETTINGS)

    def reflect(wire: Wire) -> None:
        nonce = wire.receive_bytes(GREETING_NBYTES)[8:]
        wire.send_bytes(nonce + nonce)
        assert wire.is_ended()

    with impostor(reflect) as port, takes_at_most(2.0):
        assert node.link(port, 1) == LLMStatusCode.LLM_LINK_FAILED


def test_a_greeting_that_is_passed_to_its_own_listener_says_nothing_for_who_passed_it(
    node: Node,
) -> None:
    """Its listener proves that it knows the secret; what is altered then is refused as ever."""
    port = node.start(LLMRole.DECODER, 2, listen_ip_info="127.0.0.1:0", **SETTINGS)
    with Middle(port) as middle:
        middle.alter = lambda frame: flip(-1)(frame, b"")
        assert node.link(middle.port, 1) != SUCCESS
        assert linked_ids(node) == []
        assert [type(frame.message) for frame in middle.seen] == [m.Hello]


# -- other members ---------------------------------------------------------------------------------


@pytest.mark.parametrize("is_reverse", [False, True])
def test_a_member_attaches_no_stream_to_a_link_that_is_not_its_own(
    node: Node, linked: Middle, is_reverse: bool
) -> None:
    """It knows the secret, and the token, which it read on the wire. It lacks the link's key."""
    [*_, recorded] = [
        frame.message.proof for frame in linked.seen if isinstance(frame.message, m.Attach)
    ]
    for proof in (b"", bytes(32), recorded, None):
        with KeyedWire.dial(linked.port) as wire:
            own = wire.shield.proof(wire.shield)
            wire.send(m.Attach(linked.token(), is_reverse, own if proof is None else proof))
            assert wire.expect(m.Refused).status == NOT_YET_LINK
            assert wire.is_ended()
    assert pull(node) == SUCCESS
