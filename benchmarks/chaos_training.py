"""The silo of a chaos benchmark that trains, run after run, each compared with the undisturbed one."""

import contextlib
import json
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

import silo_agent.demo
from benchmarks.chaos_stage import Stage
from benchmarks.chaos_tally import Tally
from codec.errors import TrunklineError
from codec.partition import Partition
from silo_agent.adapters import read_adapter
from silo_agent.processes import Process, Processes
from silo_agent.snapshot import FILE

_TEXTS = Path(silo_agent.demo.__file__).with_name("north_clinic.jsonl")
_RUN_S = 600.0
"""For one run, however much it is disturbed."""
_LOOK_S = 0.05


@dataclass(frozen=True, slots=True)
class Run:
    """What every run is: alike but for its name."""

    model: str
    cut: Partition
    steps: int

    def options(self, endpoint: str, name: str, out: Path) -> tuple[str, ...]:
        """The silo's command line."""
        parts = ("--broker", endpoint, "--model", self.model, "--data", str(_TEXTS), "--out", str(out))
        cut = ("--head", str(self.cut.head), "--tail", str(self.cut.tail), "--name", "trainer")
        # One micro-batch at a time: what shares a pass, and so how sums are rounded, does not vary.
        alike = ("--steps", str(self.steps), "--batch", "2", "--accumulate", "1", "--window", "1")
        # AdamW blows rounding up where gradients are small: with a larger rate two undisturbed runs differ.
        exact = ("--wire", "exact", "--lr", "5e-4", "--progress", "jsonl")
        return ("silo", "train", *parts, *cut, *alike, *exact, "--run", name)


class Training:
    """A user who trains, and starts the silo again where it was killed."""

    def __init__(self, processes: Processes, stage: Stage, run: Run, folder: Path, tally: Tally) -> None:
        self._processes, self._stage, self._run = processes, stage, run
        self._folder, self._tally = folder, tally
        self._asked = 0.0
        self._reached = 0

    def rehearse(self) -> dict[str, Tensor]:
        """The adapter of a run that nothing disturbs. Raises `TrunklineError`."""
        out = self._folder / "undisturbed"
        silo = self._start("undisturbed", out, Tally())
        silo.wait(_RUN_S)
        return read_adapter(out).tensors

    def live(self, undisturbed: dict[str, Tensor], stop: threading.Event) -> None:
        """Train until `stop`, and then the run that is under way to its end."""
        number = 0
        while not stop.is_set():
            name = f"run-{number}"
            number += 1
            try:
                self._train(name, undisturbed)
            except TrunklineError as error:
                self._tally.failed(f"training: {error}")

    def _train(self, name: str, undisturbed: dict[str, Tensor]) -> None:
        out, until = self._folder / name, time.monotonic() + _RUN_S
        self._reached = 0
        resume: tuple[str, ...] = ()
        while True:
            silo = self._stage.trainer = self._start(name, out, self._tally, *resume)
            while silo.running() and time.monotonic() < until:
                time.sleep(_LOOK_S)
            if silo.code != -signal.SIGKILL:
                break
            # Killed before anything of the run was kept, or when all was done, it begins again as it began.
            resume = ("--resume", str(out)) if (out / FILE).exists() else ()
        with contextlib.ExitStack() as stack:
            stack.callback(silo.stop)
            silo.wait(0.1)
        adapter = read_adapter(out).tensors
        self._tally.trained(_furthest(adapter, undisturbed))

    def _start(self, name: str, out: Path, tally: Tally, *more: str) -> Process:
        self._asked = time.monotonic()

        def on_line(line: str) -> None:
            step = json.loads(line)["step"]
            now = time.monotonic()
            if step > self._reached:  # What is done again after a loss is no step more.
                self._reached = step
                tally.stepped(self._asked, now)
                self._asked = now

        options = self._run.options(self._stage.endpoint, name, out)
        return self._processes.start(f"silo-{name}", *options, *more, on_line=on_line)


def _furthest(adapter: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of any two values; infinite if they have not the same tensors."""
    if adapter.keys() != other.keys():
        return float("inf")
    return max(float((adapter[name] - other[name]).abs().max()) for name in adapter)
