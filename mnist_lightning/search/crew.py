"""The workers of a search on this machine, each in a process of its own."""

import contextlib
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType
from typing import Any, cast

from mnist_lightning.search import leases as leasing
from mnist_lightning.search.leases import Leases, open_storage, start_of
from mnist_lightning.search.plan import Search
from mnist_lightning.search.progress import Progress
from mnist_lightning.search.results import Results
from mnist_lightning.search.worker import ATTEMPTS, ProgressCallback, Worker

STOPS = {signal.SIGINT, signal.SIGTERM}


def work_here(
    on_progress: ProgressCallback,
    search: Search,
    key: str,
    path: Path,
    storage: str | None,
    device: str,
    threads: int,
) -> None:
    """Works in this process until nothing is left to do; see ``Worker``."""
    meeting_point = open_storage(storage, path, answered=bool(storage))
    Worker(search, key, Results(path), meeting_point, device, threads, on_progress).work()


def _work_elsewhere(pipe: Connection, parent: int, *arguments: Any) -> None:
    """``work_here`` in a process of its own."""

    def leave_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    try:
        signal.signal(signal.SIGTERM, stop)
        # blocked while the modules were imported: a signal there prints a long traceback
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        work_here(lambda unit, part: pipe.send((unit, part)), *arguments)
    except (KeyboardInterrupt, SystemExit):  # the Trainer makes a SystemExit of Ctrl-C
        os._exit(128 + signal.SIGTERM)  # without the traceback of a thread
    except Exception as error:
        # as text: not every exception can be sent
        wrong = isinstance(error, ValueError)
        pipe.send(str(error) if wrong else f"a worker failed: {type(error).__name__}: {error}")


def stop(number: int, frame: FrameType | None) -> None:
    """A signal handler that ends the process as Python can: with its ``finally`` blocks."""
    sys.exit(128 + number)


class Crew:
    """The workers of this machine, each in a process of its own.

    Args:
        leases: of the search, where the death of a worker is noted: others then take its unit.
        arguments: of ``work_here``, all but the first.
    """

    def __init__(self, leases: Leases, arguments: tuple[Any, ...]) -> None:
        self.leases, self.arguments = leases, arguments
        self._pipes: dict[Any, tuple[SpawnProcess, str | None]] = {}
        # deaths of workers without a unit, since a worker last made progress
        self._idle_deaths = self._most_idle_deaths = 0

    def work(self, workers: int, progress: Progress) -> list[str]:
        """Runs workers until nothing is left to do; replaces those that their unit has killed.

        Returns:
            Why workers could not continue.
        """
        errors = []
        self._most_idle_deaths = ATTEMPTS * workers
        over = math.inf  # when a worker first had nothing left to do
        try:
            for _ in range(workers):
                self._start_worker()
            # a worker that is frozen longer has lost its unit: no need to wait for it
            while self._pipes and time.monotonic() - over < leasing.STALE_SECONDS:
                for pipe in cast(list[Connection], wait(list(self._pipes), timeout=0.5)):
                    try:
                        message = pipe.recv()
                    except EOFError:
                        process, started = self._pipes.pop(pipe)
                        process.join()
                        if process.exitcode:
                            errors += self._after_death(process, started)
                        elif not errors:
                            over = min(over, time.monotonic())
                        continue
                    if isinstance(message, str):
                        errors.append(message)
                    else:
                        progress.note(*message)
                        self._idle_deaths = 0
                progress.show()
        finally:
            for process, _ in self._pipes.values():  # those left when this is interrupted
                with contextlib.suppress(ProcessLookupError):
                    os.kill(cast(int, process.pid), signal.SIGINT)
            for process, _ in self._pipes.values():
                process.join(10)
                process.kill()
        return errors

    def _start_worker(self) -> None:
        context = multiprocessing.get_context("spawn")
        # a pipe for each: of one queue, a worker that is killed would keep the lock
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_work_elsewhere, args=(sender, os.getpid(), *self.arguments), daemon=True
        )
        resource_tracker.ensure_running()  # if process.start() started it, it would unblock signals
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # a new process inherits this
        try:
            process.start()
            self._pipes[receiver] = process, start_of(cast(int, process.pid))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        sender.close()

    def _after_death(self, process: SpawnProcess, started: str | None) -> list[str]:
        """Replaces a worker that its unit has killed; else returns why it ended."""
        code = cast(int, process.exitcode)
        reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if code == -signal.SIGKILL:
            reason += ", as happens when memory runs out"
        held_unit = self.leases.note_death(cast(int, process.pid), started, reason)
        self._idle_deaths += not held_unit
        # a worker without a unit was killed by something else
        if held_unit or (code < 0 and self._idle_deaths <= self._most_idle_deaths):
            self._start_worker()
            return []
        return [f"a worker ended: {reason}"]
