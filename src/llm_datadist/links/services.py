"""The services of a link: the connections on which its peer asks, and we answer."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from llm_datadist.links.control import ConnectionEnded
from llm_datadist.observe.log import get_logger
from llm_datadist.owner.service import StreamService
from llm_datadist.peer.streams import MAX_STREAMS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from llm_datadist.links.context import Context
    from llm_datadist.links.control import Control
    from llm_datadist.owner.guest import Guest

_DIAL_BACK_S = 10.0
#: a peer that drops a stream asks for the next one before we have noticed
_MAX_SERVICES = 2 * MAX_STREAMS
#: streams of either kind as long as the link is being made: to verify a path takes one
MAX_EARLY = 2


class Services:
    """Starts services, and dials for a peer that cannot. Belongs to the loop's thread."""

    def __init__(
        self,
        context: Context,
        guest: Guest,
        dial: Callable[[], Awaitable[Control | None]],
        spawn: Callable[[Coroutine[object, object, None]], object],
    ) -> None:
        self._context = context
        self._guest = guest
        self._dial = dial
        self._spawn = spawn
        self._services: set[StreamService] = set()
        #: streams for the peer: under way, and to be dialled when there is room
        self._dialing = self._owed = 0
        self._is_closed = False
        guest.when_linked(lambda: self.owe(0))

    def start(self, control: Control) -> None:
        """Answers the peer's requests on a connection of its."""
        service = StreamService(
            control.socket,
            control.shield,
            control.frames,
            self._context.serving,
            self._guest,
            self._ended,
        )
        self._services.add(service)
        service.start()

    @property
    def is_full(self) -> bool:
        """Whether there are more than an honest peer uses."""
        return len(self._services) >= self._most

    def owe(self, count: int) -> None:
        """Dials streams for the peer: at once, or when it has no more than an honest one uses."""
        self._owed = min(self._owed + count, MAX_STREAMS)
        while (
            self._owed and not self._is_closed and len(self._services) + self._dialing < self._most
        ):
            self._owed -= 1
            self._dialing += 1
            self._spawn(self._add())

    @property
    def _most(self) -> int:
        return MAX_EARLY if self._guest.peer is None else _MAX_SERVICES

    def close(self) -> None:
        """The link is no more."""
        self._is_closed = True
        for service in list(self._services):
            service.close()

    def _ended(self, service: StreamService) -> None:
        self._services.discard(service)
        self.owe(0)

    async def _add(self) -> None:
        try:
            control = await asyncio.wait_for(self._dial(), _DIAL_BACK_S)
            if control is not None:
                self.start(control)
        except (OSError, asyncio.TimeoutError, ConnectionEnded) as error:
            peer = self._guest.peer
            level = logging.WARNING if self._guest.may_warn() else logging.DEBUG
            get_logger().log(
                level, "could not open a stream for cluster %s: %s",
                "that is linking" if peer is None else peer.cluster_id, error,
            )  # fmt: skip
        finally:
            self._dialing -= 1
            self.owe(0)
