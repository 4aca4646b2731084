"""A call of the C++ interface: no exception leaves it but TypeError. Spec 7.4."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from llm_datadist.checks import is_of_check
from llm_datadist.cpp.status import LLM_FAILED, LLM_PARAM_INVALID, LLM_SUCCESS, Status
from llm_datadist.errors import LLMException, code_to_status
from llm_datadist.observe.log import get_logger

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self


@final
class Call:
    """Turns what is raised inside of it into a status, and logs the cause, once.

    A TypeError is a slip of the program's, which C++ would not compile; it passes, and so does what
    a signal's handler raised.
    """

    def __init__(self, name: str, cluster_id: int) -> None:
        self._name = name
        self._cluster_id = cluster_id
        self.status: Status = LLM_SUCCESS

    def fail(self, status: Status, cause: object) -> None:
        """The call's status and why it has that."""
        # an exception that carries no status does not make a call a success
        self.status = status or LLM_FAILED
        get_logger().error(
            "%s of cluster %d failed with %s: %s",
            self._name, self._cluster_id, code_to_status(self.status), cause,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if isinstance(error, LLMException):
            self.fail(int(error.status_code), error)
        elif is_of_check(error):
            self.fail(LLM_PARAM_INVALID, error)
        elif isinstance(error, OSError) and error.errno is not None:  # a system call's
            self.fail(LLM_FAILED, error)
        else:
            return False
        return True
