"""What the parent knows of a request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llm_datadist.cli.demo.messages import HandOver, Pulled
    from llm_datadist.cli.demo.prompts import Prompt

_MIB = 1024 * 1024


@dataclass(slots=True)
class Request:
    """A prompt on its way through both workers, and what was measured."""

    request_id: int
    prompt: Prompt
    submitted_s: float
    first_token_s: float = 0.0
    num_tokens: int = 0
    num_blocks: int = 0
    nbytes: int = 0
    transfer_s: float = 0.0
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finished_s: float | None = None
    #: the tokens of plain generation in one process
    plain_tokens: list[int] = field(default_factory=list)

    def note_hand_over(self, message: HandOver) -> None:
        """Prefill is done."""
        self.num_tokens = message.num_tokens
        self.num_blocks = message.num_blocks

    def note_pulled(self, message: Pulled) -> None:
        """The blocks are at decode."""
        self.nbytes = message.nbytes
        self.transfer_s = message.duration_s

    def note_token(self, token: int, text: str, now_s: float) -> None:
        """Decode has streamed a token."""
        if not self.tokens:
            self.first_token_s = now_s
        self.tokens.append(token)
        self.text += text

    @property
    def is_finished(self) -> bool:
        """Whether the answer is complete."""
        return self.finished_s is not None

    @property
    def is_identical(self) -> bool:
        """Whether both ways gave the same tokens."""
        return self.tokens == self.plain_tokens

    @property
    def time_to_first_token_s(self) -> float:
        """From submission to the first token that decode streamed."""
        return self.first_token_s - self.submitted_s

    @property
    def kv_mib(self) -> float:
        """What the transfer moved, in MiB."""
        return self.nbytes / _MIB

    @property
    def gb_per_s(self) -> float:
        """The speed of the transfer, in 10^9 bytes per second."""
        return self.nbytes / self.transfer_s / 1e9
