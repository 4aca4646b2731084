"""Where a cluster listens: for those that link to it by address, and by rank table."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from llm_datadist.core.rank_table import link_of
from llm_datadist.endpoint import Endpoint
from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.links.listener import Listener, bind
from llm_datadist.links.rendezvous import take_place
from llm_datadist.observe.log import get_logger
from llm_datadist.running.bell import Turns
from llm_datadist.running.deadline import Deadline

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

    from llm_datadist.core.stats import ClusterStats
    from llm_datadist.links.context import Context
    from llm_datadist.links.groups import Groups
    from llm_datadist.links.ids import Ids
    from llm_datadist.links.session import Registrar
    from llm_datadist.links.strangers import Strangers
    from llm_datadist.links.table import LinkTable
    from llm_datadist.options import Options
    from llm_datadist.running.loop import Loop
    from llm_datadist.running.threads import Errands


#: what the loop's thread has to open or close a listener
_LISTENER_S = 10.0


class Listening:
    """Opens, moves and closes the listeners of a cluster; `move` one call after the other."""

    def __init__(
        self,
        loop: Loop,
        errands: Errands,
        context: Context,
        links: LinkTable,
        groups: Groups,
        ids: Ids,
        registrar: Registrar,
        strangers: Strangers,
        take_snapshot: Callable[[], ClusterStats],
    ) -> None:
        self._loop = loop
        #: an interruption must not leave a port open that nobody knows of
        self._errands = errands
        self._context = context
        self._links = links
        self._groups = groups
        self._ids = ids
        self._registrar = registrar
        self._strangers = strangers
        self._take_snapshot = take_snapshot
        self._switches = Turns()
        self._listener: Listener | None = None
        #: where it was asked to listen
        self.asked: Endpoint | None = None
        #: where the listener really is, the port that was taken for 0 included
        self.endpoint: Endpoint | None = None
        #: where peers of this host are met, while there is any other listener
        self._same_host: Listener | None = None
        #: where members of rank-table links reach us by TCP, and on this host, by the link
        self._rank_listeners: dict[Endpoint, Listener] = {}
        self._meeting_listeners: dict[str, Listener] = {}

    def move(self, endpoint: Endpoint | None) -> None:
        """Listens there, or no more. Spec 5.7.

        Raises LLMException: LLM_EXIST_LINK while there are links, LLM_FAILED when the address
        cannot be had, LLM_TIMEOUT when what is under way at the former one does not end; all is
        then as it was. A caller that is interrupted leaves it to be done.
        """
        self._errands.run(partial(self._move, endpoint))

    def _move(self, endpoint: Endpoint | None) -> None:
        if self._links.all():
            raise LLMException("unlink all clusters first", LLMStatusCode.LLM_EXIST_LINK)
        if endpoint == self.asked:
            return
        before, self.asked = self.asked, None
        taken = self.endpoint
        try:
            self._loop.run(self._close_main, Deadline.after(_LISTENER_S))
            self._open(endpoint)
        except LLMException:
            if self._listener is None:  # else its end has not even begun
                self._open(taken)
            self.asked = before
            raise
        self.asked = endpoint

    @contextmanager
    def switching(self, options: Options) -> Iterator[None]:
        """One change of the role after the other: they have the turn here, one at a time.

        No lock: `switch` waits for the loop's thread. Raises LLMException(LLM_TIMEOUT) when others
        take longer than the cluster's time-out.
        """
        call = object()
        try:
            deadline = Deadline.after(options.sync_timeout_s)
            self._switches.take(
                call, deadline, "waiting for the switch of the role before this one"
            )
            yield
        finally:
            self._switches.leave(call)

    def switch(self, endpoint: Endpoint | None, options: Options) -> None:
        """As `move`, for a change of the role, in its turn. Spec 5.7.

        Raises LLM_FEATURE_NOT_ENABLED, too: for another address with a transfer backend.
        """
        if options.transfer_backend is None:
            self.move(endpoint)
        elif endpoint not in (None, options.listen, self.endpoint):
            raise LLMException(
                f"with a transfer backend the address stays {self.endpoint or options.listen}",
                LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
            )

    def put_back(self, asked: Endpoint | None, taken: Endpoint | None) -> None:
        """As it was before a `move`, where it was asked to listen and did. Raises LLMException."""
        self._errands.run(partial(self._put_back, asked, taken))

    def _put_back(self, asked: Endpoint | None, taken: Endpoint | None) -> None:
        self.asked = None
        self._loop.run(self._close_main, Deadline.after(_LISTENER_S))
        self._open(taken)
        self.asked = asked

    def open_for_ranks(self, endpoint: Endpoint) -> None:
        """Listens there, too, as long as the cluster lives. Raises LLMException(LLM_FAILED)."""
        self._errands.run(partial(self._open_for_ranks, endpoint))

    def _open_for_ranks(self, endpoint: Endpoint) -> None:
        if endpoint not in self._rank_listeners:
            sock = bind(endpoint, is_v6_only=endpoint.host == "::")  # 0.0.0.0 has its own
            self._warn_of_strangers(endpoint)
            self._listen_on(sock, partial(self._rank_listeners.__setitem__, endpoint))

    def open_meeting(self, group: str) -> None:
        """Can be met on this host by members of that group. In the loop's thread."""
        link = link_of(group)
        if link not in self._meeting_listeners:
            sock = take_place(group, self._context.me.cluster_id)
            if sock is not None:
                self._meeting_listeners[link] = self._start(sock)

    async def close_meeting(self, group: str) -> None:
        """The end of `open_meeting`, and of all links that were made there."""
        listener = self._meeting_listeners.pop(link_of(group), None)
        if listener is not None:
            await listener.close()

    async def close(self) -> None:
        """In the loop's thread."""
        await self._close_main()

    async def close_for_ranks(self) -> None:
        """In the loop's thread."""
        for listener in (*self._rank_listeners.values(), *self._meeting_listeners.values()):
            await listener.close()
        await self._close_same_host()
        self._strangers.close()

    def _open(self, endpoint: Endpoint | None) -> None:
        if endpoint is None:
            return
        sock = bind(endpoint)
        self._warn_of_strangers(endpoint)
        self.endpoint = Endpoint.of(sock.getsockname())
        self._listen_on(sock, partial(setattr, self, "_listener"))

    def _listen_on(self, sock: socket.socket, note: Callable[[Listener], None]) -> None:
        """Noted where listeners are closed, in the loop's thread: none is made behind the end."""
        try:
            self._loop.run(partial(self._make, sock, note), Deadline.after(_LISTENER_S))
        except BaseException:  # the cluster is finalized meanwhile
            sock.close()
            raise

    def _warn_of_strangers(self, endpoint: Endpoint) -> None:
        if not self._context.shields.is_secure and not endpoint.is_loopback:
            get_logger().warning(
                "cluster %d listens on %s without link security: whoever reaches that address "
                "can link and read what is registered; set LLMConfig.link_security",
                self._context.me.cluster_id, endpoint,
            )  # fmt: skip

    async def _make(self, sock: socket.socket, note: Callable[[Listener], None]) -> None:
        note(self._start(sock))

    def _start(self, sock: socket.socket) -> Listener:
        if self._same_host is None and self._context.same_host is not None:
            try:
                self._same_host = self._listener_on(self._context.same_host.listen())
            except OSError as error:
                get_logger().warning("peers of this host cannot be met: %s", error)
        return self._listener_on(sock)

    def _listener_on(self, sock: socket.socket) -> Listener:
        return Listener(
            sock,
            self._context,
            self._links,
            self._groups,
            self._ids,
            self._registrar,
            self._strangers,
            self._take_snapshot,
        )

    async def _close_main(self) -> None:
        listener, self._listener, self.endpoint = self._listener, None, None
        if listener is not None:
            await listener.close()
        if not self._rank_listeners and not self._meeting_listeners:
            await self._close_same_host()

    async def _close_same_host(self) -> None:
        if self._same_host is not None:
            await self._same_host.close()
        self._same_host = None
