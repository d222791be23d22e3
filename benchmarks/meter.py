"""How long a trunk computed: counted where it computes, told on stdout for who measures."""

import json
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
        self._under_way: tuple[float, float] | None = None
        """When the pass began, and how many seconds of it count at most."""

    def begin(self, at_most: float) -> None:
        """A pass begins, forward or backward; one at a time. No more than `at_most` seconds of it count."""
        with self._lock:
            self._under_way = time.monotonic(), at_most

    def end(self, tokens: int) -> None:
        """The pass is over."""
        with self._lock:
            self._busy += self._so_far()
            self._under_way = None
            self._passes += 1
            self._tokens += tokens

    def _so_far(self) -> float:
        if self._under_way is None:
            return 0.0
        begun, at_most = self._under_way
        return min(time.monotonic() - begun, at_most)

    def counters(self) -> Counters:
        """What was counted so far."""
        with self._lock:
            return {"busy": self._busy + self._so_far(), "passes": self._passes, "tokens": self._tokens}


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
