# SPDX-License-Identifier: Apache-2.0
"""`Function, items -> outcomes`: many items in worker processes, where a poisoned one costs one attempt of one worker.

A decoder that crashes, never ends or allocates without bound takes its process with it, so each attempt runs in a
process that can be replaced. Workers are spawned, not forked: a fork copies the locks of decoders, BLAS and torch, but
not the threads that would release them. A spawned worker imports the package once, some tenths of a second, then takes
one item at a time. It shares its pipe with nobody, so either side's death is the end of file for the other.
"""

import logging
import math
import multiprocessing
import pickle
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

logger = logging.getLogger(__name__)

ErrorKind = Literal["exception", "crash", "time limit", "memory limit"]

_ITEMS_AHEAD_PER_WORKER = 4  # taken from `items` and not yet yielded
_STARTS = 3  # tried in a row: one may fail by bad luck, such as a kill for memory
_SECONDS_TO_END = 5  # for a process that closed its pipe
_ALARM_DELAY_SECONDS = 1  # how long after the time limit a worker ends itself
_LONGEST_ERROR = 2000

# one attempt: value or None, error or None, its kind or None, seconds
_Attempt = tuple[Any, str | None, ErrorKind | None, float]


@dataclass(frozen=True)
class Outcome:
    """What became of one item.

    Attributes:
        item: as taken from the items.
        value: what the function returned; None on failure.
        error: None on success, otherwise the last attempt's failure in one line.
        error_kind: None, `exception`, `crash` (its process ended), `time limit` or `memory limit`.
        seconds: all attempts together.
        attempts: how often the item was tried; 0 if it can't be sent to a worker.
    """

    item: Any
    value: Any
    error: str | None
    error_kind: ErrorKind | None
    seconds: float
    attempts: int


def run_isolated(
    function: Callable[[Any], Any],
    items: Iterable,
    *,
    num_workers: int = 1,
    time_limit_seconds: float | None = None,
    memory_limit_mb: int | None = None,
    attempts: int = 1,
    setup: Callable[[], object] | None = None,
) -> Iterator[Outcome]:
    """Run a function on many items; the outcomes come in the order of the items, whatever `num_workers`.

    Items are taken as they are needed, a few per worker ahead. When the iterator is closed, or ends by an exception,
    so do the workers, killed, without exit handlers; if this process is killed, they end after the item at hand or at
    its time limit. Scripts need the usual `if __name__ == "__main__":`, and the function can't use `multiprocessing`.

    Args:
        function: of one item; it, the items and the values must be picklable.
        items: any iterable; it may be endless.
        num_workers: processes. 0 runs in this one, without isolation and limits, for debugging.
        time_limit_seconds: per attempt, from when the item is sent to a worker.
        memory_limit_mb: address space that a worker may take beyond its size after `setup`, in 2^20 bytes; Linux only.
            Imports that the function needs belong in `setup`, threads take some room of their own.
        attempts: how often an item is tried at most.
        setup: called once in each worker before its first item.

    Raises:
        ValueError: if a number is out of range.
        RuntimeError: while it is read, if `setup` fails or workers don't start.
    """
    for name, number, least in (("num_workers", num_workers, 0), ("attempts", attempts, 1)):
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
    for name, limit in (("time_limit_seconds", time_limit_seconds), ("memory_limit_mb", memory_limit_mb)):
        if limit is not None and limit <= 0:
            raise ValueError(f"{name} must be None or more than 0, got {limit}")
    if num_workers == 0:
        return _run_here(function, items, attempts, setup)
    if memory_limit_mb is not None and sys.platform != "linux":
        logger.warning("memory_limit_mb=%s is ignored, only Linux can limit a process", memory_limit_mb)
        memory_limit_mb = None
    job = pickle.dumps((function, setup))
    workers = [_Worker(job, attempts, time_limit_seconds, memory_limit_mb) for _ in range(num_workers)]
    return _run_in_workers(workers, items)


@dataclass
class _Task:
    """An item on its way to its outcome."""

    item: Any
    message: bytes = b""
    attempts: int = 0
    seconds: float = 0.0
    outcome: Outcome | None = None

    def record(self, attempt: _Attempt, attempts: int) -> None:
        """Count one attempt; a success or the last one is the outcome."""
        value, error, kind, seconds = attempt
        self.attempts += 1
        self.seconds += seconds
        if error is None or self.attempts == attempts:
            self.outcome = Outcome(self.item, value, error, kind, self.seconds, self.attempts)


def _run_here(function: Callable, items: Iterable, attempts: int, setup: Callable | None) -> Iterator[Outcome]:
    if setup is not None:
        setup()
    for task in map(_Task, items):
        while task.outcome is None:
            task.record(_try(function, task.item), attempts)
        yield task.outcome


def _run_in_workers(workers: list["_Worker"], items: Iterable) -> Iterator[Outcome]:
    tasks = map(_Task, items)
    queue: deque[_Task] = deque()  # in the order of the items: running, or done and waiting for an earlier one
    try:
        while True:
            _collect(workers, is_waiting=bool(queue) and queue[0].outcome is None)
            _hand_out(workers, tasks, queue)
            if not queue:
                return
            if queue[0].outcome is not None:
                yield queue.popleft().outcome
    finally:
        for worker in workers:
            worker.end()


def _collect(workers: list["_Worker"], *, is_waiting: bool) -> None:
    """Take what busy workers have to say; wait for the first of them if there is nothing else to do."""
    busy = [worker for worker in workers if worker.task is not None]
    patience = min((worker.seconds_left() for worker in busy), default=0) if is_waiting else 0
    talking = wait([worker.connection for worker in busy], None if patience == math.inf else patience)
    for worker in busy:
        if worker.connection in talking:
            worker.listen()
        elif worker.seconds_left() == 0:
            worker.stop_late()


def _hand_out(workers: list["_Worker"], tasks: Iterator[_Task], queue: deque[_Task]) -> None:
    for worker in workers:
        while worker.task is None and len(queue) < _ITEMS_AHEAD_PER_WORKER * len(workers):
            task = next(tasks, None)
            if task is None:
                return
            queue.append(task)
            task.message, error, kind, seconds = _try(pickle.dumps, task.item)
            if error is None:
                worker.give(task)
            else:
                task.outcome = Outcome(task.item, None, error, kind, seconds, attempts=0)


class _Worker:
    """The parent's side of one worker: its process comes with the first task and is replaced when it is lost."""

    def __init__(
        self, job: bytes, attempts: int, time_limit_seconds: float | None, memory_limit_mb: int | None
    ) -> None:
        self._job, self._attempts = job, attempts
        self._time_limit_seconds, self._memory_limit_mb = time_limit_seconds, memory_limit_mb
        self._process, self._failed_starts = None, 0
        self._sent_at: float | None = None  # None while the process starts
        self.connection: Connection | None = None
        self.task: _Task | None = None

    def give(self, task: _Task) -> None:
        self.task = task
        if self._process is not None and self.connection.poll():  # idle, it says nothing: this is its end
            self.end()
        if self._process is None:
            self._start()
        else:
            self._send()

    def seconds_left(self) -> float:
        """Until the time limit of a running task; infinity where none applies."""
        if self._sent_at is None or self._time_limit_seconds is None:
            return math.inf
        return max(0, self._sent_at + self._time_limit_seconds - time.monotonic())

    def listen(self) -> None:
        """Take the next message, which is there, or learn that the process is gone."""
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            self._bury()
            return
        if self._sent_at is None:
            self._welcome(message)
            return
        value, error, kind, seconds = message
        if error is None:
            value, error, kind, _ = _try(pickle.loads, value)
        if kind == "memory limit":  # what it left behind would count against the next item
            self.end()
        self._finish((value, error, kind, seconds))

    def stop_late(self) -> None:
        self.end()
        self._fail(f"not done after {self._time_limit_seconds:g} s", "time limit")

    def end(self, patience: float = 0) -> int | None:
        """End the process and return its exit code; give it some seconds to do so by itself."""
        if self._process is None:
            return None
        process, self._process = self._process, None
        process.join(patience)
        process.kill()
        process.join()
        self.connection.close()
        return process.exitcode

    def _start(self) -> None:
        self._sent_at = None
        self.connection, theirs = multiprocessing.Pipe()
        arguments = theirs, self._job, self._time_limit_seconds, self._memory_limit_mb
        # a daemon ends with the parent, also where nobody closes the iterator
        process = multiprocessing.get_context("spawn").Process(target=_work, args=arguments, daemon=True)
        process.start()
        self._process = process
        theirs.close()

    def _welcome(self, error: str | None) -> None:
        if error is not None:
            raise RuntimeError(f"a worker could not be set up: {error}")
        self._failed_starts = 0
        self._send()

    def _send(self) -> None:
        self._sent_at = time.monotonic()
        with suppress(OSError):  # the end of the process is the next thing to hear of it
            self.connection.send_bytes(self.task.message)

    def _bury(self) -> None:
        """Replace a process that ended by itself or was killed, and blame the task if it had begun."""
        code = self.end(_SECONDS_TO_END)
        if self._sent_at is None:
            self._start_again(code)
        elif self._time_limit_seconds is not None and code == -getattr(signal, "SIGALRM", 0):
            self.stop_late()
        else:
            self._fail(f"worker {_cause(code)}", "crash")

    def _start_again(self, code: int | None) -> None:
        self._failed_starts += 1
        if self._failed_starts == _STARTS:
            advice = 'does the script have its `if __name__ == "__main__":`?'
            raise RuntimeError(f"a worker {_cause(code)} while it started, {_STARTS} times in a row; {advice}")
        self._start()

    def _fail(self, error: str, kind: ErrorKind) -> None:
        self._finish((None, error, kind, time.monotonic() - self._sent_at))

    def _finish(self, attempt: _Attempt) -> None:
        task, self.task = self.task, None
        task.record(attempt, self._attempts)
        if task.outcome is None:
            self.give(task)


def _cause(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"ended with exit status {exit_code}"
    try:
        return f"was killed by {signal.Signals(-exit_code).name}"
    except ValueError:  # a real-time signal has no name
        return f"was killed by signal {-exit_code}"


def _work(connection: Connection, job: bytes, time_limit_seconds: float | None, memory_limit_mb: int | None) -> None:
    """The life of a worker: say that it is ready, then answer items until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    function, error, *_ = _try(_set_up, job)
    if error is None and memory_limit_mb is not None:
        _limit_memory(memory_limit_mb)
    with suppress(EOFError, OSError):  # the parent is gone
        connection.send(error)
        while error is None:
            message = connection.recv_bytes()
            _set_alarm(time_limit_seconds)
            answer = _try(_answer, (function, message))
            _set_alarm(None)
            connection.send(answer)
            del answer, message


def _set_up(job: bytes) -> Callable:
    function, setup = pickle.loads(job)
    if setup is not None:
        setup()
    return function


def _answer(task: tuple[Callable, bytes]) -> bytes:
    function, message = task
    return pickle.dumps(function(pickle.loads(message)))


def _set_alarm(time_limit_seconds: float | None) -> None:
    """Let the system end this process when a parent that is gone or busy doesn't."""
    if hasattr(signal, "setitimer"):
        delay = 0 if time_limit_seconds is None else time_limit_seconds + _ALARM_DELAY_SECONDS
        signal.setitimer(signal.ITIMER_REAL, delay)


def _limit_memory(limit_mb: int) -> None:
    import resource  # Unix only

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    finite = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([size + (limit_mb << 20), *finite]), hard))


def _try(function: Callable, argument: object) -> _Attempt:
    begin, value, text, kind = time.monotonic(), None, None, None
    try:
        value = function(argument)
    except (Exception, SystemExit) as error:  # whatever goes wrong with an item is its outcome
        is_memory = isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError)
        kind = "memory limit" if is_memory else "exception"
        text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")[:_LONGEST_ERROR]
    return value, text, kind, time.monotonic() - begin
