"""Checking: the checksum of our end of a transfer, for the peer that compares it with its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist.core import messages as m
from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.memory.checksum import Checksum
from llm_datadist.transport.tcp import Permit

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_datadist.owner.answers import Answers
    from llm_datadist.peer.peer import Peer
    from llm_datadist.running.deadline import Deadline
    from llm_datadist.running.gate import Gate

#: it gives its thread to others after so long
_SLICE_S = 0.1


class Checking:
    """Makes one answer to a Digest, bit by bit, in one thread at a time. In the gate meanwhile."""

    def __init__(self, gate: Gate, deadline: Deadline, is_cut: Callable[[], bool]) -> None:
        """`is_cut`: nobody is there any more who would take the answer."""
        self._gate = gate
        self._deadline = deadline
        self._is_cut = is_cut
        self._permit = Permit(self.end, lambda: None)
        self._checksum: Checksum | None = None

    def begin(self, answers: Answers, request: m.Digest, reader: Peer | None) -> None:
        """For the peer that asks. `end` must follow. Raises LLMException, ProtocolError."""
        _, addrs, nbytes, _ = answers.readable(self, request, self._permit, reader)
        self._checksum = Checksum(addrs, nbytes)

    def go_on(self) -> m.Message | None:
        """The answer, or None when it is to be gone on with.

        Raises LLMException: when the deadline has passed, the link has ended, or the memory is
        taken back.
        """
        assert self._checksum is not None
        try:
            if not self._checksum.go_on(self._require, _SLICE_S):
                return None
        except BaseException:
            self.end()
            raise
        return m.Digested(self._checksum.value)

    def end(self) -> None:
        """The memory is used no more. May be called again."""
        self._gate.leave(self)

    def _require(self) -> None:
        self._deadline.require("the checksum of a transfer")
        if self._is_cut():
            raise LLMException("the link has ended", LLMStatusCode.LLM_NOT_YET_LINK)
        if self._permit.is_revoked or self._permit.is_over:
            raise LLMException(
                "the cache is being unregistered, or the push that it is for has ended",
                LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
            )
