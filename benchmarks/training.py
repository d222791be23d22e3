"""How fast is split training beside centralised LoRA training of the whole model, at the same batch?

Split: a real broker, a real worker, and every silo a process of its own, as its owner would start it.
Centralised: plain transformers and PEFT in this process, on the very same micro-batches. They take
turns; while one computes the other waits.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.progress import Progress
from benchmarks.reference import Reference, whole_model
from codec.plan import RunPlan
from silo_agent.data import chat_examples
from silo_agent.demo.commands import CLINICS, data_file
from silo_agent.microbatch import Example, MicroBatch, batches
from silo_agent.processes import Process, Processes, wait_for_all
from workers.checkpoint import Checkpoint

_DEADLINE_S = 1800.0
_MAX_LENGTH = 1024


@dataclass(frozen=True, slots=True)
class Settings:
    """A silo has `accumulate` micro-batches of `batch` sequences in each of the `steps`.

    The first step is not counted: it warms up.
    """

    model: str
    head: int
    tail: int
    batch: int
    accumulate: int
    steps: int
    rounds: int


def measure(settings: Settings, silos: Sequence[int], progress: Progress) -> dict[str, Any]:
    """One row for each number of `silos`: tokens per second, split and centralised, and their ratio."""
    found: dict[int, list[dict[str, float]]] = {number: [] for number in silos}
    central = _Central(settings)
    with tempfile.TemporaryDirectory() as scratch, Processes(Path(scratch) / "logs") as processes:
        broker = processes.broker()
        worker = processes.start("worker", "worker", "--broker", broker, "--model", settings.model)
        for turn in range(settings.rounds):
            for number in silos:
                name = f"round-{turn}-{number}"
                progress(f"round {turn + 1} of {settings.rounds}, {number} silos")
                split = _Split(processes, worker, broker, Path(scratch) / name).train(settings, number)
                progress(f"round {turn + 1} of {settings.rounds}, centralised, the same batch")
                whole = central.train(number)
                found[number].append(split | {"central": whole, "ratio": split["split"] / whole})
    return {
        "rows": [
            {
                "silos": number,
                "tokens_per_s": _median(rounds, "split"),
                "central_tokens_per_s": _median(rounds, "central"),
                "ratio": _median(rounds, "ratio"),
                "trunk_busy": _median(rounds, "trunk_busy"),
                "rounds": rounds,
            }
            for number, rounds in found.items()
        ]
    }


def _median(rounds: Sequence[dict[str, float]], name: str) -> float:
    return statistics.median(found[name] for found in rounds)


class _Split:
    """Silos as processes; `name` is the run's, and the directory for what they write."""

    def __init__(self, processes: Processes, worker: Process, broker: str, place: Path) -> None:
        self._processes, self._worker, self._broker, self._place = processes, worker, broker, place

    def train(self, settings: Settings, number: int) -> dict[str, float]:
        """Tokens per second of all silos after the first step, and how busy the trunk was."""
        silos = [self._start(settings, number, silo) for silo in range(number)]
        wait_for_all(silos, self._worker, _DEADLINE_S, "the silos did not end")
        reports = [json.loads((self._place / f"{silo}.json").read_text()) for silo in range(number)]
        return throughput_of([report["results"]["steps"] for report in reports])

    def _start(self, settings: Settings, number: int, silo: int) -> Process:
        place = self._place
        what = [f"--broker={self._broker}", f"--model={settings.model}"]
        what += [f"--head={settings.head}", f"--tail={settings.tail}"]
        what += [f"--run={place.name}", f"--silos={number}", f"--steps={settings.steps}"]
        what += [f"--batch={settings.batch}", f"--accumulate={settings.accumulate}"]
        what += [f"--name=silo-{silo}", f"--data={_data(silo)}", f"--max-length={_MAX_LENGTH}"]
        what += [f"--out={place / str(silo)}", f"--json={place / f'{silo}.json'}", "--progress=jsonl"]
        return self._processes.start(f"{place.name}-silo-{silo}", "silo", "train", *what)


def throughput_of(silos: Sequence[Sequence[dict[str, Any]]]) -> dict[str, float]:
    """From every silo's step reports: all silos' tokens per second, without the first step."""
    counted = [steps[1:] for steps in silos]
    tokens = sum(step["tokens"] for steps in counted for step in steps)
    seconds = statistics.mean(sum(step["seconds"] for step in steps) for steps in counted)
    busy = statistics.mean(step["trunk_busy"] for steps in counted for step in steps)
    return {"split": tokens / seconds, "trunk_busy": busy}


class _Central:
    """The whole model with PEFT's LoRA, trained on what the silos have."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        checkpoint = Checkpoint(settings.model)
        self._tokenizer = AutoTokenizer.from_pretrained(checkpoint.ref)
        # The options' defaults of `trunkline silo train`, as the silos train with them.
        plan = RunPlan(ends="shared", schedule="constant")
        self._reference = Reference(whole_model(checkpoint.ref), plan)

    def train(self, silos: int) -> float:
        """Tokens per second after the first step, each step on the micro-batches of so many silos."""
        sources = [self._source(silo) for silo in range(silos)]
        tokens, begun = 0, 0.0
        for step in range(self._settings.steps):
            if step == 1:
                tokens, begun = 0, time.monotonic()
            groups = [unpacked(next(source)) for source in sources for _ in range(self._settings.accumulate)]
            self._reference.step(groups)
            tokens += sum(len(example.ids) for group in groups for example in group)
        return tokens / (time.monotonic() - begun)

    def _source(self, silo: int) -> Iterator[MicroBatch]:
        examples = chat_examples(_data(silo), self._tokenizer, max_tokens=_MAX_LENGTH, everything=False)
        return batches(examples, self._settings.batch, seed=0)


def _data(silo: int) -> Path:
    return data_file(CLINICS[silo % len(CLINICS)])


def unpacked(batch: MicroBatch) -> list[Example]:
    """The examples that were packed into a micro-batch."""
    learned = {position + 1 for position in batch.keep.tolist()}
    examples, at = [], 0
    for length in batch.lengths:
        answer = tuple(position in learned for position in range(at, at + length))
        examples.append(Example(tuple(batch.ids[at : at + length].tolist()), answer))
        at += length
    return examples
