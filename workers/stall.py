"""A worker whose computing thread is stuck: it takes requests, beats, and answers nothing.

Nobody else can tell that from a long pass, and a thread that is stuck cannot be stopped. So the worker
leaves and ends itself, which all others know how to deal with.
"""

import os
import threading

from broker.link import Link
from codec.logs import Log
from workers.busy import Busy, UnderWay

_LOOK_S = 1.0
_EXIT = 70
"""`EX_SOFTWARE` of sysexits.h: whoever supervises it starts it again."""


class Stall:
    """Decides when a pass has taken too long to be one: ten times as long as any of its kind took for as
    many tokens, but at least `LEAST` seconds, and `most` where nothing like it was measured."""

    LEAST = 20.0
    FACTOR = 10.0

    def __init__(self, most: float) -> None:
        self._most = most
        self._seen: UnderWay | None = None
        self._stood = 0.0

    def stuck(self, busy: Busy, seconds: float) -> bool:
        """Whether the pass under way is stuck, `seconds` after the last look.

        They are not read from a clock: a process that was stopped for a minute has not computed.
        """
        under_way = busy.under_way
        if under_way is None or under_way is not self._seen:
            self._seen, self._stood = under_way, 0.0
            return False
        self._stood += seconds
        return self._stood > self._limit(under_way, busy)

    def _limit(self, under_way: UnderWay, busy: Busy) -> float:
        slowest = busy.slowest.get(under_way.kind)
        if slowest is None or not under_way.tokens:  # A run to be opened, say, or its state to be stored.
            return self._most
        return min(self._most, max(self.LEAST, self.FACTOR * slowest * under_way.tokens))


def end_if_stuck(busy: Busy, link: Link, most: float) -> None:
    """Watch the computing thread, on a thread of its own. If it is stuck, leave and end the process."""
    threading.Thread(target=_watch, args=(busy, link, most), name="stall", daemon=True).start()


def _watch(busy: Busy, link: Link, most: float) -> None:
    stall, never = Stall(most), threading.Event()
    while not stall.stuck(busy, _LOOK_S):
        never.wait(_LOOK_S)
    kind = busy.under_way.kind if busy.under_way else "unknown"
    Log("worker").warn("a pass does not end; this worker leaves, to be started again", kind=kind)
    link.close()
    os._exit(_EXIT)
