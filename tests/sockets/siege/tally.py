"""What was thrown, and what came of it."""

import logging
from collections import Counter
from dataclasses import dataclass, field

from codec.messages import AnyHeader, Error, kind_of

MUST = (
    *(f"silo.accepted.{kind}" for kind in ("welcome", "heartbeat", "leave", "opened", "result", "done")),
    "silo.accepted.committed",
    *(f"silo.refused.{code}" for code in ("protocol", "frame", "mismatch", "limit", "unknown-name", "link")),
    "silo.refused.unavailable",
    "silo.dropped",
    "worker.accepted.welcome",
    "worker.refused.protocol",
    "worker.refused.mismatch",
    "worker.dropped",
    *(f"victim.raised.{error}" for error in ("FrameError", "DeadlineError", "UnavailableError")),
    "victim.accepted.result",
    "victim.dropped",
    *(f"impostor.accepted.{kind}" for kind in ("opened", "result", "done", "committed", "adapter")),
    *(f"impostor.refused.{code}" for code in ("frame", "mismatch", "limit", "unknown-name")),
    "wire.cut off",
    "wire.left open",
)
"""Reactions without which a run did not reach deep."""

DEFECT = "error"
"""The code of an error that nobody foresaw."""


@dataclass(eq=False)
class Tally(logging.Handler):
    """Messages by who threw them, and reactions to them. Takes the log of what is besieged here."""

    thrown: Counter[str] = field(default_factory=Counter)
    reactions: Counter[str] = field(default_factory=Counter)
    defects: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        log = logging.getLogger("trunkline")
        log.handlers[:], log.propagate = [self], False

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        if record.levelno >= logging.ERROR:
            self.defects.append(f"log: {record.getMessage()}")
        elif record.getMessage() == "message refused":
            self.reactions["victim.dropped"] += 1

    def threw(self, who: str) -> None:
        """`who` sent a message."""
        self.thrown[who] += 1

    def heard(self, who: str, header: AnyHeader) -> None:
        """`who` was sent this."""
        if not isinstance(header, Error):
            self.reactions[f"{who}.accepted.{kind_of(header)}"] += 1
            return
        self.reactions[f"{who}.refused.{header.code}"] += 1
        if header.code == DEFECT and "not finite" not in header.what:
            self.defects.append(f"{who}: {header.what}")

    @property
    def total(self) -> int:
        """Messages of all."""
        return sum(self.thrown.values())

    def missing(self) -> list[str]:
        """What should have happened and did not."""
        return [name for name in MUST if not self.reactions[name]]

    def lines(self) -> dict[str, int]:
        """The closing summary."""
        return {
            "messages": self.total,
            **{f"thrown.{who}": number for who, number in sorted(self.thrown.items())},
            **dict(sorted(self.reactions.items())),
        }
