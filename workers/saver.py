"""A thread for slow files: jobs go there one after another, and what follows from them comes back."""

import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from codec.errors import SaveError, TrunklineError
from codec.logs import Log
from workers.replies import Reply

T = TypeVar("T")
Then = Callable[[], list[Reply]]


class Saver:
    """Jobs are done in the order in which they came. `submit` and `finished` belong to one thread."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], Then] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Then] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="save", daemon=True)
        self.pending = 0
        """Jobs of which `finished` has not told yet."""
        self.wake: Callable[[], None] = lambda: None
        """Called on the saver's thread when a job is done."""

    def submit(self, job: Callable[[], T], then: Callable[[T | TrunklineError], list[Reply]]) -> None:
        """Do `job` on the thread; `then` gets its result, or its error, on that of `finished`."""
        if not self._thread.is_alive():
            self._thread.start()
        self.pending += 1
        self._jobs.put(lambda: partial(then, _attempt(job)))

    def finished(self) -> list[Reply] | None:
        """What follows from the next job that is done; None if none is."""
        try:
            then = self._done.get_nowait()
        except queue.Empty:
            return None
        self.pending -= 1
        return then()

    def close(self, timeout: float) -> None:
        """End the thread once all jobs are done, or after `timeout` seconds."""
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join(timeout)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._done.put(job())
            self.wake()


def _attempt(job: Callable[[], T]) -> T | TrunklineError:
    try:
        return job()
    except TrunklineError as error:
        return error
    except Exception as error:  # A filesystem raises what it likes.
        Log("worker").failed("state not saved or read")
        return SaveError(
            f"the worker's --state cannot be used: {type(error).__name__}: {error}",
            side="worker",
            hint="Make room or repair it there; then start every silo again with --resume.",
        )
