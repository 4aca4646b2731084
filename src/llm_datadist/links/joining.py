"""How further connections join a link, and how each end knows that they are the other's.

A connection names the link by its token, which only its ends were told. On one host the kernel says
which process is at the other end: it must be that of the link. With a shared secret it shows that
it has the link's key, too, since every member has the secret.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist.core import messages as m
from llm_datadist.endpoint import Endpoint
from llm_datadist.errors import LLMException
from llm_datadist.links.control import ConnectionEnded, Control, dial
from llm_datadist.links.services import DIAL_BACK_S
from llm_datadist.peer.streams import dial_stream
from llm_datadist.transport.stream import RequestRefused

if TYPE_CHECKING:
    import socket

    from llm_datadist.core import link as lk
    from llm_datadist.links.context import Context
    from llm_datadist.running.deadline import Deadline
    from llm_datadist.transport.same_host import Address
    from llm_datadist.transport.shield import Shield
    from llm_datadist.transport.stream import Stream


class Joining:
    """Connections that join the link of a control connection. `dial_stream` is for any thread."""

    def __init__(
        self, context: Context, control: Control, link: lk.CallerLink | lk.ListenerLink
    ) -> None:
        self._context = context
        self._control = control
        self._link = link

    def dial_stream(self, deadline: Deadline, opened: list[socket.socket]) -> Stream:
        """A stream on which we ask; its sockets are noted in `opened`. Raises LLMException."""
        control = self._control
        at, process = control.at, control.process
        shield = self._shield_to(at)
        try:
            return dial_stream(at, process, shield, self._attach, deadline, opened)
        except RequestRefused as refused:
            peer = self._link.peer
            raise LLMException(
                f"{control.at} leads to cluster {peer.cluster_id if peer else '?'}, and elsewhere, "
                f"too: {refused}",
                refused.status_code,
            ) from refused

    async def dial_service(self) -> Control | None:
        """A connection on which the peer asks; None when it does not want it any more.

        Raises OSError, ConnectionEnded.
        """
        shield = self._shield_to(self._control.at)
        control = await dial(self._control.at, self._context.waiters, shield, DIAL_BACK_S)
        try:
            if control.process != self._control.process:
                raise ConnectionEnded(f"{control.at} is another process's by now")
            # its first request, which may be large, may come with the word that it has joined
            control.frames.max_nbytes = m.MAX_REQUEST_BODY_NBYTES
            await control.send(self._attach(shield, is_reverse=True))
            answer = await control.receive()
        except BaseException:
            control.close()
            raise
        if isinstance(answer, m.Attached):
            return control
        control.close()
        return None

    def _shield_to(self, at: Address) -> Shield:
        over_tcp = isinstance(at, Endpoint)
        return self._context.shields.make(is_caller=True, over_tcp=over_tcp)

    def is_peers(self, control: Control, proof: bytes) -> bool:
        """Whether a connection that names this link is its peer's."""
        same_process = control.process == self._control.process
        return same_process and control.shield.proves(self._control.shield, proof)

    def _attach(self, shield: Shield, *, is_reverse: bool = False) -> m.Attach:
        return m.Attach(self._link.token, is_reverse, shield.proof(self._control.shield))
