"""Real processes on loopback, all of them ended with the test that started them."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from benchmarks.reference import greedy, whole_model
from broker.link import ZmqLink
from codec.partition import Partition
from silo_agent.demo.commands import data_file
from silo_agent.ends import Ends
from silo_agent.generation import OnText, generate
from silo_agent.noise import Noise, NoiseScale
from silo_agent.processes import Processes
from silo_agent.remote import Remote, silo_attach
from silo_agent.session import Session
from workers import catalog
from workers.checkpoint import Checkpoint

Run = Callable[..., "subprocess.CompletedProcess[str]"]
PROMPTS = ("The ward board needs a short note", "Chest pain since")
TOKENS = 16


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    """Starts brokers and workers; their logs are in the test's own directory."""
    with Processes(tmp_path / "logs") as started:
        yield started


@pytest.fixture
def trunkline(tmp_path: Path) -> Run:
    """`trunkline("silo", "train", ...)` as a user runs it, in an empty directory."""

    def run(*arguments: str, timeout: float = 90, **options: object) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "trunkline", *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=tmp_path,
            env={**os.environ, "PYTHONWARNINGS": "default"},
            check=False,
            **options,  # type: ignore[call-overload]
        )

    return run


class Writer:
    """A silo in the test's own process that continues prompts with the tiny model."""

    def __init__(self, prompts: int) -> None:
        tiny = str(catalog.fetch("tiny"))
        self._tokenizer = AutoTokenizer.from_pretrained(tiny)
        self._ends, self._whole = Ends(Checkpoint(tiny), Partition(1, 2)), whole_model(tiny)
        self._prompts = [list(self._tokenizer(prompt)["input_ids"]) for prompt in PROMPTS[:prompts]]

    @property
    def once(self) -> int:
        """Tokens that it sends where nothing disturbs it."""
        return sum(len(prompt) + TOKENS - 1 for prompt in self._prompts)

    def writes(
        self,
        brokers: str | Sequence[str],
        on_text: OnText | None = None,
        opened: Callable[[], object] = lambda: None,
        *,
        patience: float = 40.0,
        deadline: float = 40.0,
        wait: float = 40.0,
    ) -> int:
        """Write what the whole model does, and call `opened` before; how many tokens were sent."""
        remote = Remote(ZmqLink(brokers, silo_attach("north"), patience=patience), deadline=deadline)
        rows, quiet = len(self._prompts), Noise(NoiseScale())
        try:
            with Session(self._ends, remote, rows=rows, capacity=80, noise=quiet, wait=wait) as session:
                opened()
                answers = generate(
                    session,
                    self._tokenizer,
                    self._prompts,
                    max_tokens=TOKENS,
                    ends=frozenset(),
                    on_text=on_text,
                )
        finally:
            remote.close()
        for prompt, answer in zip(self._prompts, answers, strict=True):
            assert answer.tokens == greedy(self._whole, prompt, TOKENS)[0]
        return remote.traffic.tokens["extend up"]


@pytest.fixture
def writer() -> Callable[[int], Writer]:
    """`writer(prompts)`: a silo that continues so many prompts at once."""
    return Writer


@pytest.fixture(scope="session")
def chats_in() -> Callable[[Path], Path]:
    """`chats_in(place)`: a small file of conversations there."""

    def make(place: Path) -> Path:
        path = place / "chats.jsonl"
        path.write_text("".join(data_file("north").read_text().splitlines(keepends=True)[:8]))
        return path

    return make


@pytest.fixture
def chats(chats_in: Callable[[Path], Path], tmp_path: Path) -> Path:
    """A small file of conversations."""
    return chats_in(tmp_path)
