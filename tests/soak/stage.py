"""Where a round is played: a node in this process, a bystander's process, and one to be harmed."""

from __future__ import annotations

import gc
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from llm_datadist import LLMException
from llm_datadist.testing.cluster import Node, NodeProcess
from llm_datadist.testing.timing import eventually
from soak.tally import descriptors, threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typing_extensions import Self

    from soak.tally import Tally


class Doing(threading.Thread):
    """A call in a thread of its own, which cannot keep the test from ending."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self._result: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:
            self._error = error

    def result(self, timeout_s: float = 30.0) -> Any:
        self.join(timeout_s)
        if self.is_alive():
            raise TimeoutError(f"a call hangs: it has not ended within {timeout_s} s")
        if self._error is not None:
            raise self._error
        return self._result


class Stage:
    """This process's node, the process of a bystander, and the one that is harmed."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._baseline: tuple[int, int] | None = None
        self.node, self.other, self.victim = Node(), NodeProcess(), NodeProcess()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.node.stop()
        self.other.kill()
        self.victim.kill()

    def replace(self, successor: NodeProcess) -> None:
        """The victim is dead, or ends here."""
        self.victim.kill()
        self.victim = successor

    @contextmanager
    def round(self, what: str) -> Iterator[None]:
        """One round, after which all nodes are stopped and nothing may be left of it."""
        try:
            yield
            self.node.stop()
            self.victim.call(Node.stop)
            self.other.call(Node.stop)
        except (LLMException, TimeoutError, OSError, EOFError) as error:
            self.other.kill()
            self.replace(NodeProcess())
            self.other = NodeProcess()
            Doing(self.node.stop).result()
            self._baseline = None
            self._tally.failure(f"{what}: {error!r}")
            return
        gc.collect()
        if self._baseline is None:
            self._baseline = descriptors(), threads()

    def note_leaks(self) -> None:
        """Compares with what there was after the first round."""
        if self._baseline is not None:
            files, tasks = self._baseline
            eventually(lambda: descriptors() <= files and threads() <= tasks, 2.0)
            self._tally.leak("file descriptors", files, descriptors())
            self._tally.leak("threads", tasks, threads())
