"""Is anything lost or wrong when processes are killed, stopped and cut off all the time?

First undisturbed: what silos generate and what a run's adapter is. Then the same again and again, while a
plan that follows from a seed disturbs broker, workers, links and the training silo.
"""

import random
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.chaos_plan import plan
from benchmarks.chaos_silos import Exchange, Talker
from benchmarks.chaos_stage import Cast, Stage
from benchmarks.chaos_tally import Tally, by_kind, recoveries, summary, unexplained
from benchmarks.chaos_training import Run, Training
from benchmarks.progress import Progress
from codec.partition import Partition
from silo_agent.processes import Processes
from workers.checkpoint import Checkpoint

_EXCHANGES = 16
_FINISH_S = 180.0
"""For what is under way when the plan ends."""


@dataclass(frozen=True, slots=True)
class Settings:
    """`every` is the mean gap between disturbances, and `silence` the broker's, in seconds."""

    model: str
    cut: Partition
    minutes: float
    seed: int
    workers: int
    silos: int
    train: bool
    steps: int
    every: float
    silence: float


def measure(settings: Settings, progress: Progress) -> dict[str, Any]:
    """Run it; what was asked for, what went wrong, and how long the disturbed took to go on."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as scratch:
        # The noise is repeated on purpose: that it is the same bytes again is what the tokens show.
        warnings.filterwarnings("ignore", message="a fixed noise seed")
        folder = Path(scratch)
        cast = Cast(settings.model, settings.workers, settings.silence, folder / "state")
        progress("starting")
        with Processes(folder / "logs") as processes, Stage(processes, cast, settings.seed) as stage:
            return _disturbed(settings, processes, stage, folder, progress)


def _disturbed(
    settings: Settings, processes: Processes, stage: Stage, folder: Path, progress: Progress
) -> dict[str, Any]:
    seconds, dice = settings.minutes * 60, random.Random(settings.seed)
    tally, stop, checkpoint = Tally(), threading.Event(), Checkpoint(settings.model)
    progress("generating undisturbed")
    # Models are built one at a time: what is built meanwhile would be on meta.
    talkers = [Talker(checkpoint, settings.cut, stage.endpoint) for _ in range(settings.silos)]
    exchanges = talkers[0].rehearse(dice, _EXCHANGES)
    lives = [
        threading.Thread(target=_told, args=(tally, live, dice.getrandbits(32), exchanges, tally, stop))
        for live in (talker.live for talker in talkers)
    ]
    if settings.train:
        progress("training undisturbed")
        run = Run(settings.model, settings.cut, settings.steps)
        training = Training(processes, stage, run, folder, tally)
        lives.append(threading.Thread(target=_told, args=(tally, training.live, training.rehearse(), stop)))
    for life in lives:
        life.daemon = True
        life.start()
    begun = time.monotonic()
    disturbances = plan(
        settings.seed,
        seconds,
        every=settings.every,
        workers=settings.workers,
        trainer=settings.train,
    )
    stage.perform(disturbances, seconds, progress)
    stop.set()
    progress("finishing")
    until = time.monotonic() + _FINISH_S
    while any(life.is_alive() for life in lives) and time.monotonic() < until:
        stage.watch()
        time.sleep(0.05)
    for life in lives:
        if life.is_alive():
            tally.failed(f"still waiting {_FINISH_S:g} s after the last disturbance")
    return _results(settings, tally, stage, exchanges, begun)


def _told(tally: Tally, live: Callable[..., None], *arguments: object) -> None:
    """A life that ends by a defect is a loss too."""
    try:
        live(*arguments)
    except Exception as error:
        tally.failed(f"{type(error).__name__}: {error}")


def _results(
    settings: Settings, tally: Tally, stage: Stage, exchanges: list[Exchange], begun: float
) -> dict[str, Any]:
    found = recoveries(tally.waits, stage.deeds)
    steps = recoveries(tally.step_waits, stage.deeds)
    whole, training = summary(found), summary(steps)
    kinds = [deed.disturbance.label for deed in stage.deeds]
    return {
        "seed": settings.seed,
        "requests": tally.generations + tally.steps + len(tally.lost),
        "generations": tally.generations,
        "tokens": tally.tokens,
        "training_steps": tally.steps,
        "training_runs": tally.runs,
        "disturbances": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "left_out": stage.left_out,
        "kills": sum(kind.startswith("kill") for kind in kinds),
        "lost": len(tally.lost),
        "first_lost": tally.lost[:5],
        "wrong": tally.wrong,
        "adapter_max_abs_diff": max(tally.adapter_diffs, default=None),
        "fallen": stage.fallen,
        "recovery_p50_s": whole["p50_s"],
        "recovery_p99_s": whole["p99_s"],
        "recovery_max_s": whole["max_s"],
        "recoveries": whole["count"],
        "recovery_by_kind": by_kind(found),
        "training_recovery": training,
        "stalls_without_cause": unexplained(tally.waits, stage.deeds),
        "exchanges": len(exchanges),
        "timeline": {
            "tokens": [round(wait.ended - begun, 3) for wait in tally.waits],
            "steps": [round(wait.ended - begun, 3) for wait in tally.step_waits],
            "deeds": [
                [round(deed.begun - begun, 3), round(deed.ended - begun, 3), deed.disturbance.label]
                for deed in stage.deeds
            ],
            "recoveries": [[round(each.at - begun, 3), round(each.seconds, 3), each.label] for each in found],
        },
    }
