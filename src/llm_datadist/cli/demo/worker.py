"""The inside of a worker process: entry, loading, and how it ends."""

from __future__ import annotations

import os
import traceback
from typing import TYPE_CHECKING

from llm_datadist.cli.demo.failure import DemoError
from llm_datadist.cli.demo.messages import Failed, Loading

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from llm_datadist.cli.demo.messages import Role, ToParent, ToWorker
    from llm_datadist.cli.demo.settings import Settings

    ToProxy = Connection[ToParent, ToWorker]


def run(role: Role, parent: ToProxy, settings: Settings) -> None:
    """Be a worker until the parent closes its end, which is the order to stop.

    Whatever goes wrong is told to the parent, which owns the terminal.
    """
    # Everything is on this machine: without this, transformers would ask the network first.
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        parent.send(Loading(role, 0.0, "importing torch"))
        _serve(role, parent, settings)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except DemoError as error:
        parent.send(Failed(str(error), error.exit_code))
    except Exception as error:
        parent.send(Failed(f"{role} failed: {error!r}", 1, traceback.format_exc()))


def _serve(role: Role, parent: ToProxy, settings: Settings) -> None:
    # torch comes in with these modules, and is only wanted in here
    if role == "prefill":
        from llm_datadist.cli.demo import prefill

        prefill.serve(parent, settings)
    else:
        from llm_datadist.cli.demo import decode

        decode.serve(parent, settings)
