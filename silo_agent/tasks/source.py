"""Where a task's records come from: a file, a directory of official files, or the hub."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Literal

from codec.errors import DataError, UsageError
from silo_agent.tasks.hub import read_hub
from silo_agent.tasks.item import Item
from silo_agent.tasks.records import read_records
from silo_agent.tasks.task import Task

Split = Literal["train", "validation"]
HUB = "hub"

_FILES: dict[Split, tuple[str, ...]] = {
    "train": ("train.jsonl", "train.json", "coqa-train-v1.0.json", "train_v0.2.json"),
    "validation": ("val.jsonl", "validation.jsonl", "dev.jsonl", "coqa-dev-v1.0.json", "val_v0.2.json"),
}
"""The official archives' names; the first that a directory holds is taken."""


def find_file(data: str, split: Split) -> Path:
    """The file that `data` is or, if it is a directory, that holds `split` in it. Raises `DataError`."""
    path = Path(data)
    if not path.is_dir():
        return path
    names = _FILES[split]
    found = [path / name for name in names if (path / name).is_file()]
    if not found:
        raise DataError(f"{path} holds no {split} file", hint=f"Name a file, or call it {names[0]}.")
    return found[0]


def read_threads(task: Task, data: str, split: Split, limit: int | None) -> Iterator[list[Item]]:
    """The items of the first `limit` records, those of a record together.

    `data` is a file, a directory, `hub`, or `hub:OWNER/NAME[:CONFIGURATION]`. Raises `DataError`, and
    `UsageError` where the task is not on the hub.
    """
    where, _, place = data.partition(":")
    if where == HUB:
        at = tuple(place.split(":")) if place else task.hub
        if not at:
            raise UsageError("this task has no place of its own on the hub", hint="Give hub:OWNER/NAME.")
        records = read_hub(task.hub[-1] if task.hub else "", at, split)
    else:
        records = read_records(find_file(data, split))
    return (items for record in islice(records, limit) if (items := task.read(record)))
