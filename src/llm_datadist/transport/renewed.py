"""What is made of files, and made anew when these were renewed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, Generic, TypeAlias, TypeVar

from llm_datadist.credential_file import identity_of
from llm_datadist.errors import LLMException, invalid
from llm_datadist.locks import make_lock
from llm_datadist.observe.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")
_Identities: TypeAlias = "tuple[tuple[int, ...] | None, ...]"

#: files that did not do are read again when they changed, else not before this
_PAUSE_S: Final = 1.0
_MAX_READS: Final = 5


class Renewed(Generic[T]):
    """A value of some files, which is of use again and again.

    Thread-safe. To look whether the files are the same costs a system call for each. Where several
    files belong together they are renewed one after the other, so for a while they may not do: then
    the former value stays, with one warning, until they do.
    """

    def __init__(self, files: Sequence[str], make: Callable[[], T]) -> None:
        """`make` reads the files; what it raises, LLMException, is raised here."""
        self._files = tuple(files)
        self._make = make
        self._lock = make_lock()
        #: the files that were tried last and did not do, and when they are tried again
        self._refused: _Identities | None = None
        self._again_at = 0.0
        self._is_warned = False
        for _ in range(_MAX_READS):
            self._seen = self._identify()
            self._value = self._make()
            if self._identify() == self._seen:
                return
        raise invalid(f"link_security: {', '.join(self._files)} change all the time")

    def get(self) -> T:
        """The value of the files as they are, or as they were when they last did."""
        found = self._identify()
        if found != self._seen:
            with self._lock:
                self._renew(found)
        return self._value

    def _identify(self) -> _Identities:
        return tuple(map(identity_of, self._files))

    def _renew(self, found: _Identities) -> None:
        if found == self._seen or (found == self._refused and time.monotonic() < self._again_at):
            return
        try:
            value = self._make()
            if self._identify() != found:
                raise invalid("link_security: they changed while they were read")
        except LLMException as error:
            self._refused, self._again_at = found, time.monotonic() + _PAUSE_S
            if not self._is_warned:
                self._is_warned = True
                get_logger().warning(
                    "what was renewed cannot be used, what was there before goes on: %s", error
                )
            return
        self._value, self._seen, self._is_warned = value, found, False
        get_logger().info("renewed: %s", ", ".join(self._files))
