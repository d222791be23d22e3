"""When bytes leave and arrive on a slow line: decisions only; the time comes from the caller.

Sizes in bytes, times in seconds, rates in bytes per second unless a name says otherwise.
"""

import math
from collections import deque
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Literal

from codec.errors import UsageError

_CHUNK_S = 0.002
_PACKET = 1500
_READ = 256 << 10
_AHEAD_S, _AHEAD = 0.02, 128 << 10
"""What is read beyond what the line itself holds, so that a late wake-up leaves no gap on it."""
_FASTEST = 10_000.0
_LONGEST = 10_000.0
_MOST = 256 << 20
_PIECES = 64


@dataclass(frozen=True)
class Shaper:
    """One direction of a line: `mbit` megabits per second (0: unlimited), half of `rtt_ms` late."""

    rtt_ms: float = 0.0
    mbit: float = 0.0

    def __post_init__(self) -> None:
        """Raises `UsageError` for what no line is."""
        if not 0 <= self.rtt_ms <= _LONGEST:
            raise UsageError(f"--rtt-ms {self.rtt_ms:g} is not between 0 and {_LONGEST:g}")
        if not 0 <= self.mbit <= _FASTEST:
            raise UsageError(f"--mbit {self.mbit:g} is not between 0 (unlimited) and {_FASTEST:g}")

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.mbit * 1e6 / 8 or math.inf

    @property
    def delay(self) -> float:
        """Seconds from the departure of a byte to its arrival."""
        return self.rtt_ms / 2000

    @property
    def chunk(self) -> int:
        """Bytes that arrive together: two milliseconds' worth, as a line has packets."""
        return int(min(_READ, max(_PACKET, self.rate * _CHUNK_S)))

    @property
    def ahead(self) -> int:
        """Bytes that may wait in front of the line."""
        return _AHEAD + int(self._fast * _AHEAD_S)

    @property
    def limit(self) -> int:
        """Bytes held at most: those under way, and `ahead`."""
        return min(_MOST, self.ahead + int(self._fast * self.delay))

    def passage(self, size: int, now: float, busy_until: float) -> tuple[float, float]:
        """When the last of `size` bytes leaves and when it arrives.

        `busy_until` is when the bytes before them have left: a line that is busy makes no gap.
        """
        departure = max(now, busy_until) + size / self.rate
        return departure, departure + self.delay

    @property
    def _fast(self) -> float:
        return min(self.rate, _FASTEST * 1e6 / 8)


Ending = Literal["close", "reset"]


class Pipe:
    """One direction of a connection: what is on its way, in order, and how it ends."""

    def __init__(self, shaper: Shaper) -> None:
        self._shaper = shaper
        self._chunk, self._limit, self._least = shaper.chunk, shaper.limit, shaper.ahead // 4
        self._chunks: deque[tuple[float, memoryview]] = deque()
        self._held = 0
        self._busy_until = -math.inf
        self._over = False
        self._ending: tuple[float, Ending] | None = None

    @property
    def room(self) -> int:
        """Bytes to read now; 0 once it has ended, and while much is held: few large reads cost less."""
        free = self._limit - self._held
        return 0 if self._over or free < self._least else min(free, _READ)

    @property
    def due(self) -> float | None:
        """When something arrives next: bytes, or the end."""
        if self._chunks:
            return self._chunks[0][0]
        return self._ending[0] if self._ending else None

    def put(self, data: bytes, now: float) -> None:
        """Bytes were read."""
        view = memoryview(data)
        for start in range(0, len(view), self._chunk):
            piece = view[start : start + self._chunk]
            self._busy_until, arrival = self._shaper.passage(len(piece), now, self._busy_until)
            self._chunks.append((arrival, piece))
        self._held += len(view)

    def end(self, how: Ending, now: float) -> None:
        """Nothing follows, but for a reset after a close. The end travels behind the bytes."""
        self._over = True
        self._ending = (self._shaper.passage(0, now, self._busy_until)[1], how)

    def drop(self) -> None:
        """Nobody is there to write it to."""
        self._over, self._ending, self._held = True, None, 0
        self._chunks.clear()

    def arrived(self, now: float) -> list[memoryview]:
        """What is to be written now, oldest first; not more than one call to the system takes."""
        waiting = islice(self._chunks, _PIECES)
        return [piece for _, piece in takewhile(lambda chunk: chunk[0] <= now, waiting)]

    def written(self, size: int) -> None:
        """The first `size` bytes of it were."""
        self._held -= size
        while size:
            arrival, piece = self._chunks.popleft()
            if size < len(piece):
                self._chunks.appendleft((arrival, piece[size:]))
            size -= min(size, len(piece))

    def take_ending(self, now: float) -> Ending | None:
        """How it ended, once, when everything before was written and the end has arrived."""
        if self._chunks or self._ending is None or self._ending[0] > now:
            return None
        how, self._ending = self._ending[1], None
        return how
