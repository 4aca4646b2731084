"""Made-up bytes: what peers say, and what is left of it after a few mutations."""

from __future__ import annotations

import json
import ssl
from contextlib import suppress
from typing import TYPE_CHECKING

import trustme
from hypothesis import strategies as st
from wire import Wire, columns, hello

from llm_datadist.core import messages as m
from llm_datadist.core.stats import ClusterStats, LinkStats
from llm_datadist.transport.secret import Secret

if TYPE_CHECKING:
    from pathlib import Path

#: what every kind of peer may say first or later
SAMPLES: list[m.Message] = [
    hello(), hello(timeout_ms=1), m.Ready("tcp"), m.Unusable("cma", "why", True), m.Linked("tcp"),
    m.Refused(5, "no"), m.DialBack(1), m.Bye(), m.ByeDone(), m.Forget(bytes(16), bytes(16)),
    m.Attach(bytes(16), False), m.Attached(), m.Resolve(1, 0, 0, False), m.ListCaches(),
    m.Resolve(None, 2**64 - 1, 0, False), m.Read(1, 1, 1, columns([(4096, 8)])),
    m.Read(1, 1, 1, columns([(4096, 8)] * 9), (1, 0, False, 0)), m.Sending(8),
    m.UseUp(1, 0, 0, 2), m.Fetch(1, 1, 1, 1, 8, 1, 0.5, bytes(24)), m.Done(),
    m.Vouch(bytes(32)), m.Vouched(bytes(32), True),
    m.Fetch(1, 1, 1, 1, 8, 1, 0.5, columns([(4096, 4096)]), columns([(0, 0), (8, 16)]), 8),
    m.Digest(1, 1, 1, columns([(4096, 8)])), m.Digested(7), m.Caches([]), m.AskStats(),
    m.Notify("name", "text"),
    m.Stats(ClusterStats(1, 0.5, 1, 0, 0, True, links=(LinkStats(2, "tcp", "linked"),))),
    m.Welcome(1, 1, bytes(16), bytes(16), {"tcp": b"", "cma": b"x"}, hello().probe),
]  # fmt: skip
FRAMES = [m.encode(message) for message in SAMPLES]

#: heads of msgpack values that announce far more than follows
BOMBS = [
    b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff", b"\xdc\xff\xff", b"\xde\xff\xff", b"\xc9\xff\xff\xff\xff\x01",
    b"\xcf" + b"\xff" * 8, b"\x91" * 300, b"\x81\x01" * 200,
]  # fmt: skip


@st.composite
def mutations(draw: st.DrawFn, originals: list[bytes]) -> bytes:
    """One of them with a few bytes changed, taken out, doubled, or a bomb put in."""
    mutated = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(mutated)))
        piece = (
            st.binary(max_size=4) | st.sampled_from(BOMBS) | st.just(bytes(mutated[at : at + 64]))
        )
        mutated[at : at + draw(st.integers(0, 8))] = draw(piece)
    return bytes(mutated)


said = st.lists(mutations(FRAMES) | st.binary(max_size=64), min_size=1, max_size=4).map(b"".join)


# -- link security --


def tls_option(folder: Path) -> str:
    ca = trustme.CA()
    leaf = ca.issue_cert("cluster.example")
    ca.cert_pem.write_to_path(str(folder / "ca.pem"))
    leaf.private_key_pem.write_to_path(str(folder / "key.pem"))
    (folder / "leaf.pem").write_bytes(b"".join(b.bytes() for b in leaf.cert_chain_pems))
    names = {"ca": "ca.pem", "certificate": "leaf.pem", "key": "key.pem"}
    return json.dumps({name: str(folder / file) for name, file in names.items()})


def client_hello() -> bytes:
    """What a TLS client says first."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls = context.wrap_bio(incoming, outgoing, server_hostname="cluster.example")
    with suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def greetings(security: str) -> list[bytes]:
    """What a stranger would begin with, who knows all but the credential."""
    if "ca" in security:
        return [client_hello() for _ in range(4)]
    if security:
        return [Secret(b"guessed", is_caller=True).start() + bytes(n) for n in (0, 31, 32, 90)]
    return [b""]


def authentic(port: int, secret: str) -> Wire:
    """A connection of somebody who has the credential, if there is one."""
    wire = Wire.dial(port)
    if secret:
        shield = Secret(secret.encode(), is_caller=True)
        wire.send_bytes(shield.start())
        wire.send_bytes(shield.answer(wire.receive_bytes(64)))
    return wire
