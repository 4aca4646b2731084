"""The status of a call, as a number, and how ours are told by it."""

from __future__ import annotations

from typing import Final, TypeAlias

from llm_datadist.errors import LLMStatusCode

#: what most methods return; SUCCESS is 0
Status: TypeAlias = int

SUCCESS: Final[Status] = 0
#: an argument, an option or an address that cannot be, whatever the state
PARAM_INVALID: Final[Status] = 103900
#: the deadline passed
TIMEOUT: Final[Status] = 103901
#: no connection to that engine, or it has ended
NOT_CONNECTED: Final[Status] = 103902
#: there is a connection to that engine: disconnect first
ALREADY_CONNECTED: Final[Status] = 103903
#: kept: the reference has it in reserve
NOTIFY_FAILED: Final[Status] = 103904
#: the other end does not have that: a cluster of LLM-DataDist takes no notices
UNSUPPORTED: Final[Status] = 103905
#: a queue, the pool of channels, threads or descriptors are exhausted: try again later
RESOURCE_EXHAUSTED: Final[Status] = 203900
#: the peer or the system failed in a way that no other code names
FAILED: Final[Status] = 503900

_OF: Final = {
    LLMStatusCode.LLM_SUCCESS: SUCCESS,
    LLMStatusCode.LLM_PARAM_INVALID: PARAM_INVALID,
    LLMStatusCode.LLM_KV_CACHE_NOT_EXIST: PARAM_INVALID,
    LLMStatusCode.LLM_TIMEOUT: TIMEOUT,
    LLMStatusCode.LLM_NOT_YET_LINK: NOT_CONNECTED,
    LLMStatusCode.LLM_ALREADY_LINK: ALREADY_CONNECTED,
    LLMStatusCode.LLM_FEATURE_NOT_ENABLED: UNSUPPORTED,
    LLMStatusCode.LLM_OUT_OF_MEMORY: RESOURCE_EXHAUSTED,
}


def status_of(code: LLMStatusCode) -> Status:
    """What stands here for a status of LLM-DataDist."""
    return _OF.get(code, FAILED)


#: what a status is called, for logs
NAMES: Final = {
    value: name
    for name, value in tuple(globals().items())
    if isinstance(value, int) and name.isupper()
}
