"""How long a trunk computed: counted where it computes, told on stdout for who measures."""

import json
import math
import threading
import time
from collections.abc import Callable

_EVERY_S = 0.1
Counters = dict[str, float]


class Meter:
    """Seconds of a paced trunk's compute, passes and tokens since the start, the pass under way included.

    Safe to read from another thread than the one that computes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._busy, self._passes, self._tokens = 0.0, 0, 0
        self._depth, self._since, self._at_most = 0, 0.0, math.inf

    def begin(self, at_most: float = math.inf) -> None:
        """A pass begins, forward or backward, or one more part of it. No more than `at_most` seconds
        of it count.
        """
        with self._lock:
            if not self._depth:
                self._since, self._at_most = time.monotonic(), at_most
            self._depth += 1

    def end(self, tokens: int) -> None:
        """What began is over; with its last part the pass is."""
        with self._lock:
            self._depth -= 1
            self._tokens += tokens
            if not self._depth:
                self._busy += self._so_far()
                self._passes += 1

    def _so_far(self) -> float:
        return min(time.monotonic() - self._since, self._at_most)

    def counters(self) -> Counters:
        """What was counted so far."""
        with self._lock:
            busy = self._busy + (self._so_far() if self._depth else 0.0)
            return {"busy": busy, "passes": self._passes, "tokens": self._tokens}


def tell(
    counters: Callable[[], Counters], say: Callable[[str], object], stop: threading.Event
) -> threading.Thread:
    """Say the counters ten times a second until `stop`, on a thread of its own, as JSON.

    Its `at` is on the clock that all processes of a machine share.
    """

    def line() -> str:
        return json.dumps({"at": time.monotonic(), **counters()})

    def loop() -> None:
        say(line())
        while not stop.wait(_EVERY_S):
            say(line())

    thread = threading.Thread(target=loop, name="meter", daemon=True)
    thread.start()
    return thread
