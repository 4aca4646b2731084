"""The record: what a member of a fleet says of itself, and how it is written down.

What is read comes from whoever may write to the directory. So all of it has bounds, all words
print, and addresses have the form of addresses; a record that breaks a rule is none.
"""

from __future__ import annotations

from typing import Annotated, Final, TypeAlias

import msgspec
from msgspec import Meta

from llm_datadist.checks import UINT64_MAX
from llm_datadist.endpoint import Endpoint, is_host
from llm_datadist.errors import LLMException
from llm_datadist.types import LLMRole

#: of a record as it is written; a longer one is not read
MAX_NBYTES: Final = 16 * 1024
#: facts, and labels, that one record has at most
MAX_WORDS: Final = 64
#: a renewal comes three times in this, at least: shorter ones would fail on a busy machine
MIN_TTL_S: Final = 1.0
MAX_TTL_S: Final = 3600.0

Word: TypeAlias = Annotated[str, Meta(max_length=256)]
Words: TypeAlias = Annotated[dict[Word, Word], Meta(max_length=MAX_WORDS)]
Address: TypeAlias = Annotated[str, Meta(max_length=300)]
Ttl: TypeAlias = Annotated[float, Meta(ge=MIN_TTL_S, le=MAX_TTL_S)]
_ROLES: Final = frozenset(role.name for role in LLMRole)


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A member of a fleet. Immutable.

    Raises ValueError for words that do not print, addresses that are none, ids out of range.
    """

    cluster_id: Annotated[int, Meta(ge=0)]
    #: which start of that cluster this is: 32 hexadecimal digits, others at each start
    incarnation: Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
    role: str  #: the name of an LLMRole
    listen: Address = ""  #: `host:port` where it listens; empty when it does not
    advertised: Address = ""  #: where others reach it, when that is not `listen`
    #: what must be equal at two members that are to be linked: layouts, versions
    facts: Words = {}
    labels: Words = {}  #: what else there is to say; nobody compares it unless asked to

    def __post_init__(self) -> None:
        if self.cluster_id > UINT64_MAX:
            raise ValueError(f"a cluster id has 64 bits, got {self.cluster_id}")
        if self.role not in _ROLES:
            raise ValueError(f"a role is one of {', '.join(sorted(_ROLES))}, got {self.role!r}")
        for text in (self.listen, self.advertised):
            _check_address(text)
        for words in (self.facts, self.labels):
            if not all(word.isprintable() for pair in words.items() for word in pair):
                raise ValueError("facts and labels must be made of characters that print")

    @property
    def endpoint(self) -> Endpoint | None:
        """Where it is called; None when it cannot be."""
        text = self.advertised or self.listen
        return Endpoint.parse(text) if text else None

    def __str__(self) -> str:
        return f"cluster {self.cluster_id} ({self.role}, incarnation {self.incarnation[:8]})"


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A record as it lies in a directory."""

    record: Record
    ttl_s: Ttl  #: it is worth nothing when nobody renews it for so long
    has_left: bool = False  #: the member's last word


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Entry)


def encode(entry: Entry) -> bytes:
    """The entry as JSON. Raises ValueError when it is too long, or the ttl out of range."""
    data = _encoder.encode(entry)
    if decode(data) != entry:
        raise ValueError("a record cannot be written as it is")
    return data


def check(record: Record, ttl_s: float) -> None:
    """Raises ValueError for what cannot be announced."""
    encode(Entry(record=record, ttl_s=ttl_s))


def decode(data: bytes) -> Entry:
    """The entry. Raises ValueError for what is none."""
    if len(data) > MAX_NBYTES:
        raise ValueError(f"a record has {MAX_NBYTES} bytes at most")
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"no record: {error}") from error


def _check_address(text: str) -> None:
    if not text:
        return
    try:
        endpoint = Endpoint.parse(text)
    except LLMException as error:
        raise ValueError(str(error)) from error
    is_plain = text.isprintable() and not any(map(str.isspace, text))
    if endpoint.port == 0 or not is_plain or not is_host(endpoint.host):
        raise ValueError(f"{text!r} is no address that can be called")
