"""Rank-table links: what `LLMDataDist.link` asks for. Spec 5.8, 12.3."""

from __future__ import annotations

import asyncio
import os
import socket
from functools import partial
from typing import TYPE_CHECKING

from llm_datadist.checks import check_dict, check_type, check_uint32, check_uint64
from llm_datadist.core.rank_table import group_name, hosts_of, own_places, parse_rank_table
from llm_datadist.endpoint import Endpoint
from llm_datadist.errors import LLMException, LLMStatusCode, invalid
from llm_datadist.links.group import GroupPlan
from llm_datadist.observe.log import get_logger
from llm_datadist.options import BASE_PORT_VARIABLE
from llm_datadist.running.deadline import Deadline

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llm_datadist.core.rank_table import Place
    from llm_datadist.links.groups import Groups
    from llm_datadist.links.linker import Linker
    from llm_datadist.links.listening import Listening
    from llm_datadist.links.session import Session
    from llm_datadist.options import Options
    from llm_datadist.running.loop import Loop
    from llm_datadist.types import RegisterMemStatus

_MAX_NAME = 127
#: what is left over where work of the loop's thread ends by itself in time
_GRACE_S = 3.0
_MEMBERS = range(2, 5)
#: a member listens on this port + the device id of its entry, unless BASE_PORT_VARIABLE says more;
#: behind the ports that Linux gives to calls (32768 to 60999): one of those may be taken already
_BASE_PORT = 61000


class RankLinks:
    """The rank-table links of a cluster. Thread-safe."""

    def __init__(
        self,
        cluster_id: int,
        options: Options,
        loop: Loop,
        listening: Listening,
        groups: Groups,
        linker: Linker,
    ) -> None:
        self._cluster_id = cluster_id
        self._options = options
        self._loop = loop
        self._listening = listening
        self._groups = groups
        self._linker = linker
        #: one was made, which changes what may be registered (spec 5.8)
        self.were_made = False

    def link(self, comm_name: str, cluster_rank_info: dict[int, int], rank_table: str) -> int:
        """See LLMDataDist.link."""
        name = check_type("comm_name", comm_name, str)
        if not 0 < len(name) <= _MAX_NAME:
            raise invalid(f"comm_name must have 1 to {_MAX_NAME} characters, got {len(name)}")
        ranks = _check_ranks(cluster_rank_info)
        text = check_type("rank_table", rank_table, str)
        _check_order(ranks)
        if self._cluster_id not in ranks:
            raise invalid(f"cluster_rank_info lacks this cluster itself, {self._cluster_id}")
        places = parse_rank_table(text)
        base = base_port()
        members = {
            cluster_id: _endpoints(hosts_of(places, rank), base)
            for cluster_id, rank in ranks.items()
            if cluster_id != self._cluster_id
        }
        own = own_places(places, ranks[self._cluster_id], self._options.device_id)
        opened, deafness = self._open(own, places, base)
        elsewhere = {
            cluster_id: [each for each in endpoints if each not in opened]
            for cluster_id, endpoints in members.items()
        }
        options, group = self._options, group_name(name, ranks, places)
        plan = GroupPlan(
            group, elsewhere, options.link_total_time_s, options.link_retry_count, deafness
        )
        comm_id = self._loop.run(
            partial(self._start, plan), Deadline.after(self._options.sync_timeout_s)
        )
        self.were_made = True
        return comm_id

    def unlink(self, comm_id: int) -> None:
        """Ends a rank-table link once its transfers have ended. Raises LLM_NOT_YET_LINK."""
        deadline = Deadline.after(self._options.sync_timeout_s)
        sessions = list(self._groups.find(comm_id).sessions.values())
        try:
            self._loop.run(
                partial(self._leave, comm_id, sessions, deadline),
                Deadline.after(self._options.sync_timeout_s + _GRACE_S),
            )
        except BaseException:  # interrupted: the links are kept
            for session in sessions:
                if not session.is_closed:
                    session.reopen()
            raise

    def status_of(self, comm_id: int) -> RegisterMemStatus:
        """Never blocks. Raises LLMException(LLM_NOT_YET_LINK) for an id that is not known."""
        return self._groups.status_of(comm_id)

    async def _leave(self, comm_id: int, sessions: Sequence[Session], deadline: Deadline) -> None:
        left_s = max(0.0, deadline.remaining_s())
        await asyncio.gather(*(session.drain(left_s) for session in sessions))
        await self._stop(comm_id)

    async def _start(self, plan: GroupPlan) -> int:
        comm_id = self._groups.start(plan, self._linker)
        self._listening.open_meeting(plan.name)  # before the first call, which is another task's
        return comm_id

    async def _stop(self, comm_id: int) -> None:
        name = self._groups.find(comm_id).plan.name
        await self._groups.stop(comm_id)
        if not self._groups.has_link(name):
            await self._listening.close_meeting(name)

    def _open(
        self, own: Sequence[Place], places: Sequence[Place], base: int
    ) -> tuple[list[Endpoint], str]:
        """Listens where others look for us by the rank table; where that is, or why it cannot be.

        Neither, where the table has no addresses. Of several entries that may be ours the first
        that can be had is taken: who calls us tries them all. At an address of this host we listen
        there alone; one that leads here from elsewhere, as a container's host's does, is none.
        """
        hosts = [place.host for place in places if place.host is not None]
        if not hosts:
            return [], ""
        anywhere = sorted({"::" if ":" in host else "0.0.0.0" for host in hosts})
        ours = [place for place in own if place.host is not None and _is_ours(place.host)]
        wanted = [([str(place.host)], place.device_id) for place in ours] or [
            (anywhere, place.device_id) for place in own
        ]
        reasons = []
        for listen_hosts, device_id in wanted or [(anywhere, self._options.device_id)]:
            try:
                opened = [Endpoint(host, _port_of(device_id, base)) for host in listen_hosts]
                for endpoint in opened:
                    self._listening.open_for_ranks(endpoint)
            except LLMException as error:
                reasons.append(str(error))
            else:
                return opened, ""
        deafness = f"Nobody can call this member by the rank table: {'; '.join(reasons)}"
        report = get_logger().info if all(map(_is_ours, hosts)) else get_logger().warning
        report("cluster %d: %s", self._cluster_id, deafness)
        return [], deafness


def _check_ranks(value: object) -> Mapping[int, int]:
    ranks = check_dict("cluster_rank_info", value, int, int)
    if len(ranks) >= _MEMBERS.stop:
        raise invalid(f"cluster_rank_info has {len(ranks)} members, {_MEMBERS[-1]} are possible")
    for cluster_id, rank in ranks.items():
        check_uint64("a cluster id of cluster_rank_info", cluster_id)
        check_uint32(f"the rank of cluster {cluster_id}", rank)
    return ranks


def _check_order(ranks: Mapping[int, int]) -> None:
    if len(ranks) < _MEMBERS.start:
        raise invalid(f"cluster_rank_info needs {_MEMBERS.start} members, got {len(ranks)}")
    if list(ranks.values()) != sorted(ranks.values()):
        raise invalid(f"the ranks of cluster_rank_info must ascend, got {list(ranks.values())}")


def _endpoints(places: Sequence[Place], base: int) -> list[Endpoint]:
    """Where the rank table says that a member is."""
    endpoints = []
    for place in places:
        try:
            endpoints.append(Endpoint(str(place.host), _port_of(place.device_id, base)))
        except LLMException:
            if not _is_ours(str(place.host)):  # else it is met without a port
                raise
    return list(dict.fromkeys(endpoints))


def _port_of(device_id: int, base: int) -> int:
    port = base + device_id
    if not 0 < port < 2**16:
        raise LLMException(
            f"device_id {device_id} of the rank table leads to port {port}, which cannot be: "
            f"choose another {BASE_PORT_VARIABLE}",
            LLMStatusCode.LLM_LINK_FAILED,
        )
    return port


def _is_ours(host: str) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return True


def base_port() -> int:
    """What the environment says, or ours. Raises LLMException(LLM_PARAM_INVALID)."""
    text = os.environ.get(BASE_PORT_VARIABLE) or str(_BASE_PORT)
    if not text.isdigit() or not 0 < int(text) < 2**16:
        raise invalid(f"{BASE_PORT_VARIABLE} must be a port, got {text!r}")
    return int(text)
