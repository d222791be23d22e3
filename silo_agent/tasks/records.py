"""Files of JSON records, read as a stream; whatever is wrong is told by file and line."""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codec.errors import DataError

_LIST = re.compile(r'"data"\s*:\s*\[')
_BETWEEN = re.compile(r"[\s,]*")


@dataclass(frozen=True, slots=True)
class Record:
    """A JSON object and where it stands. Every accessor raises `DataError` naming that place."""

    where: str
    fields: Mapping[str, Any]

    def text(self, name: str) -> str:
        """The field `name`, which is text."""
        return str(self._field(name, str, "text"))

    def number(self, name: str) -> int:
        """The field `name`, which is a whole number."""
        return int(self._field(name, int, "a whole number"))

    def flag(self, name: str) -> bool:
        """The field `name`, which is true or false."""
        return bool(self._field(name, bool, "true or false"))

    def one_of(self, name: str, allowed: Collection[Any]) -> Any:
        """The field `name`, which is one of a few values."""
        value = self._field(name, object, "")
        if not any(type(value) is type(other) and value == other for other in allowed):
            raise self.wrong(f'"{name}" is one of {", ".join(map(str, allowed))}')
        return value

    def part(self, name: str) -> "Record":
        """The object in the field `name`."""
        return Record(self.where, self._field(name, dict, "an object"))

    def parts(self, name: str) -> "list[Record]":
        """The objects in the list in the field `name`."""
        values = self._field(name, list, "a list of objects")
        if not all(isinstance(value, dict) for value in values):
            raise self.wrong(f'"{name}" is a list of objects')
        return [Record(self.where, value) for value in values]

    def wrong(self, what: str) -> DataError:
        """The error that says `what` is wrong here."""
        return DataError(f"{self.where}: {what}")

    def _field(self, name: str, kind: type, called: str) -> Any:
        if name not in self.fields:
            hint = "A test set without labels can be neither learned nor scored." if name == "label" else ""
            raise DataError(f'{self.where}: no "{name}"', hint=hint)
        value = self.fields[name]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.wrong(f'"{name}" is {called}')
        return value


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file as a stream: a line each, or in a `.json` file the members of its "data".

    Raises `DataError`.
    """
    for number, value in _members(path) if path.suffix == ".json" else read_lines(path):
        where = f"{path}, line {number}"
        if not isinstance(value, dict):
            raise DataError(f"{where}: a record is a JSON object")
        yield Record(where, value)


def read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Line numbers and JSON values of a JSONL file, as a stream. Raises `DataError`."""
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _line(line, f"{path}, line {number}")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _line(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # A number of thousands of digits, lists without end.
        raise DataError(f"{where}: not JSON that can be read: {error}") from None


def _members(path: Path) -> Iterator[tuple[int, Any]]:
    """Line numbers and members of the list under "data", decoded one at a time."""
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    found = _LIST.search(text)
    if found is None:
        raise DataError(f'{path}: no "data" list')
    decoder, line, counted, at = json.JSONDecoder(), 1, 0, found.end()
    while not text.startswith("]", at := _BETWEEN.match(text, at).end()):  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            what = f"not JSON: {error.msg} at column {error.colno}"
            raise DataError(f"{path}, line {error.lineno}: {what}") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {line}: not JSON that can be read: {error}") from None
        yield line, value
