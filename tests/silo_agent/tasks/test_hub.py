"""Hub tables in the shapes that their cards document, through a stand-in for the library."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from codec.errors import DataError, UsageError
from silo_agent.tasks.item import Item
from silo_agent.tasks.source import read_threads
from silo_agent.tasks.task import Task, find_task

TRUTH = ["False", "True"]
GLUE = "aps/super_glue"
TABLES: dict[str, tuple[tuple[str, ...], list[str], list[dict[str, Any]], list[Item]]] = {
    "boolq": (
        (GLUE, "boolq"),
        TRUTH,
        [{"question": "q", "passage": "p", "idx": 0, "label": 1}],
        [Item("", "", "Yes", context="p")],
    ),
    "wic": (
        (GLUE, "wic"),
        TRUTH,
        [{"word": "w", "sentence1": "a", "sentence2": "b", "label": 0}],
        [Item("", "", "No")],
    ),
    "wsc": (
        (GLUE, "wsc.fixed"),
        TRUTH,
        [{"text": "Ann she", "span1_text": "Ann", "span2_text": "she", "span2_index": 1, "label": 1}],
        [Item("", "", "Yes")],
    ),
    "rte": (
        (GLUE, "rte"),
        ["entailment", "not_entailment"],
        [{"premise": "p", "hypothesis": "h", "label": 1}],
        [Item("", "", "No", context="p")],
    ),
    "cb": (
        (GLUE, "cb"),
        ["entailment", "contradiction", "neutral"],
        [{"premise": "p", "hypothesis": "h", "label": 2}],
        [Item("", "", "Maybe", context="p")],
    ),
    "copa": (
        (GLUE, "copa"),
        ["choice1", "choice2"],
        [{"premise": "p", "choice1": "a", "choice2": "b", "question": "effect", "label": 1}],
        [Item("", "", "b")],
    ),
    "multirc": (
        (GLUE, "multirc"),
        TRUTH,
        [
            {
                "paragraph": f"text {passage}",
                "question": f"question {question}",
                "answer": "a",
                "idx": {"paragraph": passage, "question": question, "answer": 9},
                "label": label,
            }
            for passage, question, label in [(0, 0, 1), (0, 0, 0), (0, 1, 1), (1, 2, 0)]
        ],
        [
            Item("", "", answer, context=f"text {passage}")
            for passage, answer in [(0, "Yes"), (0, "No"), (0, "Yes"), (1, "No")]
        ],
    ),
    "record": (
        (GLUE, "record"),
        [],
        [
            {
                "passage": "Ann met Bob.",
                "query": "@placeholder waited",
                "entities": ["Ann", "Bob", "Nobody"],
                "answers": ["Bob"],
            }
        ],
        [Item("", "", "Bob", context="Ann met Bob.", candidates=("Ann", "Bob"))],
    ),
    "coqa": (
        ("stanfordnlp/coqa",),
        [],
        [{"story": "s", "questions": ["q1", "q2"], "answers": {"input_text": ["a1", "a2"]}}],
        [Item("", "", "a1"), Item("", "", "a2")],
    ),
    "quac": (
        ("allenai/quac",),
        [],
        [{"context": "c", "questions": ["q1", "q2"], "answers": {"texts": [["a1", "b1"], ["a2"]]}}],
        [Item("", "", "a1"), Item("", "", "a2")],
    ),
    "xsum": (
        ("EdinburghNLP/xsum",),
        [],
        [{"document": "d", "summary": "s", "id": "1"}],
        [Item("", "", "s", context="d")],
    ),
}


def the_task(name: str) -> Task:
    task = find_task(name, None, "answer")
    assert task is not None
    return task


class Table(list[dict[str, Any]]):
    """Rows with the features of their columns; a label's has the names of its values."""

    def __init__(self, rows: list[dict[str, Any]], names: list[str]) -> None:
        super().__init__(rows)
        plain = {name: SimpleNamespace(dtype="string") for name in rows[0]}
        self.features = plain | ({"label": SimpleNamespace(names=names)} if names else {})


@pytest.mark.parametrize("name", TABLES)
def test_hub_tables_have_the_official_shape(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    place, names, rows, expected = TABLES[name]
    asked: list[Any] = []

    def load_dataset(*where: str, split: str, streaming: bool) -> Table:
        asked.append((where, split, streaming))
        return Table(rows, names)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    threads = list(read_threads(the_task(name), "hub", "train", None))
    assert asked == [(place, "train", True)]
    items = [item for thread in threads for item in thread]
    assert [item.answer for item in items] == [item.answer for item in expected]
    for item, wanted in zip(items, expected, strict=True):
        assert wanted.context in item.context
        assert item.candidates == (wanted.candidates or item.candidates)
        assert item.where.startswith(f"{':'.join(place)}, train record 1") or name == "multirc"
    if name == "multirc":
        assert len({item.group for item in items}) == 3
        assert len(threads) == 2


def test_another_place_on_the_hub_and_a_row_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"premise": "p", "hypothesis": "h", "label": 0}, {"premise": 3, "hypothesis": "h", "label": 0}]

    def load_dataset(*where: str, split: str, streaming: bool) -> Table:
        assert (where, split) == (("me/rte", "plain"), "validation")
        return Table(rows, ["entailment", "not_entailment"])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match='me/rte:plain, validation record 2: "premise" is text'):
        list(read_threads(the_task("rte"), "hub:me/rte:plain", "validation", None))


def test_without_the_library_or_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="needs the `datasets` library") as caught:
        list(read_threads(the_task("xsum"), "hub", "train", None))
    assert "trunkline[hub]" in caught.value.hint

    def load_dataset(*where: str, split: str, streaming: bool) -> Table:
        raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match="EdinburghNLP/xsum cannot be had from the hub: no route"):
        list(read_threads(the_task("xsum"), "hub", "train", None))
    own = Task(the_task("xsum").read)
    with pytest.raises(UsageError, match="no place of its own"):
        list(read_threads(own, "hub", "train", None))
