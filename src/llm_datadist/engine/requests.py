"""Requests to a peer that move bytes by its doing, or tell it of what was moved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist.core import messages as m
from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.observe.log import get_logger
from llm_datadist.transport.base import StaleCache
from llm_datadist.transport.checksum import digest_of
from llm_datadist.transport.stream import RequestRefused

if TYPE_CHECKING:
    from llm_datadist.core.remote import Guard, RemoteCache
    from llm_datadist.core.segments import Segments
    from llm_datadist.engine.streams import StreamPool
    from llm_datadist.transport.deadline import Deadline


def send(
    streams: StreamPool, segments: Segments, src: Guard, dst: Guard | None, deadline: Deadline
) -> None:
    """Has the peer fetch segments of our cache `src` into its cache `dst`.

    Without `dst` the destination is found by its addresses. Raises StaleCache when the peer's
    cache is another by now, LLMException otherwise.
    """
    with streams.borrow(deadline) as stream:
        for start in range(0, len(segments), m.MAX_REQUEST_SEGMENTS):
            piece = segments.slice(start, start + m.MAX_REQUEST_SEGMENTS)
            try:
                stream.ask(_fetch_request(piece, src, dst, deadline), deadline)
            except RequestRefused as refused:
                if dst and refused.status_code is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST:
                    raise StaleCache(dst) from refused
                raise


def verify(streams: StreamPool, segments: Segments, src: Guard, deadline: Deadline) -> None:
    """Compares what lies at our end of the segments with what their owner has, both at once.

    Raises LLMException(LLM_FAILED) when it differs, StaleCache when the owner has it no more.
    """
    for piece in segments.windows(m.MAX_REQUEST_SEGMENTS):
        columns = m.pack_columns(piece.src, piece.nbytes)
        timeout_ms = max(1, int(deadline.require("the checksum of a transfer") * 1000))
        with streams.borrow(deadline) as stream:
            question = m.Digest(src.cache_id, src.generation, timeout_ms, columns)
            stream.tell(question, deadline)
            ours = digest_of(piece.dst, piece.nbytes, deadline)
            try:
                answer = stream.answer(deadline)
            except RequestRefused as refused:
                if refused.status_code is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST:
                    raise StaleCache(src) from refused
                raise
        if not isinstance(answer, m.Digested) or answer.digest != ours:
            raise LLMException(
                f"what arrived of the peer's cache {src.cache_id} is not what its owner has: "
                "the checksums differ (verify_transfers)",
                LLMStatusCode.LLM_FAILED,
            )


def use_up(
    streams: StreamPool, remote: RemoteCache, row: int, tensors: range | None, deadline: Deadline
) -> None:
    """Tells the owner that a row was pulled, so that it lets go of the row's key. Spec 6.7."""
    first, count = (tensors.start, len(tensors)) if tensors else (0, 0)
    try:
        with streams.borrow(deadline) as stream:
            stream.ask(m.UseUp(remote.guard.cache_id, row, first, count), deadline)
    except LLMException as error:  # the bytes have been moved: that is what the caller asked for
        get_logger().warning(
            "the owner of cache %d does not know that its row %d was pulled: %s",
            remote.guard.cache_id, row, error,
        )  # fmt: skip


def _fetch_request(piece: Segments, src: Guard, dst: Guard | None, deadline: Deadline) -> m.Fetch:
    return m.Fetch(
        dst.cache_id if dst else None,
        dst.generation if dst else 0,
        src.cache_id,
        src.generation,
        src.word_addr,
        max(1, int(deadline.require("the transfer") * 1000)),
        deadline.at,
        m.pack_columns(piece.src, piece.dst, piece.nbytes),
    )
