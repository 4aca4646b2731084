"""What the library logs while the doctor looks: why a link failed, or is slow."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llm_datadist.observe.log import LOGGER_NAME, get_logger

if TYPE_CHECKING:
    from collections.abc import Iterator


class LogBook(logging.Handler):
    """Keeps warnings and errors, in place of printing them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(record)

    @property
    def warnings(self) -> list[str]:
        return [record.getMessage() for record in self._records if record.levelno < logging.ERROR]

    @property
    def reason(self) -> str:
        """Why the last link failed; empty when none did."""
        reasons = [record.reason for record in self._records if hasattr(record, "reason")]
        return str(reasons[-1]) if reasons else ""


@contextmanager
def log_book() -> Iterator[LogBook]:
    """Keeps what is logged meanwhile."""
    logger, book = get_logger(), LogBook()
    handlers, logger.handlers, level = logger.handlers, [book], logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield book
    finally:
        logger.handlers = handlers
        logger.setLevel(level)


def log_to_stderr() -> None:
    """Keeps the log of this process out of what the command prints. Before anything is logged."""
    logging.getLogger(LOGGER_NAME).addHandler(logging.StreamHandler())
