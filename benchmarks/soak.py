"""Does anything grow, stick or fail when silos and workers come and go for a long time?

A broker, a worker that stays, and one that is drained and replaced again and again. Before them silos
that join, generate for a short or a long time, train alone or in pairs, and leave, some without a word.
"""

import contextlib
import random
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.progress import Progress
from broker.link import ZmqLink
from codec.errors import DeadlineError, TrunklineError
from codec.messages import CloseRun, OpenRun
from codec.partition import Partition
from codec.plan import LoraPlan, RunPlan
from silo_agent.ends import Ends
from silo_agent.microbatch import Example, pack_examples
from silo_agent.noise import Noise, NoiseScale
from silo_agent.processes import Process, Processes
from silo_agent.remote import Remote, silo_attach
from silo_agent.session import Session
from silo_agent.trainer import Trainer
from workers.checkpoint import Checkpoint

_DEADLINE_S = 60.0
"""A request that takes longer counts as stuck."""
_SAMPLE_S = 1.0
_REPLACE_S = 15.0
_PLAN = LoraPlan(rank=4, targets=("q_proj", "v_proj"))


@dataclass(slots=True)
class _Tally:
    """What happened, from many threads."""

    done: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    stuck: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, what: str) -> None:
        with self.lock:
            self.done[what] += 1

    def failed(self, what: str, error: TrunklineError) -> None:
        with self.lock:
            self.stuck += isinstance(error, DeadlineError)
            self.errors.append(f"{what}: {error}")


class _Silos:
    """What one slot of the load does, over and over."""

    def __init__(self, endpoint: str, checkpoint: Checkpoint, cut: Partition, tally: _Tally) -> None:
        self._endpoint, self._checkpoint, self._cut, self._tally = endpoint, checkpoint, cut, tally
        self._vocabulary = checkpoint.config.vocab_size
        self._building = threading.Lock()

    def ends(self, plan: RunPlan | None = None) -> Ends:
        """Head and tail of a silo's own: a span computes on one thread at a time.

        Models are built and adapted one at a time too: what is built meanwhile would be on meta.
        """
        with self._building:
            ends = Ends(self._checkpoint, self._cut)
            if plan is not None:
                ends.adapt(plan.lora, plan.seed)
            return ends

    def live(self, seed: int, stop: threading.Event) -> None:
        """Join, do something, leave; until `stop`."""
        dice, ends = random.Random(seed), self.ends()
        while not stop.is_set():
            kind = dice.choices(("short", "long", "train", "pair"), (6, 2, 2, 1))[0]
            try:
                match kind:
                    case "short":
                        self._generate(dice, ends, dice.randint(1, 8), stop)
                    case "long":
                        self._generate(dice, ends, dice.randint(100, 300), stop)
                    case "train":
                        self._train(dice, f"run-{dice.getrandbits(48):x}", 1, threading.Barrier(1))
                    case _:
                        self._pair(dice)
            except TrunklineError as error:
                self._tally.failed(kind, error)
            else:
                self._tally.count(kind)

    def _generate(self, dice: random.Random, ends: Ends, new: int, stop: threading.Event) -> None:
        prompts = [self._ids(dice, dice.randint(1, 60)) for _ in range(dice.randint(1, 3))]
        with self._remote() as remote:
            capacity = max(map(len, prompts)) + new
            noise = Noise(NoiseScale(relative=0.05))
            with Session(ends, remote, rows=len(prompts), capacity=capacity, noise=noise) as session:
                rows = list(range(len(prompts)))
                logits = session.extend(rows, prompts)
                for _ in range(new - 1):
                    if stop.is_set():
                        return
                    logits = session.extend(rows, [[int(choice)] for choice in logits.argmax(-1)])
                if dice.random() < 0.2:
                    remote.close()  # It leaves with its session open.

    def _pair(self, dice: random.Random) -> None:
        """Two silos of one run; if one fails the other hears of it."""
        run, together, errors = f"run-{dice.getrandbits(48):x}", threading.Barrier(2), []

        def second(seed: int) -> None:
            try:
                self._train(random.Random(seed), run, 2, together)
            except TrunklineError as error:
                errors.append(error)

        thread = threading.Thread(target=second, args=(dice.getrandbits(32),))
        thread.start()
        try:
            self._train(dice, run, 2, together)
        finally:
            thread.join(2 * _DEADLINE_S)
        if errors:
            raise errors[0]

    def _train(self, dice: random.Random, run: str, silos: int, together: threading.Barrier) -> None:
        plan = RunPlan(silos=silos, steps=dice.randint(1, 4) if silos == 1 else 3, lora=_PLAN)
        ends = self.ends(plan)
        with self._remote() as remote:
            remote.open(
                OpenRun(run=run, model=ends.card, start=ends.trunk.start, stop=ends.trunk.stop, plan=plan),
                [],
                wait=_DEADLINE_S,
            )
            with contextlib.suppress(threading.BrokenBarrierError):
                together.wait(_DEADLINE_S)
            trainer = Trainer(
                ends, remote, run=run, plan=plan, noise=Noise(NoiseScale()), patience=_DEADLINE_S
            )
            for _ in range(plan.steps):
                trainer.step([pack_examples([self._example(dice)]) for _ in range(dice.randint(1, 4))])
            remote.call(CloseRun(run=run))

    def _example(self, dice: random.Random) -> Example:
        ids = self._ids(dice, dice.randint(4, 40))
        return Example(tuple(ids), (False, *[True] * (len(ids) - 1)))

    def _ids(self, dice: random.Random, tokens: int) -> list[int]:
        return [dice.randrange(self._vocabulary) for _ in range(tokens)]

    @contextlib.contextmanager
    def _remote(self) -> Iterator[Remote]:
        remote = Remote(ZmqLink(self._endpoint, silo_attach("soak")), deadline=_DEADLINE_S)
        try:
            yield remote
        finally:
            remote.close()


def measure(
    model: str, cut: Partition, *, minutes: float, slots: int, seed: int, progress: Progress
) -> dict[str, Any]:
    """Run for `minutes` with `slots` silos at work at any time; what was done, and whose memory grew."""
    checkpoint, tally, stop = Checkpoint(model), _Tally(), threading.Event()
    with tempfile.TemporaryDirectory() as logs, Processes(Path(logs)) as processes:
        endpoint = processes.broker()
        steady = processes.start("steady", "worker", "--broker", endpoint, "--model", model)
        silos = _Silos(endpoint, checkpoint, cut, tally)
        threads = [
            threading.Thread(target=silos.live, args=(seed + slot, stop), name=f"slot-{slot}", daemon=True)
            for slot in range(slots)
        ]
        for thread in threads:
            thread.start()
        watched = {"broker": processes["broker"], "worker": steady}
        samples, replaced = _watch(processes, endpoint, model, watched, minutes * 60, tally, progress)
        stop.set()
        for thread in threads:
            thread.join(2 * _DEADLINE_S)
        hanging = sum(thread.is_alive() for thread in threads)
    return {
        "seed": seed,
        "done": dict(tally.done),
        "errors": len(tally.errors),
        "first_errors": tally.errors[:5],
        "stuck": tally.stuck + hanging,
        "workers_replaced": replaced,
        "memory": {name: _growth(values) for name, values in samples.items()},
        "samples": samples,
    }


def _watch(
    processes: Processes,
    endpoint: str,
    model: str,
    watched: dict[str, Process],
    seconds: float,
    tally: _Tally,
    progress: Progress,
) -> tuple[dict[str, list[tuple[float, float]]], int]:
    """Sample memory (MiB), and replace the second worker; until time is up."""
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in watched}
    begun, replaced, passing = time.monotonic(), 0, None
    due = begun
    while (now := time.monotonic()) < begun + seconds:
        if now >= due:
            if passing is not None:
                passing.terminate()
                replaced += 1
            passing = processes.start(
                f"passing-{replaced}", "worker", "--broker", endpoint, "--model", model, "--drain", "10"
            )
            due = now + _REPLACE_S
        for name, process in watched.items():
            process.check()
            samples[name].append((now - begun, process.resident_bytes() / (1 << 20)))
        total = sum(tally.done.values())
        progress(f"{now - begun:.0f} of {seconds:.0f} s, {total} done, {len(tally.errors)} errors")
        time.sleep(_SAMPLE_S)
    return samples, replaced


def _growth(values: list[tuple[float, float]]) -> dict[str, float]:
    """Resident MiB after the warm-up (second fifth of the time) and at the end (last fifth): medians."""
    end = values[-1][0]
    early, late = (
        statistics.median(value for at, value in values if share * end <= at <= (share + 0.2) * end)
        for share in (0.2, 0.8)
    )
    return {"early_mib": early, "late_mib": late, "growth": late / early - 1.0}
