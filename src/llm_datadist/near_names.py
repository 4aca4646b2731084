"""Names that programs assign to: one that is nearly a known one is a slip of the hand.

In Python a misspelt attribute is a new one, and what it was to say is lost in silence. A name that
nobody knows at all may be of a newer release: it is taken, and a warning says that it has no
effect.
"""

from __future__ import annotations

import re
import sys
import warnings
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

#: words are the same, but for a slip, from here on: "cahce" and "cache", "cfg" and "config"; slips
#: seldom change the first letter, as from "retries" to "metrics"
_ALIKE_WORDS: Final = 0.66
_ALIKE_BUT_FIRST: Final = 0.75
#: for whole names that fall into words otherwise, and for those that leave words out
_ALIKE_NAMES: Final = 0.9
_ALIKE_PARTS: Final = 0.8
#: a longer one is no slip, and comparing takes time that grows with its square
_MAX_LENGTH: Final = 64

_WORD: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+|[^\W_a-zA-Z0-9]+")

#: what a warning was given for
_warned: set[tuple[str, str]] = set()


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that was probably meant, if any; not for a name that is known.

    Case and underscores do not count, nor the order of words. A whole word more makes another name:
    newer releases have such names.
    """
    if len(name) > _MAX_LENGTH:
        return None
    words = _words(name)
    near = [each for each in known if _is_near(words, _words(each))]
    return max(near, key=lambda each: _alike(_joined(words), _joined(_words(each))), default=None)


def warn_of_unknown(owner: str, name: str, meant: str | None = None) -> None:
    """That `name` has no effect: a UserWarning at the program's line, once in a process."""
    if (owner, name) not in _warned:
        _warned.add((owner, name))
        hint = f"; is {meant!r} meant?" if meant else ""
        text = f"{owner} does not know {name!r:.80} in this release: it has no effect{hint}"
        warnings.warn(text, UserWarning, stacklevel=_level_of_caller())


class NamedAttributes:
    """Base of what programs fill in by assignment.

    Assigning to a name that is nearly one of the class's is an AttributeError; to another that the
    class does not have is a UserWarning, once for each name. Names with an underscore before them
    are as everywhere in Python.
    """

    if not TYPE_CHECKING:  # type checkers would let any name pass, if they saw this method

        def __setattr__(self, name: str, value: object) -> None:
            if not name.startswith("_") and name not in vars(self):
                _check_known(type(self), name)
            super().__setattr__(name, value)


class NamedMembers:
    """Base of structs with slots: nothing but a member can be assigned to, and the error helps."""

    __slots__ = ()

    if not TYPE_CHECKING:  # as above

        def __setattr__(self, name: str, value: object) -> None:
            try:
                super().__setattr__(name, value)
            except AttributeError:
                _refuse_near(type(self), name, _names_of(type(self)))
                raise


def _check_known(kind: type, name: str) -> None:
    known = _names_of(kind)
    if name not in known:
        _refuse_near(kind, name, known)
        warn_of_unknown(kind.__name__, name)


def _names_of(kind: type) -> set[str]:
    return {each for base in kind.__mro__ for each in vars(base) if not each.startswith("_")}


def _refuse_near(kind: type, name: str, known: Iterable[str]) -> None:
    meant = nearest(name, known)
    if meant is not None:
        raise AttributeError(
            f"{kind.__name__} has no attribute {name!r}: is {meant!r} meant?"
        ) from None


def _is_near(words: Sequence[str], known: Sequence[str]) -> bool:
    one, other = _joined(words), _joined(known)
    ratio = _alike(one, other)
    if len(words) == len(known):
        pairs = zip(words, known, strict=True), zip(sorted(words), sorted(known), strict=True)
        is_slip = any(all(_are_alike(*pair) for pair in each) for each in pairs)
        return is_slip or ratio >= _ALIKE_NAMES
    if len(words) < len(known):
        are_parts = all(any(_are_alike(word, each) for each in known) for word in words)
        return ratio >= (_ALIKE_PARTS if are_parts else _ALIKE_NAMES)
    is_longer = set(known) < set(words) and any(len(each) > 2 for each in set(words) - set(known))
    return ratio >= _ALIKE_NAMES and not is_longer


def _are_alike(one: str, other: str) -> bool:
    return _alike(one, other) >= (_ALIKE_WORDS if one[0] == other[0] else _ALIKE_BUT_FIRST)


def _alike(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other, autojunk=False).ratio()


def _words(name: str) -> list[str]:
    """Of snake_case, camelCase and dotted names, in small letters."""
    return [word.lower() for word in _WORD.findall(name)]


def _joined(words: Sequence[str]) -> str:
    return "".join(words)


def _level_of_caller() -> int:
    """How far up the first frame is that is not the library's, for `warnings.warn`."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    return level


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == "llm_datadist"
