"""What connections are called where one end of a link is asked whether one is its own (`Vouch`).

A name is a digest of what the two ends are and have said there, the caller's part and the
listener's each at its place:

- of the caller its address, its instance and the nonce that it made for this connection;
- of the listener its address, and once it has answered its instance and the token that it made;
- under a shared secret the key of the session, which nobody has who merely passes it on.

So an end knows the names of the connections that it called or answered itself, and of no others:
to call somebody from the address of another, with a nonce of one's choice, makes no name that this
other one has, though addresses on loopback and in private networks are alike on many hosts. Who
stands between two ends, passes on all that they say to each other and has their addresses too (a
tunnel) has made one connection of it, by whatever name.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

import msgspec

if TYPE_CHECKING:
    from llm_datadist.core.messages import Forget, Hello

NAME_NBYTES = 32


class Ends(NamedTuple):
    """The addresses of a connection, which both of its ends see alike."""

    caller: str
    listener: str


def named(ends: Ends, first: Hello | Forget, key: bytes) -> bytes:
    """Of a connection on which the caller has said its first message.

    The caller alone answers to it: a listener has nothing of its own in there.
    """
    return _digest(type(first).__name__, *ends, first.instance, first.nonce, key)


def renamed(name: bytes, instance: bytes, token: bytes) -> bytes:
    """Of the same one, when the listener has answered so."""
    return _digest(name, instance, token)


def _digest(*parts: str | bytes) -> bytes:
    return hashlib.blake2b(msgspec.msgpack.encode(parts), digest_size=NAME_NBYTES).digest()
