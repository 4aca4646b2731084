"""The logger of the library. Spec 3.4."""

from __future__ import annotations

import logging
import os
import sys
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import TextIO

    _TextHandler = logging.StreamHandler[TextIO]
else:
    _TextHandler = logging.StreamHandler

LOGGER_NAME = "LLM_DATADIST"
LEVEL_VARIABLE = "ASCEND_GLOBAL_LOG_LEVEL"

_LEVELS = {"0": logging.DEBUG, "1": logging.INFO, "2": logging.WARNING, "3": logging.ERROR}
_FORMAT = (
    "[%(levelname)s] %(name)s(%(process)d,%(processName)s):%(asctime)s.%(msecs)03d "
    "[%(filename)s:%(lineno)d]%(thread)d %(funcName)s: %(message)s"
)
_DATE_FORMAT = "%Y-%m-%d-%H:%M:%S"

#: No lock guards the set-up: a forked child, or a signal's handler, could find it taken.
_ours: dict[None, _StdoutHandler] = {}


class _StdoutHandler(_TextHandler):
    """Writes to what `sys.stdout` is at that moment, and nothing where the program logs itself.

    Records propagate. Once the root logger has a handler it prints them, and a second line here
    would be a double.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if logging.root.handlers:
            return
        self.stream = sys.stdout
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        """Peers' words may be none of the terminal's: those are shown as escapes."""
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        return super().format(record).encode(encoding, "backslashreplace").decode(encoding)


@cache
def get_logger() -> logging.Logger:
    """The logger LLM_DATADIST, set up at the first call; importing does nothing. Spec 3.4.

    It prints to stdout from the level that ASCEND_GLOBAL_LOG_LEVEL names ("0" DEBUG to "3" ERROR,
    and ERROR for all else), read at that call. A level or handler that the program gave the logger
    before stays in place of ours.
    """
    logger = logging.getLogger(LOGGER_NAME)
    if logger.level == logging.NOTSET:
        logger.setLevel(_LEVELS.get(os.environ.get(LEVEL_VARIABLE, ""), logging.ERROR))
    if not logger.handlers:
        handler = _StdoutHandler()
        handler.setFormatter(logging.Formatter(_FORMAT, _DATE_FORMAT))
        # threads that are here at once add one and the same, which counts once
        logger.addHandler(_ours.setdefault(None, handler))
    return logger
