"""Coverage-guided fuzzing of what reads the network's bytes, to be run by hand.

    pip install atheris
    python tests/fuzz/frames.py -runs=10000000

Frames in pieces go through a reader, and what is decoded through the checks behind it. Only a
ProtocolError may come of it, and what was accepted must be encoded and decoded again as the same.
The arguments are libFuzzer's; without a corpus folder one is made of all messages there are.
"""

from __future__ import annotations

import importlib
import random
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np

atheris: Any = importlib.import_module("atheris")

with atheris.instrument_imports(include=["llm_datadist"]):
    from llm_datadist.core import messages as m
    from llm_datadist.core.combs import Combs, overlap
    from llm_datadist.core.fetches import names_of, pieces_of
    from llm_datadist.core.frames import FrameReader
    from llm_datadist.core.packed import columns_of, pack_columns
    from llm_datadist.core.remote import understand
    from llm_datadist.transport.same_host import SameHost
    from llm_datadist.transport.secret import KEYED_HEAD_NBYTES, Secret
    from llm_datadist.transport.shield import NotAuthentic

CAP = 4096


def read(data: bytes) -> None:
    """The data as a stream, cut at places that its first byte decides, and as a keyed frame."""
    forge(data)
    step = data[0] + 1 if data else 1
    reader = FrameReader(CAP)
    try:
        for start in range(1, len(data), step):
            reader.feed(data[start : start + step])
            for message in reader:
                check(message)
    except m.ProtocolError:
        return


def keyed() -> Secret:
    """A listener's end of a connection with a shared secret, behind the hand-shake."""
    secret = bytes(32)
    caller, listener = Secret(secret, is_caller=True), Secret(secret, is_caller=False)
    listener.answer(caller.answer(listener.answer(caller.start())))
    return listener


def forge(data: bytes) -> None:
    """Who does not have the key says nothing that counts."""
    head = data[:KEYED_HEAD_NBYTES]
    if len(head) < KEYED_HEAD_NBYTES:
        return
    try:
        LISTENER.frame_nbytes(head)
        LISTENER.open_frame(data)
    except NotAuthentic:
        return
    raise AssertionError(f"a forged frame was taken: {data!r}")


def check(message: m.AnyMessage) -> None:
    """What is done with an accepted message before anybody trusts it."""
    frame = m.encode(message)
    again = m.decode(frame[m.HEADER.size :])
    if m.encode(again) != frame:  # not the messages: a float may be NaN
        raise AssertionError(f"{message!r} came back as {again!r}")
    if isinstance(message, m.Welcome):
        for offer in message.offers.values():
            with suppress(ValueError, msgspec.DecodeError):
                SameHost.offered(offer)
    infos = [message.info] if isinstance(message, m.Resolved) else []
    if isinstance(message, m.Caches):
        infos = message.infos
    for info in infos:
        understand(info)
    if isinstance(message, m.Read | m.Digest):
        columns_of(message.columns, 2)
    if isinstance(message, m.Fetch):
        take(message)


def take(fetch: m.Fetch) -> None:
    """What is accepted has bounds, is within what lands, and can be asked for again."""
    pieces = pieces_of(fetch)
    assert len(pieces) <= m.MAX_REQUEST_SEGMENTS
    if isinstance(pieces, Combs):
        assert pieces.total_nbytes <= m.MAX_REQUEST_SEGMENTS * m.MAX_COMB_NBYTES
        ours, theirs = pieces.dst_iovecs(), pieces.src_iovecs()
        assert int(ours[:, 1].sum()) == int(theirs[:, 1].sum()) == pieces.total_nbytes
        lands = pieces.landing()
        (span,) = set(lands.nbytes.tolist())
        runs = ours.reshape(len(pieces.dst), -1, 2)
        offsets = (runs[:, :, 0] - lands.dst[:, None]).max(axis=0) + runs[0, :, 1]
        assert int(offsets.max()) == span
        if int(lands.dst.max()) + span < 2**64:  # else it lies in no cache
            assert overlap(pieces, pieces)
        again = pieces_of(msgspec.structs.replace(fetch, **names_of(pieces)._asdict()))
        assert (again.dst_iovecs() == ours).all()
        assert (again.src_iovecs() == theirs).all()


LISTENER = keyed()


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """libFuzzer's own mutations, most of them of a body whose header is then made to fit."""
    rng = random.Random(seed)
    head = 1 + m.HEADER.size
    if len(data) <= head or rng.random() < 0.2:
        return bytes(atheris.Mutate(data, max_size))
    body = bytes(atheris.Mutate(data[head:], max(1, max_size - head)))
    return data[:1] + m.HEADER.pack(m.MAGIC, len(body)) + body


def corpus() -> list[bytes]:
    """One frame of each message, with values that msgspec accepts, and a Fetch that is meant."""
    samples = [sample(kind) for kind in get_args(m.AnyMessage)]
    comb = pack_columns(*np.array([[0, 8, 24], [64, 0, 16]], dtype=np.uint64))
    places = pack_columns(*np.array([[4096, 8192], [4096, 5000]], dtype=np.uint64))
    samples.append(m.Fetch(1, 1, 1, 1, 8, 1000, 1.0, places, comb, 8))
    return [b"\xff" + m.encode(message) for message in samples]


def sample(kind: Any) -> Any:
    values = {
        field.name: value_of(field.type)
        for field in msgspec.inspect.type_info(kind).fields  # type: ignore[attr-defined]
    }
    return kind(**values)


def value_of(kind: Any) -> Any:
    """A value of a type that a field has."""
    name = type(kind).__name__
    if name == "StructType":
        return sample(kind.cls)
    if name == "UnionType":
        return value_of(kind.types[0])
    if name == "ListType":
        return [value_of(kind.item_type)] * (kind.min_length or 1)
    if name == "VarTupleType":
        return (value_of(kind.item_type),) * (kind.min_length or 1)
    if name == "TupleType":
        return tuple(map(value_of, kind.item_types))
    if name == "DictType":
        return {value_of(kind.key_type): value_of(kind.value_type)}
    if name == "BytesType":
        return bytes(range(kind.min_length or min(24, kind.max_length or 24)))
    return {"IntType": 1, "StrType": "tcp", "BoolType": True, "FloatType": 0.5}.get(name)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for number, frame in enumerate(corpus()):
            (Path(folder) / f"sample-{number}").write_bytes(frame)
        has_corpus = any(not argument.startswith("-") for argument in sys.argv[1:])
        arguments = [*sys.argv, f"-max_len={CAP}", *([] if has_corpus else [folder])]
        atheris.Setup(arguments, read, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
