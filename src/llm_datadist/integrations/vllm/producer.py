"""The prefill side: which blocks are lent to whom, and until when."""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llm_datadist.integrations.vllm.addresses import advertised_host
from llm_datadist.integrations.vllm.handover import KEY_NBYTES, Handover, Lease
from llm_datadist.integrations.vllm.printable import shown_id
from llm_datadist.integrations.vllm.request import (
    digest_of,
    leave_last_token,
    num_handed_over,
    transfer_id_of,
    wants_remote_decode,
    wants_remote_prefill,
)
from llm_datadist.integrations.vllm.step import Announcement, Chunk, Grant

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from llm_datadist.integrations.vllm.board import Board
    from llm_datadist.integrations.vllm.groups import Group
    from llm_datadist.integrations.vllm.request import Request
    from llm_datadist.integrations.vllm.sealing import Sealing
    from llm_datadist.integrations.vllm.settings import Settings
    from llm_datadist.integrations.vllm.step import Step

logger = logging.getLogger(__name__)

#: states of a request whose prompt was computed to its end
_COMPUTED = ("FINISHED_LENGTH_CAPPED", "FINISHED_STOPPED")


class ProducerScheduler:
    """In the scheduler: gives each request that another engine will decode a lease.

    The lease begins before the request is computed, so that it stands on every worker's board when
    the answer tells of it. Raises ValueError as `advertised_host`, when it is made.
    """

    def __init__(
        self, settings: Settings, groups: Sequence[Group], tp_size: int = 1, pp_size: int = 1
    ) -> None:
        """Of an engine with `pp_size` stages of `tp_size` workers each."""
        self._settings, self._groups = settings, groups
        self._tp_size, self._pp_size = tp_size, pp_size
        #: requests without their last token, where that matters
        self._shortened: set[str] = set()
        self._leaves_last = not all(group.keeps_all for group in groups)
        self._overlaps = settings.extra.overlap and not self._leaves_last
        self._hosts = [advertised_host(settings, rank) for rank in range(pp_size * tp_size)]
        self._incarnations = [""] * len(self._hosts)
        # the one that was given back first is used first: its last reader may still be writing
        self._free_slots = deque(range(settings.extra.max_leases))
        #: to requests that are being computed, and to finished ones whose blocks are kept
        self._granted: dict[str, Grant] = {}
        self._kept: dict[str, Grant] = {}
        self._grants: list[Grant] = []
        self._drops: list[Lease] = []
        self._holds: dict[str, Lease] = {}
        #: those that may be read while they are computed, until they are, by their request
        self._announced: dict[str, Announcement] = {}
        self._announcements: list[Announcement] = []
        self._chunks: list[Chunk] = []

    def told_of_workers(self, hosts: Mapping[int, str]) -> None:
        """What each worker, by its number, says where it is dialled: it may be on another node."""
        for rank, host in hosts.items():
            self._hosts[rank] = host

    def told_of_starts(self, incarnations: Mapping[int, str]) -> None:
        """Which start each worker, by its number, says that it is. Empty without a directory."""
        for rank, incarnation in incarnations.items():
            self._incarnations[rank] = incarnation

    def arrived(self, request: Request) -> None:
        """A new request."""
        is_decode = wants_remote_prefill(request) and request.max_tokens > 1
        if not self._leaves_last or is_decode or not wants_remote_decode(request):
            return
        if leave_last_token(request):
            self._shortened.add(request.request_id)

    def scheduled(self, request: Request) -> None:
        """A request has got blocks. May be called again for the same one.

        One under the id of another, whose blocks are kept yet, is not handed over: vLLM frees them
        by that id.
        """
        if not wants_remote_decode(request) or request.request_id in self._granted:
            return
        shown = shown_id(request.request_id)
        if request.request_id in self._kept:
            logger.warning("%s will not be handed over: its id is in use", shown)
            return
        if request.prompt_token_ids is None:
            logger.warning("%s will not be handed over: it has no tokens", shown)
            return
        if self._leaves_last and request.request_id not in self._shortened:
            logger.warning("%s will not be handed over: its last token is needed here", shown)
            return
        if self._settings.extra.directory and not all(self._incarnations):
            logger.warning("%s will not be handed over: a worker is not known yet", shown)
            return
        if not self._free_slots:
            logger.warning("%s will not be handed over: too many are waiting", shown)
            return
        lease = Lease(self._free_slots.popleft(), 1 + secrets.randbelow(2**48 - 1))
        grant = Grant(lease, secrets.token_bytes(KEY_NBYTES))
        self._granted[request.request_id] = grant
        self._grants.append(grant)
        if self._overlaps and (transfer_id := transfer_id_of(request)):
            num_tokens = request.num_prompt_tokens
            announced = Announcement(lease, transfer_id, num_tokens, digest_of(request, num_tokens))
            self._announced[request.request_id] = announced
            self._announcements.append(announced)

    def computes(
        self, request_id: str, more_blocks: Sequence[Sequence[int]], num_tokens: int
    ) -> None:
        """The next step computes of this request what is missing of its first tokens.

        `more_blocks` come behind those that were told of before, by group.
        """
        if announced := self._announced.get(request_id):
            stop = min(num_tokens, announced.num_tokens)
            self._chunks.append(Chunk(announced.lease, more_blocks, stop))

    def preempted(self, request_ids: Iterable[str]) -> None:
        """The blocks of these are others' from the next step on. They begin anew, later."""
        for request_id in request_ids:
            if self._announced.pop(request_id, None):
                self._take_back(self._granted.pop(request_id))

    def finished(
        self, request: Request, block_ids: Sequence[Sequence[int]]
    ) -> dict[str, Any] | None:
        """What the decode request is to carry; the blocks are to be kept then. None: free them.

        `block_ids` are the request's, by group.
        """
        self._shortened.discard(request.request_id)
        self._announced.pop(request.request_id, None)
        grant = self._granted.pop(request.request_id, None)
        if grant is None:
            return None
        num_tokens = num_handed_over(request)
        try:
            if request.status.name not in _COMPUTED or not num_tokens:
                raise LookupError("it was not computed to its end")
            needed = [
                group.needed(ids, num_tokens)
                for group, ids in zip(self._groups, block_ids, strict=True)
            ]
        except LookupError as error:
            logger.info("%s is not handed over: %s", shown_id(request.request_id), error)
            self._take_back(grant)
            return None
        self._kept[request.request_id] = grant
        self._holds[request.request_id] = grant.lease
        handover = Handover(
            remote_engine_id=self._settings.engine_id,
            remote_request_id=request.request_id,
            **self._workers(),
            remote_block_ids=needed,
            remote_num_tokens=num_tokens,
            remote_digest=digest_of(request, num_tokens),
            remote_lease=grant.lease,
            remote_lease_s=self._settings.extra.kv_lease_duration,
            tp_size=self._tp_size,
            pp_size=self._pp_size,
        )
        return handover.proved(grant.key).to_params()

    def sent(self, request_ids: Iterable[str]) -> None:
        """The blocks of these are needed no longer, on any worker."""
        for request_id in request_ids:
            if grant := self._kept.pop(request_id, None):
                self._free_slots.append(grant.lease.slot)

    def fill(self, step: Step) -> None:
        """Adds what has come up since the last step."""
        step.drops, step.grants, step.holds = self._drops, self._grants, self._holds
        step.announcements, step.chunks = self._announcements, self._chunks
        self._drops, self._grants, self._holds = [], [], {}
        self._announcements, self._chunks = [], []

    def _take_back(self, grant: Grant) -> None:
        self._drops.append(grant.lease)
        self._free_slots.append(grant.lease.slot)

    def _workers(self) -> dict[str, Any]:
        """Which they are, or where, as a hand-over has it."""
        if self._settings.extra.directory:
            return {"remote_incarnations": self._incarnations}
        hosts = self._hosts if len(set(self._hosts)) > 1 else []
        port = self._settings.port
        return {"remote_host": self._hosts[0], "remote_hosts": hosts, "remote_port": port}


@dataclass
class _Hold:
    lease: Lease
    last_beat: int
    ends_at: float


class ProducerWorker:
    """In a worker: writes leases on its board, and looks there for what readers answer."""

    def __init__(self, board: Board, lease_s: float, sealing: Sealing | None = None) -> None:
        """`sealing`: of prompts that may be read while they are computed."""
        self._board, self._lease_s, self._sealing = board, lease_s, sealing
        self._holds: dict[str, _Hold] = {}
        self._num_expired = 0

    def apply(self, step: Step) -> None:
        """Does what the scheduler says."""
        for lease in step.drops:
            self._end(lease)
        for grant in step.grants:
            self._board.grant(grant.lease, grant.key)
        if self._sealing:
            self._sealing.begin(step)
        for request_id, lease in step.holds.items():
            self._holds[request_id] = _Hold(lease, 0, time.monotonic() + self._lease_s)

    def take_sent(self) -> set[str]:
        """Requests whose blocks may be freed: read by their reader, or not asked for in time.

        Their leases are off the board when this returns: who reads the blocks later sees it.
        """
        now = time.monotonic()
        ended = {request_id for request_id, hold in self._holds.items() if self._is_over(hold, now)}
        for request_id in ended:
            hold = self._holds.pop(request_id)
            self._end(hold.lease)
            if not self._board.is_released(hold.lease):
                self._num_expired += 1
                logger.warning(
                    "%s was not read within its lease: blocks freed", shown_id(request_id)
                )
        return ended

    def layer_saved(self, layer: str) -> None:
        """That layer is computed of all that the step computes."""
        if self._sealing:
            self._sealing.layer_saved(layer)

    def all_saved(self) -> None:
        """All layers are."""
        if self._sealing:
            self._sealing.all_saved()

    def take_num_expired(self) -> int:
        """How many leases have ended unread since the last call."""
        num_expired, self._num_expired = self._num_expired, 0
        return num_expired

    def _end(self, lease: Lease) -> None:
        self._board.end(lease)
        if self._sealing:
            self._sealing.end(lease)

    def _is_over(self, hold: _Hold, now: float) -> bool:
        beat = self._board.beat_of(hold.lease)
        if beat and beat != hold.last_beat:
            hold.last_beat, hold.ends_at = beat, now + self._lease_s
        return self._board.is_released(hold.lease) or now > hold.ends_at
