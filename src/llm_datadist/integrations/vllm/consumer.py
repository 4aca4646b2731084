"""The decode side: which requests are read, and from whom."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from llm_datadist.integrations.vllm.handover import Handover, Named, source_of
from llm_datadist.integrations.vllm.printable import printable, shown_id
from llm_datadist.integrations.vllm.request import digest_of, wants_remote_prefill
from llm_datadist.integrations.vllm.step import Pull

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from llm_datadist.integrations.vllm.request import Request
    from llm_datadist.integrations.vllm.step import Step

logger = logging.getLogger(__name__)


class ConsumerScheduler:
    """In the scheduler: turns the blocks that a request has got into pulls.

    By a directory it takes hand-overs that name a start of an engine, and else those that name an
    address: so with one, nobody who sends requests says where is dialled.
    """

    def __init__(self, *, has_directory: bool = False, overlaps: bool = False) -> None:
        """`overlaps`: whether prompts may be read while they are computed."""
        self._has_directory, self._overlaps = has_directory, overlaps
        #: what is kept for requests that have got no blocks yet, and for those that read it now.
        #: Not kept in their parameters, which several requests may share
        self._waiting: dict[str, Handover | Named] = {}
        self._reading: dict[str, Handover | Named] = {}
        self._expected: list[Handover | Named] = []
        self._pulls: list[Pull] = []
        self._releases: list[Handover | Named] = []
        self._cancels: list[str] = []

    def arrived(self, request: Request) -> None:
        """A new request. One that was not handed over as it is here is computed, and it is said.

        One that comes under the id of another that waits replaces it.
        """
        if not wants_remote_prefill(request):
            return
        try:
            source = self._source_of(request)
        except ValueError as error:
            logger.warning(
                "%s is computed here: %s", shown_id(request.request_id), printable(error)
            )
            return
        self._let_go(self._waiting, request.request_id)
        self._waiting[request.request_id] = source
        self._expected.append(source)

    def num_matched_tokens(self, request: Request, num_computed_tokens: int) -> int:
        """How many tokens of the prompt can be read, beyond those that are here."""
        source = self._waiting.get(request.request_id)
        if source is None or request.request_id in self._reading:  # what ends would be unclear
            return 0
        return max(0, source.remote_num_tokens - num_computed_tokens)

    def allocated(
        self, request: Request, block_ids: Sequence[Sequence[int]], num_external_tokens: int
    ) -> None:
        """The request has got its blocks, by group; so many of the tokens handed over are to be
        read into them, the last ones.

        Once: what cannot be read is computed.
        """
        if not num_external_tokens:
            self._let_go(self._waiting, request.request_id)
            return
        source = self._waiting.pop(request.request_id, None)
        if source is None:
            return
        self._reading[request.request_id] = source
        num_computed = source.remote_num_tokens - num_external_tokens
        self._pulls.append(Pull(request.request_id, source, block_ids, num_computed))

    def finished(self, request: Request) -> None:
        """A request that ends before it got blocks lets go of those that are kept for it.

        One whose prompt is being computed, and read, is read no further.
        """
        self._let_go(self._waiting, request.request_id)
        if isinstance(self._reading.get(request.request_id), Named):
            self._cancels.append(request.request_id)

    def received(self, request_ids: Iterable[str]) -> None:
        """These have been read, or could not be, by all workers."""
        for request_id in request_ids:
            self._let_go(self._reading, request_id)

    def fill(self, step: Step) -> None:
        """Adds what has come up since the last step."""
        step.expected, step.pulls, step.releases = self._expected, self._pulls, self._releases
        self._expected, self._pulls, self._releases = [], [], []
        step.cancels, self._cancels = self._cancels, []

    def _source_of(self, request: Request) -> Handover | Named:
        """Raises ValueError that says why its blocks are not read."""
        source = source_of(request.kv_transfer_params)
        if source.is_announced and not self._has_directory:
            raise ValueError("it names no address, and no directory is set here")
        if self._has_directory and not source.is_announced:
            raise ValueError("it names an address, and the directory here says who is where")
        tokens = request.prompt_token_ids
        if isinstance(source, Named):
            if not self._overlaps or not tokens:
                raise ValueError("prompts are not read here while they are computed")
            return source.expecting(len(tokens), digest_of(request, len(tokens)))
        num_tokens = source.remote_num_tokens
        has_tokens = num_tokens <= len(tokens or ())
        if not has_tokens or digest_of(request, num_tokens) != source.remote_digest:
            raise ValueError("its prompt was read as other tokens there")
        return source

    def _let_go(self, kept: dict[str, Handover | Named], request_id: str) -> None:
        """Of what a request has there, unless another of the `n` answers to its prompt needs it."""
        source = kept.pop(request_id, None)
        if source and not any(source in each.values() for each in (self._waiting, self._reading)):
            self._releases.append(source)
