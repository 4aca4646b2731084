"""What two clusters say to each other: message types, their encoding, their caps.

A frame is a magic word, a length and a msgpack body that msgspec decodes into one of the types of
this file; nothing else is accepted, and a length is checked before anything is allocated. Numbers
are within the bounds of their fields, and words that will be shown to people are printable.
"""

from __future__ import annotations

import struct
from typing import Annotated, Final, TypeAlias

import msgspec
from msgspec import Meta

from llm_datadist.core.stats import ClusterStats  # noqa: TC001  (msgspec reads it)
from llm_datadist.core.words import heard, printable

PROTOCOL_VERSION = 1

MAGIC = 0x4C444431
HEADER = struct.Struct("<II")
#: largest body before a link exists, from a peer about which nothing is known yet
MAX_GREETING_NBYTES = 64 * 1024
#: largest body on a link: 16 Mi bytes hold the table of 30,000 caches of 64 tensors
MAX_BODY_NBYTES = 16 * 1024 * 1024
#: largest body of a request: segments need 24 bytes each. Only answers are larger
MAX_REQUEST_BODY_NBYTES = 2 * 1024 * 1024
#: largest body of an answer to AskStats, which need not come from anybody known
MAX_STATS_NBYTES = 1024 * 1024
#: segments in one read request; larger transfers are asked for in several
MAX_REQUEST_SEGMENTS = 65536
#: pieces that lie alike at each of the places of a request …
MAX_TEETH = 512
#: … and their bytes
MAX_COMB_NBYTES = 256 * 1024
#: bytes in one read request: an owner answers no more at a time
MAX_REQUEST_NBYTES = 2**40

#: caches in one table: its owner tells of the newest, and is asked about others
MAX_CACHES = 65536
#: keys of one cache that peers are told
MAX_KEYS = 65536
#: what a key takes: four u64
KEY_NBYTES = 32
#: layers of one cache that peers are told
MAX_LAYERS = 4096
MAX_LAYERS_NBYTES = 1024 * 1024
#: characters of either text of a notice
MAX_NOTICE = 1024

UInt: TypeAlias = Annotated[int, Meta(ge=0)]
#: as many as the longest timeout has that a program can set, 2**31 seconds
Millis: TypeAlias = Annotated[int, Meta(ge=0, le=2**41)]
#: of a monotonic clock, in seconds
Moment: TypeAlias = Annotated[float, Meta(ge=0, le=1e12)]
Text: TypeAlias = Annotated[str, Meta(max_length=4096)]
#: what one program tells another by Notify, which is shown to nobody
Notice: TypeAlias = Annotated[str, Meta(max_length=MAX_NOTICE)]
Token: TypeAlias = Annotated[bytes, Meta(min_length=16, max_length=16)]
#: as Token, or empty
Nonce: TypeAlias = Annotated[bytes, Meta(max_length=16)]
#: a digest, see core/connection_names.py
Connection: TypeAlias = Annotated[bytes, Meta(min_length=32, max_length=32)]


class ProtocolError(Exception):
    """Bytes that are no message of this protocol."""


class Message(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """Base of all messages."""


class ProbeTarget(Message):
    """A nonce in the sender's memory; whoever reads it back has an end-to-end path."""

    addr: UInt
    nonce: Token
    word_addr: UInt
    generation: UInt


class Hello(Message, tag=1, forbid_unknown_fields=False):
    """The caller opens a link. Of a later version it may have more fields: the version tells."""

    version: UInt
    cluster_id: UInt
    instance: Token
    is_remote_accessible: bool
    #: the caller has no link to this cluster yet, so one that the listener remembers is stale
    is_fresh: bool
    timeout_ms: Millis
    offers: dict[str, bytes]
    probe: ProbeTarget
    #: names the rank-table link that this is to be part of
    group: Text = ""
    #: of this connection alone: part of its name, see Vouch; without one nobody vouches for it
    nonce: Nonce = b""
    #: which of the caller's devices this is, counted from 0, and of how many
    device_index: UInt = 0
    num_devices: UInt = 1
    #: names the links of several devices that are made together, and end together
    bundle: Nonce = b""


class Welcome(Message, tag=2, forbid_unknown_fields=False):
    """The listener would link; `token` names the link on the streams that join it."""

    version: UInt
    cluster_id: UInt
    instance: Token
    token: Token
    offers: dict[str, bytes]
    probe: ProbeTarget


class Ready(Message, tag=3):
    """The caller has verified this path in its direction; `unmet` is why not on one host."""

    path: Text
    unmet: Text = ""


class Unusable(Message, tag=4):
    """The listener could not verify that path in its direction; the caller may propose another."""

    path: Text
    reason: Text
    is_remarkable: bool


class Linked(Message, tag=5):
    """Both directions are verified and the listener has published the link."""

    path: Text


class Refused(Message, tag=6):
    """A request, or the link itself, was refused; `status` is an LLMStatusCode."""

    status: UInt
    message: Text


class DialBack(Message, tag=7):
    """The listener wants `count` more streams for its own requests; only the caller can dial."""

    count: Annotated[int, Meta(ge=1, le=64)]


class Bye(Message, tag=8):
    """The sender unlinks; answered with ByeDone when the receiver's own transfers have ended."""


class ByeDone(Message, tag=9):
    pass


class Forget(Message, tag=10):
    """Sent in place of Hello, when no link is known: drop the link of this cluster, if any.

    The other end of that link, if it is there, is asked whether it said so: see Vouch.
    """

    instance: Token
    nonce: Nonce = b""


class Attach(Message, tag=11):
    """First frame of a stream: it joins the link of `token`.

    The dialling side makes the requests on it, unless `is_reverse`. With a shared secret `proof`
    shows that it is the very end of that link.
    """

    token: Token
    is_reverse: bool
    proof: Annotated[bytes, Meta(max_length=64)] = b""


class Attached(Message, tag=12):
    pass


class Moved(Message, tag=13):
    """The link goes on over the listener's same-host socket: nothing follows on this connection."""


class Vouch(Message, tag=14):
    """On a link: is this connection, of which somebody says that it is yours, one of yours now?

    It is named by what its ends are and have said on it: see core/connection_names.py.
    """

    connection: Connection


class Vouched(Message, tag=15):
    """The answer to Vouch."""

    connection: Connection
    is_ours: bool


class Resolve(Message, tag=20):
    """Which cache is it? By id when `cache_id` is given, else by key."""

    cache_id: int | None
    key_id: UInt
    model_id: UInt
    is_prefix: bool


class LayoutInfo(Message):
    """A KVLayout; `heads` are the first, how many, and of how many.

    `layers` is packed by `pack_layers`: the names of a whole table are not all read at once.
    """

    layers: Annotated[bytes, Meta(max_length=MAX_LAYERS_NBYTES)]
    heads: tuple[UInt, UInt, UInt]
    num_blocks: UInt
    block_tokens: UInt
    head_size: UInt
    data_type: UInt
    order: Annotated[str, Meta(max_length=6)]
    strides: Annotated[list[UInt], Meta(min_length=3, max_length=6)]


class CacheInfo(Message, tag=21):
    """All that a peer may know of a cache; `addrs` are little-endian u64.

    `is_owned` says that its library allocated it: a pull by one of its keys uses that key up.
    """

    cache_id: int
    kind: UInt
    num_tensors: UInt
    num_rows: UInt
    row_nbytes: UInt
    is_remote_accessible: bool
    is_owned: bool
    generation: UInt
    word_addr: UInt
    addrs: bytes
    #: four columns of little-endian u64: id, model id, whether it is a prefix (0, 1), row
    keys: Annotated[bytes, Meta(max_length=KEY_NBYTES * MAX_KEYS)]
    #: None where the owner did not say what its blocks hold
    layout: LayoutInfo | None = None
    #: its owner counts who has pulled of it, and is told by UseUp
    is_counted: bool = False


class Resolved(Message, tag=22):
    info: CacheInfo
    row: UInt


class ListCaches(Message, tag=23):
    pass


class Caches(Message, tag=24):
    infos: Annotated[list[CacheInfo], Meta(max_length=MAX_CACHES)]


class Read(Message, tag=25):
    """Send these bytes of a cache; `columns` is u64 little-endian, addresses then lengths.

    With a `claim` (id, model_id, is_prefix, row) only while that key still leads to that row of it:
    so a reader need not ask before each read where a key leads.
    """

    cache_id: int
    generation: UInt
    timeout_ms: Millis
    columns: bytes
    claim: tuple[UInt, UInt, bool, UInt] | None = None


class Sending(Message, tag=26):
    """The answer to Read: `nbytes` raw bytes follow, then two u64.

    These are the generation under which it was all sent, and the address that could not be read.
    """

    nbytes: UInt


class UseUp(Message, tag=27):
    """These tensors of a row have been pulled (none: all); its key has done its duty.

    Of a cache that is counted: one more reader has what it needs of it.
    """

    cache_id: int
    row: UInt
    first_tensor: UInt
    num_tensors: UInt


class Fetch(Message, tag=28):
    """Pull this from me into your cache; so it is that a push never writes where it must not.

    `columns` is u64 little-endian: source addresses, destination addresses, lengths. The cache is
    named by id and generation, or by its addresses alone (id None). `deadline_at` is the sender's
    monotonic clock, which nobody compares with another: a time namespace has its own.

    With `teeth` the pieces lie alike at each place: `columns` is the places, by their addresses at
    the source and at the destination, `teeth` two columns of offsets from those, and each piece
    has `tooth_nbytes`. `core/fetches.py` has the rules.
    """

    cache_id: int | None
    generation: UInt
    src_cache_id: int
    src_generation: UInt
    src_word_addr: UInt
    timeout_ms: Millis
    deadline_at: Moment
    columns: bytes
    teeth: Annotated[bytes, Meta(max_length=16 * MAX_TEETH)] = b""
    tooth_nbytes: Annotated[int, Meta(ge=0, le=MAX_COMB_NBYTES)] = 0


class Digest(Message, tag=30):
    """Which checksum do these bytes of a cache have? As Read otherwise; answered with Digested."""

    cache_id: int
    generation: UInt
    timeout_ms: Millis
    columns: bytes


class Digested(Message, tag=31):
    """The checksum of the bytes asked for, in order."""

    digest: UInt


class ListExports(Message, tag=34):
    """What does a channel of this path need to know of your memory? Answered with Exports."""

    path: Text


class Exports(Message, tag=35):
    exports: bytes


class Notify(Message, tag=36):
    """A notice for the receiver's program, which asks for it when it likes. Answered with Done."""

    name: Notice
    text: Notice


class Done(Message, tag=29):
    """What was asked for has been done."""


class AskStats(Message, tag=32):
    """Sent in place of Hello: how are you? Answered with Stats, and the connection ends."""


class Stats(Message, tag=33):
    stats: ClusterStats


AnyMessage: TypeAlias = (
    Hello
    | Welcome
    | Ready
    | Unusable
    | Linked
    | Refused
    | DialBack
    | Bye
    | ByeDone
    | Forget
    | Attach
    | Attached
    | Moved
    | Vouch
    | Vouched
    | Resolve
    | Resolved
    | ListCaches
    | Caches
    | Read
    | Sending
    | UseUp
    | Fetch
    | Done
    | Digest
    | Digested
    | ListExports
    | Exports
    | AskStats
    | Stats
    | Notify
)

#: what has words in it that are shown; names that are only compared are left as they are
_SPOKEN = (Ready, Unusable, Linked, Refused, Stats)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def as_text(reason: str) -> str:
    """A reason that fits into a message, whatever is in it."""
    return printable(reason)


#: nothing of these comes from others, or is without a bound where it comes from; no link is lost
#: by a Stats
_BOUNDED: Final = (Caches, Done, Fetch, Read, Resolve, Sending, Stats)


def encode(message: Message) -> bytes:
    """A whole frame, which any peer can decode.

    Raises ValueError for a message that none could: the peer would end its link, by the doing of
    whoever had us say it. Tables, and what each transfer says, are not read again: what they hold
    is bounded where it is registered and called, and no words of others are in it.
    """
    body = _encoder.encode(message)
    if len(body) > MAX_BODY_NBYTES:
        raise ValueError(f"a {type(message).__name__} of {len(body)} bytes is over the frame cap")
    if not isinstance(message, _BOUNDED):
        try:
            _decoder.decode(body)
        except msgspec.DecodeError as error:
            raise ValueError(
                f"a {type(message).__name__} that no peer could decode: {error}"
            ) from error
    return HEADER.pack(MAGIC, len(body)) + body


def other_protocol(came: bytes | bytearray | memoryview) -> str:
    """What is spoken by who begins so, if people take its ports for ours; else empty."""
    return {b"HTTP": "HTTP", b"SSH-": "SSH"}.get(bytes(came[:4]), "")


def body_nbytes(header: bytes | bytearray | memoryview, max_nbytes: int) -> int:
    """The body length that a frame header announces. Raises ProtocolError."""
    magic, nbytes = HEADER.unpack(header)
    if magic != MAGIC:
        if other := other_protocol(header):
            raise ProtocolError(f"{other} is spoken there: it is the port of something else")
        raise ProtocolError(f"expected the magic {MAGIC:#x}, got {magic:#x}")
    if nbytes > max_nbytes:
        raise ProtocolError(f"a frame of {nbytes} bytes is over the cap of {max_nbytes}")
    return int(nbytes)


def decode_frame(frame: bytes | bytearray | memoryview) -> AnyMessage:
    """The message of a whole frame. Raises ProtocolError."""
    if len(frame) < HEADER.size or len(frame) != HEADER.size + body_nbytes(
        memoryview(frame)[: HEADER.size], MAX_BODY_NBYTES
    ):
        raise ProtocolError(f"{len(frame)} bytes are not one frame")
    return decode(memoryview(frame)[HEADER.size :])


def decode(body: bytes | bytearray | memoryview) -> AnyMessage:
    """The message of a frame's body. Raises ProtocolError, and nothing else.

    The words in it that people will see are printable.
    """
    try:
        message = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"undecodable frame: {error}") from error
    return heard(message) if isinstance(message, _SPOKEN) else message
