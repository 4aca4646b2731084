"""The kernel's TLS where no kernel is needed: keys, agreement, and streams that are worn."""

from __future__ import annotations

import math
import secrets
import socket
import ssl
import struct
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from certificates import Authority, contexts_of
from isolation import needs_root
from llm_datadist.core import messages as m
from llm_datadist.link_security import LinkSecurity
from llm_datadist.peer.streams import StreamPool
from llm_datadist.running.deadline import Deadline
from llm_datadist.transport import ktls, records
from llm_datadist.transport.shield import KernelKeys, NotAuthentic, Open
from llm_datadist.transport.shields import Shields
from llm_datadist.transport.stream import Stream
from llm_datadist.transport.tls import Tls
from meeting import meet
from programs import environment

#: struct tls12_crypto_info_aes_gcm_128: version, cipher, iv, key, salt, number of the next record
INFO = struct.Struct("=HH8s16s4s8s")


def contexts(folder: Path, *able: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A caller's and a listener's, of ends that can do so much."""
    files = Authority().issue(folder)
    caller, listener = contexts_of(files, files.ca)
    caller.set_alpn_protocols(list(able))
    listener.set_alpn_protocols([ktls.PROTOCOL, records.PROTOCOL])
    return caller, listener


def test_keys_are_as_the_kernel_takes_them() -> None:
    parts = secrets.token_bytes(records.PART_NBYTES), secrets.token_bytes(records.PART_NBYTES)
    caller = ktls.keys_of(*parts, is_caller=True)
    listener = ktls.keys_of(*parts, is_caller=False)
    assert (caller.sent, caller.came) == (listener.came, listener.sent)
    for info in caller:
        version, cipher, iv, key, salt, number = INFO.unpack(info)
        assert (version, cipher, number) == (0x0304, 51, bytes(8)), "TLS 1.3, AES-GCM-128, anew"
        assert len({iv, key[:8], key[8:]}) == 3
        assert salt != iv[:4]


def test_no_two_keys_are_alike() -> None:
    """Not of the two directions, of other parts, or of parts that changed places."""
    parts = bytes(32), b"\x01" * 32
    made = [
        *ktls.keys_of(*parts, is_caller=True),
        *ktls.keys_of(*parts[::-1], is_caller=True),
        *ktls.keys_of(parts[0], b"\x02" * 32, is_caller=True),
    ]
    for first in (4, 12, 28):
        assert len({info[first : first + 4] for info in made}) == len(made)


@pytest.mark.parametrize(
    ("able", "expected"),
    [
        ((ktls.PROTOCOL, records.PROTOCOL), "ktls"),
        ((records.PROTOCOL, ktls.PROTOCOL), "ktls"),
        ((ktls.PROTOCOL,), "ktls"),
        ((records.PROTOCOL,), "tls-records"),
        (("something later",), "tls"),
    ],
)
def test_both_ends_agree_on_the_best_that_both_can(
    tmp_path: Path, able: tuple[str, ...], expected: str
) -> None:
    ours, theirs = contexts(tmp_path, *able)
    caller, listener = Tls(ours, is_caller=True), Tls(theirs, is_caller=False)
    assert meet(caller, listener) == ("", "")
    for end in (caller, listener):
        assert end.encryption == expected
        assert end.seals_all == (expected != "ktls"), "then the bytes of caches go as they are"
        assert end.most_nbytes == (2**38 if expected == "ktls" else math.inf)
    frame = m.encode(m.AskStats())
    said = caller.seal(frame)
    assert (said == frame) == (expected == "ktls")
    assert listener.open(said) == frame
    if expected == "ktls":
        assert caller.kernels is not None
        assert listener.kernels == KernelKeys(caller.kernels.came, caller.kernels.sent)
    else:
        assert caller.kernels is listener.kernels is None


def test_what_is_said_between_the_keys_and_the_kernel_is_refused(tmp_path: Path) -> None:
    """It would be taken for what was said under the keys."""
    ours, theirs = contexts(tmp_path, ktls.PROTOCOL)
    came, sent = ssl.MemoryBIO(), ssl.MemoryBIO()
    caller, listener = ours.wrap_bio(came, sent), Tls(theirs, is_caller=False)
    with suppress(ssl.SSLWantReadError):
        caller.do_handshake()
    came.write(listener.answer(sent.read()))
    caller.do_handshake()
    caller.write(bytes(records.PART_NBYTES))
    with pytest.raises(NotAuthentic, match="before the hand-shake had ended"):
        listener.answer(sent.read() + b"\x17\x03\x03\x00\x20" + bytes(32))


def test_where_the_kernel_cannot_a_sentence_says_why(tmp_path: Path) -> None:
    reason = ktls.why_not()
    assert (reason == "") == Path("/proc/net/tls_stat").exists(), reason
    files = [str(file) for file in Authority().issue(tmp_path)]
    shields = Shields(LinkSecurity(None, "", *files))
    for over_tcp in (True, False):
        caller = shields.make(is_caller=True, over_tcp=over_tcp)
        assert meet(caller, shields.make(is_caller=False)) == ("", "")
        expected = "tls-records" if reason or not over_tcp else "ktls"
        assert caller.encryption == expected


IN_A_SANDBOX = """
import sandbox, socket
from llm_datadist.transport import ktls
from llm_datadist.transport.records import PART_NBYTES

sandbox.pretend_kernel_tls()
print(ktls.why_not())
with socket.create_server(("127.0.0.1", 0)) as server:
    caller = socket.create_connection(server.getsockname())
    try:
        ktls.hand_over(caller, ktls.keys_of(bytes(PART_NBYTES), bytes(PART_NBYTES), is_caller=True))
    except OSError as error:
        print(ktls.why_not_taken(error))
"""
WITHOUT_LOOPBACK = """
import isolation, time
from llm_datadist.transport import ktls

isolation.leave_network(None)
begun = time.monotonic()
print(ktls.why_not())
print(time.monotonic() - begun < 1.0)
"""


def said_by(program: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(), capture_output=True, text=True, check=True, timeout=60.0,
    )  # fmt: skip
    return done.stdout.splitlines()


def test_a_kernel_that_only_says_that_it_encrypts_is_not_believed() -> None:
    """As sandboxes do that answer options which they do not know with success."""
    reason, not_taken = said_by(IN_A_SANDBOX)
    assert reason == "the kernel takes keys, and sends in plain"
    assert not_taken.startswith("the kernel does not take the connection over: ")


@needs_root
def test_a_host_whose_loopback_is_down_says_so_at_once() -> None:
    reason, is_soon = said_by(WITHOUT_LOOPBACK)
    assert reason == "no connection within this host shows it (Network is unreachable)"
    assert is_soon == "True"


class Worn(Open):
    """Good for so much."""

    most_nbytes = 100.0


def test_a_stream_that_has_carried_enough_is_not_lent_again() -> None:
    """It is closed when what is under way is through, and the next one is dialled."""
    answer, question = m.encode(m.Attached()), m.encode(m.AskStats())
    per_exchange = len(answer) + len(question)
    exchanges_each = 100 // per_exchange + 1
    others: list[socket.socket] = []
    patience = Deadline.after(30.0)
    with ExitStack() as stack:

        def dial(deadline: Deadline, opened: list[socket.socket]) -> Stream:
            here, there = socket.socketpair()
            others.append(stack.enter_context(there))
            return Stream(here, Worn())

        pool = StreamPool(dial, lambda: None)
        for number in range(3 * exchanges_each):
            with pool.borrow(patience) as stream:
                assert len(others) == number // exchanges_each + 1
                others[-1].sendall(answer)
                assert isinstance(stream.ask(m.AskStats(), patience), m.Attached)
        for other in others:
            assert len(other.recv(1000)) == exchanges_each * len(question)
            assert other.recv(1) == b"", "it is closed"
        pool.close("over")
