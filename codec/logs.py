"""Structured logs: one JSON object a line on stderr, or a short line where a person is looking."""

import json
import logging
import sys
import time
from typing import Any


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "role": record.name.rpartition(".")[2],
            "event": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _ForPeople(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        facts = " ".join(f"{key}={value}" for key, value in getattr(record, "facts", {}).items())
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = f"{clock} {record.name.rpartition('.')[2]}: {record.getMessage()} {facts}".rstrip()
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class Log:
    """A role's log. `say("silo attached", silo="north")` is one line with its facts as fields."""

    def __init__(self, role: str) -> None:
        self._logger = logging.getLogger(f"trunkline.{role}")

    def say(self, event: str, **facts: object) -> None:
        """Something a reader of the log wants to know."""
        self._logger.info(event, extra={"facts": facts})

    def warn(self, event: str, **facts: object) -> None:
        """Something went wrong on another side, or will if nobody acts."""
        self._logger.warning(event, extra={"facts": facts})

    def failed(self, event: str, **facts: object) -> None:
        """A defect of ours: called inside an `except` block, logs its traceback."""
        self._logger.exception(event, extra={"facts": facts})


def configure() -> None:
    """Send Trunkline's log lines to stderr: JSON unless stderr is a terminal."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_ForPeople() if sys.stderr.isatty() else _JsonLines())
    root = logging.getLogger("trunkline")
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    root.propagate = False
