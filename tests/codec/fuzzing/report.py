"""What workers say of their rounds, and what is said in the end. Needs no torch, nor does its reader."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from fuzzing.message import Outcome

ROUND = 10_000
"""Messages of a round: what must be repeated to have its last one again, in a second or so."""


@dataclass(slots=True)
class Tally:
    """What came of messages: how many were `read` and `refused`, together and by kind and encoding;
    how long the slowest took, and by how much memory grew at most."""

    read: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    paths: int = 0
    slowest: float = 0.0
    slowest_index: int = 0
    peak_mib: float = 0.0

    def count(self, index: int, outcome: "Outcome", seconds: float) -> None:
        """Count one message."""
        counts = self.refused if outcome.refused else self.read
        encodings = {label.split()[1] for label in outcome.labels}
        for name in ("frames", f"kind.{outcome.kind}", *(f"encoding.{name}" for name in encodings)):
            counts[name] = counts.get(name, 0) + 1
        if seconds > self.slowest:
            self.slowest, self.slowest_index = seconds, index

    def add(self, other: "Tally") -> None:
        """Add another round's."""
        for mine, more in ((self.read, other.read), (self.refused, other.refused)):
            for name, count in more.items():
                mine[name] = mine.get(name, 0) + count
        self.paths = max(self.paths, other.paths)
        self.peak_mib = max(self.peak_mib, other.peak_mib)
        if other.slowest > self.slowest:
            self.slowest, self.slowest_index = other.slowest, other.slowest_index

    @property
    def frames(self) -> int:
        """Messages, of whatever came of them."""
        return self.read.get("frames", 0) + self.refused.get("frames", 0)

    def lines(self) -> dict[str, str]:
        """The closing summary: words and figures."""
        names = sorted((self.read.keys() | self.refused.keys()) - {"frames"})
        return {
            "frames": str(self.frames),
            "refused": str(self.refused.get("frames", 0)),
            "read": str(self.read.get("frames", 0)),
            **{f"{name}.refused": str(self.refused.get(name, 0)) for name in names},
            **{f"{name}.read": str(self.read.get(name, 0)) for name in names},
            "paths": str(self.paths),
            "slowest_ms": f"{self.slowest * 1000:.1f}",
            "slowest_index": str(self.slowest_index),
            "peak_mib": f"{self.peak_mib:.1f}",
        }


class Report(msgspec.Struct):
    """What a worker says of a round; `error` is empty if all went well."""

    tally: Tally
    error: str = ""
