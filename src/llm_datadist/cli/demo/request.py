"""A request: what the user asks, what the workers say of it, and what the parent knows of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

_MIB = 1024 * 1024
_WINDS = ("north", "north-west", "west", "south-west", "south", "east", "north-east")
_DEEDS = (
    "the keeper painted the gallery rail",
    "a storm petrel sat on the lantern room until noon",
    "the supply boat brought flour, oil and three letters",
    "fog hid the harbour and the bell rang all night",
    "the clockwork was cleaned and wound twice",
    "a schooner asked for water and left some apples",
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a user asks. Without `is_chat` the text is continued as it stands."""

    text: str
    is_chat: bool = True


def _logbook(num_days: int) -> str:
    """A lighthouse's log: text of any length without a file to ship."""
    return "\n".join(
        f"Day {day}: wind from the {_WINDS[day * 3 % len(_WINDS)]}, {day * 7 % 11} ships passed; "
        f"{_DEEDS[day * 5 % len(_DEEDS)]}."
        for day in range(1, num_days + 1)
    )


#: from shorter than a block to well beyond a thousand tokens
PROMPTS = (
    Prompt("The capital of France is", is_chat=False),
    Prompt("What does a lighthouse do? Answer in two sentences."),
    Prompt(
        "A lighthouse keeper rises before dusk, climbs the spiral stairs with a can of oil, trims "
        "the wick, polishes the lens with a soft cloth and lights the lamp. Through the night the "
        "clockwork must be wound every four hours, and in fog the bell is rung by hand. In the "
        "morning the lamp is put out, the curtains are drawn so that the sun does not crack the "
        "lens, and the log is written. Then the keeper sleeps, if the sea allows it.\n\n"
        "Write a short poem about this keeper."
    ),
    Prompt(
        f"This is the log of a lighthouse.\n\n{_logbook(20)}\n\nWhat did the supply boat bring?"
    ),
    Prompt(
        f"This is the log of a lighthouse.\n\n{_logbook(60)}\n\n"
        "Tell the story of these sixty days in a few sentences."
    ),
)


# -- what the workers say --


@dataclass(frozen=True, slots=True)
class Listening:
    """Prefill: where decode can link to it."""

    port: int


@dataclass(frozen=True, slots=True)
class Loading:
    """Either: how far the model is loaded, from 0 to 1, and what comes next."""

    fraction: float
    doing: str


@dataclass(frozen=True, slots=True)
class Linked:
    """Decode: the path of the link, and why it is no faster one ("" when it is)."""

    path: str
    path_reason: str


@dataclass(frozen=True, slots=True)
class HandOver:
    """Prefill, and the parent to decode: all that decode learns of a request. No text, no ids."""

    request_id: int
    num_tokens: int
    num_blocks: int
    #: a KVHandle as JSON: the parent passes it on, and needs no torch for that
    handle: str
    first_token: int


@dataclass(frozen=True, slots=True)
class Pulled:
    """Decode: the blocks are here, so prefill may release its own."""

    request_id: int
    nbytes: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class Token:
    """Decode: one more token, and the text it completes (which may be none yet)."""

    request_id: int
    token: int
    text: str
    is_last: bool


@dataclass(frozen=True, slots=True)
class Generated:
    """Prefill: what plain generation in one process answers."""

    request_id: int
    tokens: tuple[int, ...]


Event: TypeAlias = Listening | Loading | Linked | HandOver | Pulled | Token | Generated


# -- what the parent knows --


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

    def note_hand_over(self, hand_over: HandOver) -> None:
        """Prefill is done."""
        self.num_tokens = hand_over.num_tokens
        self.num_blocks = hand_over.num_blocks

    def note_pulled(self, pulled: Pulled) -> None:
        """The blocks are at decode."""
        self.nbytes = pulled.nbytes
        self.transfer_s = pulled.duration_s

    def note_token(self, token: Token, now_s: float) -> None:
        """Decode has streamed a token."""
        if not self.tokens:
            self.first_token_s = now_s
        self.tokens.append(token.token)
        self.text += token.text
        if token.is_last:
            self.finished_s = now_s

    @property
    def is_at_decode(self) -> bool:
        """Whether decode has work to do for it."""
        return self.num_tokens > 0 and not self.is_finished

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
