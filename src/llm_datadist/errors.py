"""Status codes, and the exception that carries one. Spec 3.2."""

from __future__ import annotations

from typing import Final, final

from llm_datadist.named_enum import NamedIntEnum

#: where the codes of LLM-DataDist begin; below it are those of other subsystems
_BASE: Final = 0x5010B000


class LLMStatusCode(NamedIntEnum):
    """Why a call failed. The numbers are those of the reference. Spec 3.2.

    Members that are marked as kept are never produced: programs name them in their retry lists.
    """

    LLM_SUCCESS = 0
    LLM_FAILED = 0xFFFFFFFF  #: the peer or the system failed in a way that no other code names
    LLM_WAIT_PROCESS_TIMEOUT = _BASE + 1  #: v1: a layer-wise transfer is still under way
    LLM_KV_CACHE_NOT_EXIST = _BASE + 2  #: no such cache, key or row, or it is gone by now
    LLM_REPEAT_REQUEST = _BASE + 3  #: kept
    LLM_REQUEST_ALREADY_COMPLETED = _BASE + 4  #: kept
    LLM_PARAM_INVALID = _BASE + 5  #: an argument or option that cannot be, whatever the state
    LLM_ENGINE_FINALIZED = _BASE + 6  #: the manager's LLMDataDist was finalized
    LLM_NOT_YET_LINK = _BASE + 7  #: no link to that cluster
    LLM_ALREADY_LINK = _BASE + 8  #: there is a link to that cluster: unlink first
    LLM_LINK_FAILED = _BASE + 9  #: the peer cannot be reached, or no path to its memory works
    LLM_UNLINK_FAILED = _BASE + 10  #: the peer cannot be told; `force` does without it
    LLM_NOTIFY_PROMPT_UNLINK_FAILED = _BASE + 11  #: kept
    LLM_CLUSTER_NUM_EXCEED_LIMIT = _BASE + 12  #: kept
    LLM_PROCESSING_LINK = _BASE + 13  #: kept
    LLM_DEVICE_OUT_OF_MEMORY = _BASE + 14  #: v1: a pool has no room
    LLM_PREFIX_ALREADY_EXIST = _BASE + 15  #: kept
    LLM_PREFIX_NOT_EXIST = _BASE + 16  #: kept
    LLM_SEQ_LENOVERLIMIT = _BASE + 17  #: kept, spelling included
    LLM_NO_FREE_BLOCK = _BASE + 18  #: kept
    LLM_BLOCKS_OUT_OF_MEMORY = _BASE + 19  #: kept
    LLM_EXIST_LINK = _BASE + 24  #: not while there are links
    LLM_FEATURE_NOT_ENABLED = _BASE + 25  #: the options leave this operation out
    LLM_TIMEOUT = _BASE + 26  #: the deadline passed
    LLM_LINK_BUSY = _BASE + 27  #: kept
    LLM_OUT_OF_MEMORY = _BASE + 28  #: a pool has no room, or cannot be obtained
    LLM_DEVICE_MEM_ERROR = 507053  #: kept: from the runtime of the reference
    LLM_SUSPECT_REMOTE_ERROR = 507057  #: kept: from the runtime of the reference
    LLM_UNKNOWN_ERROR = -1  #: kept


class LLMException(RuntimeError):
    """A call failed; `status_code` says how, the message says what and why. Spec 3.2.

    `LLMException(message)`, `LLMException(message, code)` and
    `LLMException(message, status_code=code)` are the ways to make one.
    """

    def __init__(
        self, *args: object, status_code: LLMStatusCode = LLMStatusCode.LLM_SUCCESS
    ) -> None:
        match args:
            case [message, LLMStatusCode() as code]:
                args, status_code = (message,), code
        super().__init__(*args)
        self._status_code = status_code

    @property
    def status_code(self) -> LLMStatusCode:
        """The status; LLM_SUCCESS when none was given, as in the reference. Spec 3.2."""
        return self._status_code


@final
class Status:
    """A status code with a question: is it success? No method of ours returns one. Spec 3.2."""

    def __init__(self, status_code: LLMStatusCode) -> None:
        self._status_code = status_code

    def __repr__(self) -> str:
        return f"Status({self._status_code})"

    def is_ok(self) -> bool:
        """Whether the status is LLM_SUCCESS. Spec 3.2."""
        return self._status_code == LLMStatusCode.LLM_SUCCESS

    @property
    def status_code(self) -> LLMStatusCode:
        """The status that was given. Spec 3.2."""
        return self._status_code


def code_to_status(code: int) -> LLMStatusCode:
    """The member with this number; LLM_FAILED for a number that nobody knows. Spec 3.2."""
    try:
        return LLMStatusCode(code)
    except ValueError:
        return LLMStatusCode.LLM_FAILED


def invalid(message: str) -> LLMException:
    """An LLMException with LLM_PARAM_INVALID, the status of most refusals. Spec 3.1."""
    return LLMException(message, LLMStatusCode.LLM_PARAM_INVALID)


def finalized(
    manager: str, status: LLMStatusCode = LLMStatusCode.LLM_ENGINE_FINALIZED
) -> LLMException:
    """What every method of a manager answers when its cluster is gone. Spec 3.2, 5.2."""
    return LLMException(
        f"this {manager}'s LLMDataDist was finalized, or initialised in the process that forked "
        "this one",
        status,
    )
