"""The inside of a worker process: entry, loading, and how it ends."""

from __future__ import annotations

import logging
import os
import traceback
from typing import TYPE_CHECKING

from llm_datadist.cli.demo.failure import DemoError
from llm_datadist.cli.demo.messages import Failed, Loading
from llm_datadist.observe.log import LOGGER_NAME

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from llm_datadist.cli.demo.messages import Role, ToParent, ToWorker
    from llm_datadist.cli.demo.settings import Settings

    ToProxy = Connection[ToParent, ToWorker]


class LoggedErrors(logging.Handler):
    """Keeps what the library logs as an error, instead of a print amid the answers."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._messages: list[str] = []
        logging.getLogger(LOGGER_NAME).addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())

    def added_to(self, message: str) -> str:
        """`message`, and below it what was logged."""
        return "\n".join([message, *self._messages])


def run(role: Role, parent: ToProxy, settings: Settings) -> None:
    """Be a worker until the parent closes its end, which is the order to stop.

    Whatever goes wrong is told to the parent, which owns the terminal.
    """
    errors = LoggedErrors()
    # Everything is on this machine: without this, transformers would ask the network first.
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        parent.send(Loading(role, 0.0, "importing torch"))
        _serve(role, parent, settings)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except DemoError as error:
        parent.send(Failed(errors.added_to(str(error)), error.exit_code))
    except Exception as error:
        message = errors.added_to(f"{role} failed: {error!r}")
        parent.send(Failed(message, DemoError.exit_code, traceback.format_exc()))


def _serve(role: Role, parent: ToProxy, settings: Settings) -> None:
    # torch comes in with these modules, and is only wanted in here
    if role == "prefill":
        from llm_datadist.cli.demo import prefill

        prefill.serve(parent, settings)
    else:
        from llm_datadist.cli.demo import decode

        decode.serve(parent, settings)
