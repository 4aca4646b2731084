"""Which engine a request goes to: by the work that waits there, and what it has of the prompt."""

from __future__ import annotations

import hashlib
import json
import time
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

#: so much of a prompt is one piece: tokens, or characters of a text
_PIECE_TOKENS, _PIECE_CHARACTERS = 64, 256
#: beginnings of prompts that are remembered of each engine
_MOST_BEGINNINGS = 20_000
#: how long an engine that failed is the last choice
_SHUN_S = 5.0


@dataclass(frozen=True)
class Prompt:
    """Its beginnings, by piece: the same digest means the same beginning."""

    beginnings: tuple[bytes, ...]

    @classmethod
    def of(cls, request: dict[str, Any]) -> Prompt:
        """That of a completion or a chat, whatever is in it."""
        prompt = request.get("prompt", request.get("messages", ""))
        is_tokens = isinstance(prompt, list) and all(isinstance(each, int) for each in prompt)
        size = _PIECE_TOKENS if is_tokens else _PIECE_CHARACTERS
        whole = prompt if is_tokens or isinstance(prompt, str) else json.dumps(prompt)
        model = str(request.get("model")).encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(model, digest_size=16)
        beginnings = []
        for at in range(0, len(whole), size):
            digest.update(repr(whole[at : at + size]).encode())
            beginnings.append(digest.digest())
        return cls(tuple(beginnings))

    @property
    def work(self) -> float:
        """That of computing all of it, in pieces, and a little for being a request."""
        return len(self.beginnings) + 0.5


@dataclass(eq=False)
class Engine:
    """One that answers at `url`, and what it was asked by us."""

    url: str
    #: "PROMPT", "DECODER", or "MIX"; an engine has several workers, which say the same
    roles: set[str] = field(default_factory=set)
    #: what it was asked to do, and has not done yet
    load: float = 0.0
    num_asked: int = 0
    shunned_until: float = 0.0
    #: the one that was used last is the last
    _beginnings: OrderedDict[bytes, None] = field(default_factory=OrderedDict)

    def known(self, prompt: Prompt) -> int:
        """How many pieces of the prompt it has, as far as we asked it."""
        count = 0
        for beginning in prompt.beginnings:
            if beginning not in self._beginnings:
                break
            count += 1
        return count

    @contextmanager
    def working(self, prompt: Prompt, work: float) -> Iterator[None]:
        """It is asked now; when it fails, it is shunned for a while."""
        self.load += work
        self.num_asked += 1
        try:
            yield
        except Exception:
            self.shunned_until = time.monotonic() + _SHUN_S
            raise
        finally:
            self.load -= work

    def knows(self, prompt: Prompt) -> None:
        """It has done what it was asked."""
        for beginning in prompt.beginnings:
            self._beginnings[beginning] = None
            self._beginnings.move_to_end(beginning)
        while len(self._beginnings) > _MOST_BEGINNINGS:
            self._beginnings.popitem(last=False)

    @property
    def is_shunned(self) -> bool:
        """Whether it failed a moment ago."""
        return time.monotonic() < self.shunned_until

    def begin_anew(self) -> None:
        """It was started again: it has nothing, and nothing is held against it."""
        self._beginnings.clear()
        self.shunned_until = 0.0


def for_prefill(engines: Iterable[Engine], prompt: Prompt) -> tuple[Engine, float] | None:
    """Where the prompt is computed soonest, and the work: what waits there, and what is missing."""
    return _best((each, prompt.work - each.known(prompt)) for each in engines)


def for_decode(engines: Iterable[Engine], prompt: Prompt) -> tuple[Engine, float] | None:
    """Where fewest requests are answered; one that has the prompt need not read all of it."""
    missing = ((each, 1 - each.known(prompt) / prompt.work) for each in engines)
    return _best((each, 1 + part / 2) for each, part in missing)


def _best(choices: Iterable[tuple[Engine, float]]) -> tuple[Engine, float] | None:
    def cost(choice: tuple[Engine, float]) -> tuple[bool, float, int]:
        engine, work = choice
        return engine.is_shunned, engine.load + work, engine.num_asked

    return min(choices, key=cost, default=None)
