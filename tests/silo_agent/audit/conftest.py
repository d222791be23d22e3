"""Short texts on the tiny model, and what a worker would see of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from codec.partition import Partition
from silo_agent.audit.attack import Knowledge, Seen
from silo_agent.audit.crossing import Crossing
from silo_agent.audit.public import PublicModel
from silo_agent.audit.subject import shared_beginning
from silo_agent.data import chat_examples
from silo_agent.ends import Ends
from silo_agent.microbatch import Example
from silo_agent.noise import Noise, NoiseScale
from silo_agent.wires import Wires

TEXTS, TOKENS = 3, 30


@pytest.fixture(scope="session")
def notes(tiny: Any, clinics: list[Path]) -> list[Example]:
    """Ends of clinical notes, each with an answer that is learned; the first are attacked."""
    whole = [example for file in clinics for example in chat_examples(file, tiny.tokenizer, max_tokens=999)]
    return [Example(example.ids[-TOKENS:], example.answer[-TOKENS:]) for example in whole]


class Scene:
    """A silo of one partition, the texts attacked, and what the attacker holds."""

    def __init__(self, tiny: Any, notes: list[Example], head: int, tail: int) -> None:
        self.ends = Ends(tiny.checkpoint, Partition(head, tail))
        self.model = PublicModel(tiny.checkpoint, self.ends)
        self.texts, others = notes[:TEXTS], notes[TEXTS:]
        self.begin = shared_beginning(self.texts)
        self.knowledge = Knowledge(self.model, self.begin, tuple(example.ids for example in others))

    def seen(self, scale: NoiseScale, wire: Any = "exact", releases: int = 1) -> list[Seen]:
        crossing = Crossing(self.ends, self.model.trunk, Noise(scale), Wires(wire))
        return [crossing.send(text, releases) for text in self.texts]


@pytest.fixture(scope="session")
def scene(tiny: Any, notes: list[Example]) -> Callable[[int, int], Scene]:
    """`scene(head, tail)`, each built once."""
    built: dict[tuple[int, int], Scene] = {}

    def get(head: int, tail: int) -> Scene:
        return built.setdefault((head, tail), Scene(tiny, notes, head, tail))

    return get
