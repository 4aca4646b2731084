"""Threads for blocking work, which last until they are shut down.

Not `ThreadPoolExecutor`: once a program's main thread has returned, the interpreter refuses it new
work, although other threads of the program go on, and waits for its threads before any exit
handler could end what they wait for.

Guaranteed: work that `start` raised on is never done; work that was taken is done, unless its
owner takes it back (`Movers`), and whatever it raises is logged, once. A system that has no thread
to give is said at once, unless threads of ours are there to do the work a little later. No lock is
held but `_lock`, and nothing waits under it.
"""

from __future__ import annotations

import threading
from _thread import start_new_thread
from collections import deque
from concurrent.futures import Executor, Future
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Generic, ParamSpec, TypeVar

from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.locks import holds_lock, make_lock
from llm_datadist.observe.log import get_logger
from llm_datadist.running.bell import Bell, Latch

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_datadist.locks import Lock
    from llm_datadist.running.deadline import Deadline

T = TypeVar("T")
P = ParamSpec("P")


class _OurThread(threading.Thread):
    """A thread of the library's own."""

    runs_program = False


def is_ours() -> bool:
    """Whether this thread is the library's, which no call in it can wait for.

    The garbage collector runs finalizers in any thread. A child that one forks has it as its main
    thread, and is the program's.
    """
    return not is_main() and isinstance(threading.current_thread(), _OurThread)


def is_main() -> bool:
    """Whether this is the main thread, which signals strike.

    Not by `current_thread`, in which a handler's KeyError is lost, and makes it another one.
    """
    return threading.get_ident() == threading.main_thread().ident


def is_finalizer() -> bool:
    """Whether what the program has called here can only be a finalizer's: this thread is ours."""
    if is_main():
        return False
    me = threading.current_thread()
    return isinstance(me, _OurThread) and not me.runs_program


def start_thread(
    target: Callable[[], object], name: str, *, runs_program: bool = False
) -> threading.Thread:
    """A daemon thread; `runs_program`: it calls what the program gave us, which waits for its end
    as for that of any thread of its own.

    Raises LLMException(LLM_FAILED) when the system has none to give.
    """
    thread = _OurThread(target=target, name=name, daemon=not runs_program)
    thread.runs_program = runs_program
    try:
        thread.start()
    except KeyError as error:
        # Python's own, when it takes back what the thread itself has taken back meanwhile
        struck = error.__context__ if error.args == (thread,) else None
        raise struck or error from None
    except RuntimeError as error:
        if "start new thread" not in str(error):
            # in place of what struck its wait for the thread's first step, maybe
            struck = error.__context__ if "unlocked lock" in str(error) else None
            raise struck or error from None
        raise LLMException(
            f"the system gives this process no more threads ({error}): raise its limit on "
            "processes (ulimit -u, a container's pids limit)",
            LLMStatusCode.LLM_FAILED,
        ) from error
    return thread


class Threads(Executor):
    """At most `max_threads` daemon threads, started when first needed. Thread-safe."""

    def __init__(self, max_threads: int, name: str, errands: Errands | None = None) -> None:
        """`errands` starts threads for the main thread, which may be interrupted at it."""
        self._errands = errands
        self._max_threads = max_threads
        self._name = name
        self._lock = make_lock()
        self._threads: list[threading.Thread] = []
        #: one for each thread that waits for work
        self._idle: deque[None] = deque()
        self._work: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._is_shut = False
        self._bell = Bell()
        #: one for each thread that has ended
        self._ended: deque[None] = deque()

    def start(self, work: Callable[[], object]) -> None:
        """Has a thread do this, now or when one is free.

        Raises LLMException(LLM_FAILED) when there is no thread and the system gives none, and after
        `end`; the work is not done then.
        """
        with self._lock:
            if self._is_shut:
                raise LLMException(
                    f"{self._name} has ended: the cluster was finalized", LLMStatusCode.LLM_FAILED
                )
            if self._idle:
                self._idle.pop()
            elif len(self._threads) < self._max_threads and self._has_started(work):
                return
            self._work.put(work)

    @property
    def num_waiting(self) -> int:
        """Pieces of work that no thread has begun."""
        return self._work.qsize()

    def submit(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """For the loop's thread, which waits for the result. Raises as `start` does."""
        future: Future[T] = Future()
        self.start(partial(_complete, future, partial(call, *args, **kwargs)))
        return future

    def end(self, deadline: Deadline) -> None:
        """Ends the threads when they have done what was started; some may be at it behind that.

        Raises LLMException(LLM_TIMEOUT) then. They are daemons, and end by themselves.
        """
        with self._lock:
            self._is_shut = True
            self._work.put(None)
        if not self._bell.wait_until(self._is_over, max(0.0, deadline.remaining_s())):
            raise deadline.expired(f"the end of {self._name}")

    def _is_over(self) -> bool:
        return len(self._ended) >= len(self._threads)

    def _has_started(self, work: Callable[[], object]) -> bool:
        """Whether a new thread does the work; False when those that are there must."""
        name = f"{self._name}-{len(self._threads)}"
        begin = partial(start_thread, partial(self._run, [work]), name)
        try:
            if self._errands is None:
                begin()
            else:
                self._errands.run(begin, besides=self._lock)
        except LLMException:
            if not self._threads:
                raise
            return False
        return True

    def _run(self, first: list[Callable[[], object]]) -> None:
        # here, since whoever starts a thread may be interrupted behind its first step
        self._threads.append(threading.current_thread())
        # taken out: the thread's object has the list as long as it lives
        work: Callable[[], object] | None = first.pop()
        while work is not None:
            try:
                work()
            except BaseException:  # nobody else would see it
                get_logger().exception("work of %s failed", self._name)
            del work  # it would hold the last work's objects while this thread waits
            self._idle.append(None)
            work = self._work.get()
        self._work.put(None)  # for the next one: there may be more of them than were counted
        self._ended.append(None)
        self._bell.ring()


class Errands:
    """Runs short work of the main thread's where no signal's exception strikes: in another thread.

    For changes of several steps that must not stay half done. In other threads, where none can be
    started, and in the middle of another step of this thread (`holds_lock`), which the errand could
    wait for in vain, the work is done at once. Thread-safe.
    """

    def __init__(self, name: str) -> None:
        # one, and one for when an interrupted caller has left it something that takes its time
        self._threads = Threads(2, name)

    def begin(self) -> None:
        """Starts the thread. Raises LLMException(LLM_FAILED) when the system has none to give."""
        self._threads.start(lambda: None)

    def run(
        self,
        work: Callable[[], T],
        undo: Callable[[T], object] | None = None,
        besides: Lock | None = None,
    ) -> T:
        """What work returns or raises; when the caller is interrupted, what it made is undone.

        `besides` is a lock that the caller holds, and the work does not need.
        """
        if not is_main() or holds_lock(besides):
            return work()
        errand = _Errand(work, undo)
        try:
            try:
                self._threads.start(errand.do)
            except LLMException:
                errand.do()
            errand.over.wait(None)
            return errand.result()
        except BaseException:
            if errand.error is None:  # else nothing was made
                try:  # one step: what undoes it is not struck by a further exception
                    start_new_thread(errand.abandon, ())
                except RuntimeError:  # no thread is to be had
                    errand.abandon()
                errand.leave()
            raise

    def end(self, deadline: Deadline) -> None:
        """Ends the thread. Raises LLMException(LLM_TIMEOUT)."""
        self._threads.end(deadline)


class _Errand(Generic[T]):
    """Work that is done once, and undone if nobody takes what it made."""

    def __init__(self, work: Callable[[], T], undo: Callable[[T], object] | None) -> None:
        self._work = work
        self._undo = undo
        self._made: list[T] = []
        #: who does it; None: nobody, its caller has gone before it was begun
        self._doer: dict[None, object] = {}
        self.error: BaseException | None = None
        #: who came first: the work, or its caller's leaving
        self._fate: dict[None, str] = {}
        #: who undoes it: who abandons it may be struck, and do so again
        self._undoer: dict[None, object] = {}
        self.over = Latch()

    def do(self) -> None:
        """Once, however often it is called."""
        me = object()
        if self._doer.setdefault(None, me) is not me:
            return
        try:
            self._made.append(self._work())
        except BaseException as error:  # the caller gets it
            self.error = error
        if self._fate.setdefault(None, "done") != "done":
            self._take_back()
        self.over.set()

    def abandon(self) -> None:
        """Nobody takes what it makes, or has made. In a thread that no exception strikes."""
        if self.leave() == "done":
            self._take_back()

    def leave(self) -> str:
        """Nobody takes what it makes: it is not begun from here on. What came first."""
        self._doer.setdefault(None, None)  # in one step with who would begin it
        return self._fate.setdefault(None, "abandoned")

    def result(self) -> T:
        if self.error is not None:
            raise self.error
        return self._made[0]

    def _take_back(self) -> None:
        me = object()
        if self._undo is not None and self._made and self._undoer.setdefault(None, me) is me:
            self._undo(self._made[0])


def _complete(future: Future[T], call: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as error:  # whoever waits for the future gets it
        future.set_exception(error)
    else:
        future.set_result(result)
