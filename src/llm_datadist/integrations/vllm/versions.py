"""Which versions of vLLM this connector was run on."""

from __future__ import annotations

import logging
from typing import Final

logger = logging.getLogger(__name__)

#: what `make vllm-demo` pins is among them
RUN_ON: Final = ("0.32.0",)


def check_version(version: str) -> None:
    """Warns of a version that the connector was not run on: vLLM may change this interface.

    What is not there any more fails when it is imported. What means something else by now does not,
    so read what `make vllm-demo` says with that version before its answers are used.
    """
    if version.partition("+")[0] not in RUN_ON:
        logger.warning(
            "LLMDataDistConnector was run on vLLM %s, and this is %s", ", ".join(RUN_ON), version
        )
