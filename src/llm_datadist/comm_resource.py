"""What `local_comm_res` and `global_resource_config` must be, though no hardware reads them here.

The reference parses both: with a transfer backend when a cluster starts, and without one the first
when a link is made. Spec 5.1, 5.4, 7.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from llm_datadist import option_keys as key
from llm_datadist.checks import check_json_object, describe
from llm_datadist.errors import LLMException, invalid

if TYPE_CHECKING:
    from collections.abc import Mapping

_VERSIONS: Final = ("1.0", "1.2", "1.3")
_MAX_NBYTES: Final = 64 * 1024


def check_resources(raw: Mapping[str, str]) -> str:
    """Why these options let no link be made; "" where they do.

    Raises LLMException (LLM_PARAM_INVALID) for options that have a transfer backend, and resources
    that it cannot read.
    """
    if key.TRANSFER_BACKEND in raw:
        _check(key.LOCAL_COMM_RES, raw)
        _check(key.GLOBAL_RESOURCE_CONFIG, raw)
        return ""
    try:
        _check(key.LOCAL_COMM_RES, raw)
    except LLMException as error:
        return str(error)
    return ""


def _check(name: str, raw: Mapping[str, str]) -> None:
    """That the option, if it is there and not empty, is JSON of a version that is known."""
    text = raw.get(name)
    if not text:
        return
    if len(text.encode(errors="replace")) > _MAX_NBYTES:
        raise invalid(f"{name} must have at most {_MAX_NBYTES} bytes")
    version = check_json_object(name, text).get("version", _VERSIONS[0])
    if version not in _VERSIONS:
        known = ", ".join(_VERSIONS)
        raise invalid(f"{name} has version {describe(version)}, known are {known}")
