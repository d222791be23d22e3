"""Data sets from the Hugging Face hub, through the `datasets` library where it is installed.

The hub's tables are flatter than the official files. What comes out of here has the official shape, so
that a task has one reader.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any

from codec.errors import DataError, UsageError
from silo_agent.tasks.records import Record

Row = dict[str, Any]


def read_hub(kind: str, place: tuple[str, ...], split: str) -> Iterator[Record]:
    """The records of `split` at `place` (name, configuration), as the official files of `kind` have them.

    Raises `UsageError` without the library, and `DataError` for a set that cannot be had.
    """
    try:
        import datasets
    except ImportError:
        raise UsageError(
            "reading from the hub needs the `datasets` library",
            hint="pip install 'trunkline[hub]', or give a file or directory of the official archive.",
        ) from None
    where = ":".join(place)
    try:
        table = datasets.load_dataset(*place, split=split, streaming=True)
        names = {name: feature.names for name, feature in table.features.items() if hasattr(feature, "names")}
        rows = _OFFICIAL.get(kind, _same)(_labelled(table, names))
        for number, row in enumerate(rows, 1):
            yield Record(f"{where}, {split} record {number}", row)
    except Exception as error:  # The library lets through what its many parts raise.
        raise DataError(
            f"{where} cannot be had from the hub: {error}", hint="Is it reachable? A local file works too."
        ) from None


def _labelled(rows: Iterable[Row], names: Mapping[str, list[str]]) -> Iterator[Row]:
    """Rows with the names of their labels; a label of -1 is none."""
    for row in rows:
        hidden = {name for name in names if row[name] == -1}
        yield {
            name: names[name][value] if name in names else value
            for name, value in row.items()
            if name not in hidden
        }


def _same(rows: Iterable[Row]) -> Iterator[Row]:
    return iter(rows)


def _truth(rows: Iterable[Row]) -> Iterator[Row]:
    return ({**row, "label": row["label"] == "True"} for row in rows)


def _copa(rows: Iterable[Row]) -> Iterator[Row]:
    return ({**row, "label": int(row["label"] == "choice2")} for row in rows)


def _wsc(rows: Iterable[Row]) -> Iterator[Row]:
    return ({"text": row["text"], "target": row, "label": row["label"]} for row in _truth(rows))


def _multirc(rows: Iterable[Row]) -> Iterator[Row]:
    for _, passage in groupby(rows, key=lambda row: row["idx"]["paragraph"]):
        questions = []
        text = ""
        for _, group in groupby(passage, key=lambda row: row["idx"]["question"]):
            members = list(group)
            text = members[0]["paragraph"]
            answers = [{"text": row["answer"], "label": int(row["label"] == "True")} for row in members]
            questions.append({"question": members[0]["question"], "answers": answers})
        yield {"passage": {"text": text, "questions": questions}}


def _record(rows: Iterable[Row]) -> Iterator[Row]:
    for row in rows:
        starts = [(row["passage"].find(name), name) for name in row["entities"]]
        entities = [{"start": start, "end": start + len(name) - 1} for start, name in starts if start >= 0]
        answers = [{"text": text} for text in row["answers"]]
        passage = {"text": row["passage"], "entities": entities}
        yield {"passage": passage, "qas": [{"query": row["query"], "answers": answers}]}


def _coqa(rows: Iterable[Row]) -> Iterator[Row]:
    for row in rows:
        questions = [{"input_text": text} for text in row["questions"]]
        answers = [{"input_text": text} for text in row["answers"]["input_text"]]
        yield {"story": row["story"], "questions": questions, "answers": answers}


def _quac(rows: Iterable[Row]) -> Iterator[Row]:
    for row in rows:
        pairs = zip(row["questions"], row["answers"]["texts"], strict=True)
        qas = [{"question": asked, "answers": [{"text": text} for text in texts]} for asked, texts in pairs]
        yield {"paragraphs": [{"context": row["context"], "qas": qas}]}


_OFFICIAL: dict[str, Callable[[Iterable[Row]], Iterator[Row]]] = {
    "boolq": _truth,
    "wic": _truth,
    "copa": _copa,
    "wsc.fixed": _wsc,
    "multirc": _multirc,
    "record": _record,
    "stanfordnlp/coqa": _coqa,
    "allenai/quac": _quac,
}
