"""A call of the interface: no exception leaves it but TypeError."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final, final

from llm_datadist.checks import is_of_check
from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.hixl.status import (
    FAILED,
    NAMES,
    PARAM_INVALID,
    RESOURCE_EXHAUSTED,
    SUCCESS,
    Status,
    status_of,
)
from llm_datadist.observe.log import get_logger

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

_SCARCE: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN)


class Exhausted(LLMException):
    """Something of which there is only so much is used up for now."""

    def __init__(self, message: str) -> None:
        super().__init__(message, LLMStatusCode.LLM_OUT_OF_MEMORY)


@final
class Call:
    """Turns what is raised inside of it into a status, and logs the cause, once.

    A TypeError is a slip of the program's, and passes; so does what a signal's handler raised.
    """

    def __init__(self, name: str, engine: object) -> None:
        self._name = name
        self._engine = engine
        self.status: Status = SUCCESS

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if error is None:
            return True
        status = _status(error)
        if status is None:
            return False
        self.status = status
        get_logger().error(
            "%s of engine %s failed with %s: %s", self._name, self._engine, NAMES[status], error
        )
        return True


def _status(error: BaseException) -> Status | None:
    """None for what is no failure of the call."""
    if isinstance(error, LLMException):
        # an exception that carries no status does not make a call a success
        return status_of(error.status_code) or FAILED
    if is_of_check(error):
        return PARAM_INVALID
    if isinstance(error, OSError) and error.errno is not None:  # a system call's
        return RESOURCE_EXHAUSTED if error.errno in _SCARCE else FAILED
    return None
