"""Status codes and the exception. Spec 3.2."""

from __future__ import annotations

import pickle

import pytest

from llm_datadist.errors import LLMException, LLMStatusCode, Status, code_to_status, invalid

NUMBERS = {
    "LLM_SUCCESS": 0,
    "LLM_FAILED": 4294967295,
    "LLM_WAIT_PROCESS_TIMEOUT": 0x5010B001,
    "LLM_KV_CACHE_NOT_EXIST": 0x5010B002,
    "LLM_REPEAT_REQUEST": 0x5010B003,
    "LLM_REQUEST_ALREADY_COMPLETED": 0x5010B004,
    "LLM_PARAM_INVALID": 0x5010B005,
    "LLM_ENGINE_FINALIZED": 0x5010B006,
    "LLM_NOT_YET_LINK": 0x5010B007,
    "LLM_ALREADY_LINK": 0x5010B008,
    "LLM_LINK_FAILED": 0x5010B009,
    "LLM_UNLINK_FAILED": 0x5010B00A,
    "LLM_NOTIFY_PROMPT_UNLINK_FAILED": 0x5010B00B,
    "LLM_CLUSTER_NUM_EXCEED_LIMIT": 0x5010B00C,
    "LLM_PROCESSING_LINK": 0x5010B00D,
    "LLM_DEVICE_OUT_OF_MEMORY": 0x5010B00E,
    "LLM_PREFIX_ALREADY_EXIST": 0x5010B00F,
    "LLM_PREFIX_NOT_EXIST": 0x5010B010,
    "LLM_SEQ_LENOVERLIMIT": 0x5010B011,
    "LLM_NO_FREE_BLOCK": 0x5010B012,
    "LLM_BLOCKS_OUT_OF_MEMORY": 0x5010B013,
    "LLM_EXIST_LINK": 0x5010B018,
    "LLM_FEATURE_NOT_ENABLED": 0x5010B019,
    "LLM_TIMEOUT": 1343270938,
    "LLM_LINK_BUSY": 0x5010B01B,
    "LLM_OUT_OF_MEMORY": 0x5010B01C,
    "LLM_DEVICE_MEM_ERROR": 507053,
    "LLM_SUSPECT_REMOTE_ERROR": 507057,
    "LLM_UNKNOWN_ERROR": -1,
}


@pytest.mark.shows("status.codes")
def test_status_codes_have_the_numbers_of_the_reference() -> None:
    assert {code.name: code.value for code in LLMStatusCode} == NUMBERS


@pytest.mark.shows("status.codes")
@pytest.mark.parametrize(
    ("code", "text"), [(code, f"LLMStatusCode.{code.name}") for code in LLMStatusCode]
)
def test_a_status_code_prints_its_name(code: LLMStatusCode, text: str) -> None:
    assert (str(code), f"{code}") == (text, text)


def test_a_status_code_formats_as_a_number_on_request() -> None:
    assert f"{LLMStatusCode.LLM_TIMEOUT:#x}" == "0x5010b01a"


def test_an_unknown_number_is_llm_failed() -> None:
    assert code_to_status(507899) is LLMStatusCode.LLM_FAILED


def test_a_known_number_is_its_status() -> None:
    assert code_to_status(0x5010B007) is LLMStatusCode.LLM_NOT_YET_LINK


@pytest.mark.shows("status.exception", "relies.17")
@pytest.mark.parametrize(
    "error",
    [
        LLMException("no room", LLMStatusCode.LLM_OUT_OF_MEMORY),
        LLMException("no room", status_code=LLMStatusCode.LLM_OUT_OF_MEMORY),
    ],
    ids=["positional", "keyword"],
)
def test_an_exception_carries_its_status_beside_its_message(error: LLMException) -> None:
    assert error.status_code is LLMStatusCode.LLM_OUT_OF_MEMORY
    assert str(error) == "no room"


@pytest.mark.shows("status.exception", "relies.17")
def test_an_exception_without_a_status_has_success() -> None:
    assert LLMException("who knows").status_code is LLMStatusCode.LLM_SUCCESS


def test_a_plain_number_is_part_of_the_message_and_no_status() -> None:
    assert LLMException("took", 7).args == ("took", 7)


@pytest.mark.shows("status.exception")
def test_an_exception_can_be_caught_as_a_runtime_error() -> None:
    with pytest.raises(RuntimeError):
        raise LLMException


@pytest.mark.shows("status.exception")
def test_the_status_of_an_exception_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        LLMException("no").status_code = LLMStatusCode.LLM_FAILED  # type: ignore[misc]


def test_an_exception_survives_pickling() -> None:
    copy = pickle.loads(pickle.dumps(LLMException("late", LLMStatusCode.LLM_TIMEOUT)))
    assert (str(copy), copy.status_code) == ("late", LLMStatusCode.LLM_TIMEOUT)


def test_invalid_makes_an_exception_with_param_invalid() -> None:
    assert invalid("no").status_code is LLMStatusCode.LLM_PARAM_INVALID


@pytest.mark.shows("status.status")
@pytest.mark.parametrize(
    ("code", "is_ok"), [(LLMStatusCode.LLM_SUCCESS, True), (LLMStatusCode.LLM_FAILED, False)]
)
def test_a_status_is_ok_only_on_success(code: LLMStatusCode, is_ok: bool) -> None:
    status = Status(code)
    assert status.is_ok() is is_ok
    assert status.status_code is code
