"""Connections made by hand that know the shared secret."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING

from wire import PATIENCE_S, Wire

from llm_datadist.core import messages as m
from llm_datadist.transport.secret import KEYED_HEAD_NBYTES, Secret

if TYPE_CHECKING:
    from typing_extensions import Self

SECRET = "a secret of more than sixteen bytes"
BY_SECRET = json.dumps({"secret": SECRET})
#: what each end sends in the hand-shake: a greeting with a nonce, a nonce with a MAC, a MAC
GREETING_NBYTES, ANSWER_NBYTES, PROOF_NBYTES = 40, 64, 32
#: what stands in front of each keyed frame
HEAD_NBYTES = KEYED_HEAD_NBYTES


class KeyedWire(Wire):
    """One connection behind the hand-shake of the shared secret."""

    def __init__(self, sock: socket.socket, *, is_caller: bool, secret: str = SECRET) -> None:
        """Raises NotAuthentic, or EOFError when the other end finds that we are not."""
        super().__init__(sock)
        self.shield = Secret(secret.encode(), is_caller=is_caller)
        self.send_bytes(self.shield.start())
        for nbytes in [ANSWER_NBYTES] if is_caller else [GREETING_NBYTES, PROOF_NBYTES]:
            self.send_bytes(self.shield.answer(self.receive_bytes(nbytes)))

    @classmethod
    def dial(cls, port: int, own_host: str = "127.0.0.1") -> Self:
        sock = socket.create_connection(("127.0.0.1", port), PATIENCE_S, (own_host, 0))
        return cls(sock, is_caller=True)

    def proof(self, control: Wire) -> bytes:
        assert isinstance(control, KeyedWire)
        return self.shield.proof(control.shield)

    def send(self, message: m.Message) -> None:
        self.send_bytes(self.shield.seal(m.encode(message)))

    def receive(self) -> m.AnyMessage:
        head = self.receive_bytes(HEAD_NBYTES)
        frame = self.receive_bytes(self.shield.frame_nbytes(head))
        return m.decode_frame(self.shield.open_frame(head + frame))
