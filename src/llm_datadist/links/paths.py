"""The paths of one link: each is opened and verified before it is used, and one is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist.errors import LLMException
from llm_datadist.observe.log import get_logger
from llm_datadist.transport.base import Channel, PathUnavailable, verify

if TYPE_CHECKING:
    from llm_datadist.core import link as lk
    from llm_datadist.links.context import Context
    from llm_datadist.peer.streams import StreamPool
    from llm_datadist.running.deadline import Deadline


class Paths:
    """Channels to one peer, by path. Belongs to the loop's thread."""

    def __init__(self, context: Context, streams: StreamPool) -> None:
        self._context = context
        self._streams = streams
        self._channels: dict[str, Channel] = {}
        self._is_closed = False

    async def verify(self, path: str, said: lk.Peer, deadline: Deadline) -> None:
        """Opens a path, and reads the peer's nonce over it. Raises PathUnavailable."""
        context = self._context
        if context.transports[path].may_wait:
            opening = context.loop.run_in_executor(
                context.waiters, self._open_and_verify, path, said, deadline
            )
            channel = await opening
        else:
            channel = self._open_and_verify(path, said, deadline)
        self._channels[path] = channel
        if self._is_closed:  # the link ended meanwhile
            self.close()

    def keep(self, path: str) -> Channel:
        """The channel of one path; the others are closed."""
        self._close(but=path)
        return self._channels[path]

    def close(self) -> None:
        """Closes all. They stay known: a transfer may have one."""
        self._is_closed = True
        self._close()

    def _open_and_verify(self, path: str, said: lk.Peer, deadline: Deadline) -> Channel:
        """In a thread of the waiters, unless it cannot wait. Raises PathUnavailable."""
        transport = self._context.transports[path]
        try:
            channel = transport.open(said.offers[path], self._streams)
        except LLMException as error:
            raise PathUnavailable(str(error)) from error
        try:
            verify(transport, channel, said.probe, deadline)
        except BaseException:
            channel.close()
            raise
        return channel

    def _close(self, but: str = "") -> None:
        for path, channel in dict(self._channels).items():
            try:
                if path != but:
                    channel.close()
            except Exception:  # a transport's mistake must not keep the link from ending
                get_logger().exception("closing the path %s failed", path)
