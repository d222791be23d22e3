"""How much of the time does the trunk compute, and how fast is it beside the same batches in one process?

Replay silos before a real broker and real workers, with a slow line between if so asked. The trunk is
a real model's, or paced: timed as a GPU would be.
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.figures import latencies_ms
from benchmarks.inprocess import decode_directly, train_directly
from benchmarks.load import Load, Served
from benchmarks.progress import Progress
from benchmarks.recording import crossing
from benchmarks.replay import Generation, Replay, Training, Trunk
from benchmarks.source import Source, paced_source, real_source
from benchmarks.stack import Stack
from codec.errors import TrunklineError
from codec.messages import Wire
from codec.partition import Partition
from silo_agent.processes import Processes

Task = Literal["train", "generate"]
_SLICE_S = 0.25


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured. `pace` None means that `model` computes for real.

    Training: micro-batches of `sequences` of about `length` tokens, `window` in flight, `accumulate` a
    step, silos spread over `runs`. Generation: prompts of `length` tokens, then `new` decode steps.
    """

    silos: int
    workers: int
    task: Task
    pace: str | None
    model: str
    head: int
    tail: int
    sequences: int
    length: int
    window: int
    accumulate: int
    runs: int
    new: int
    wire: Wire
    rtt_ms: float
    mbit: float
    seconds: float
    rounds: int


def measure(settings: Settings, progress: Progress) -> dict[str, Any]:
    """Rounds of the same batches first in this process, then through the broker; medians."""
    progress("making the silos' tensors")
    cut = Partition(settings.head, settings.tail)
    size = {"sequences": settings.sequences, "length": settings.length}
    source = (
        paced_source(settings.pace, cut, **size)
        if settings.pace
        else real_source(settings.model, cut, **size)
    )
    worker = ("--pace", settings.pace) if settings.pace else ("--model", settings.model)
    rounds = []
    waits: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as logs, Processes(Path(logs)) as processes:
        line = {"rtt_ms": settings.rtt_ms, "mbit": settings.mbit}
        stack = Stack(processes, worker=worker, workers=settings.workers, **line)
        for number in range(settings.rounds):
            progress(f"round {number + 1} of {settings.rounds}, in one process")
            direct = _directly(source, settings)
            progress(f"round {number + 1} of {settings.rounds}, {settings.silos} silos")
            served, found = one_round(stack, replays(source, settings, f"round-{number}"), settings.seconds)
            rounds.append(found | {"inprocess_tokens_per_s": direct})
            rounds[-1]["ratio_to_inprocess"] = found["tokens_per_s"] / direct
            for kind, seconds in served.waits.items():
                waits.setdefault(kind, []).extend(seconds)
        timeline = stack.timeline(served.begun, served.ended, _SLICE_S)
    speed = ("trunk_busy", "tokens_per_s", "ratio_to_inprocess", "inprocess_tokens_per_s")
    middle = (*speed, "bytes_per_token", "tokens_per_pass")
    return {
        "paced": settings.pace is not None,
        **{name: statistics.median(found[name] for found in rounds) for name in middle},
        "latency_ms": latencies_ms(waits),
        "cores": rounds[-1]["cores"],
        "rounds": rounds,
        "timeline": timeline,
    }


def replays(source: Source, settings: Settings, run: str) -> list[Replay]:
    """The silos of one round."""
    trunk = Trunk(source.card, source.blocks, settings.wire)
    silos = range(settings.silos)
    if settings.task == "generate":
        prompt = crossing(source.prompt(settings.length), settings.wire)
        token = crossing(source.prompt(1), settings.wire)
        return [Generation(trunk, prompt, token, settings.new) for _ in silos]
    batches = [batch.encoded(settings.wire) for batch in source.batches]
    members = [len(range(number, settings.silos, settings.runs)) for number in range(settings.runs)]
    return [
        Training(
            trunk,
            f"{run}-{silo % settings.runs}",
            members[silo % settings.runs],
            [batches[(silo + turn) % len(batches)] for turn in range(len(batches))],
            window=settings.window,
            accumulate=settings.accumulate,
        )
        for silo in silos
    ]


def _directly(source: Source, settings: Settings) -> float:
    if settings.task == "generate":
        prompts = [source.prompt(settings.length)] * settings.silos
        return decode_directly(
            source.span, source.blocks, prompts, new=settings.new, seconds=settings.seconds
        )
    step = settings.accumulate * settings.silos // settings.runs
    return train_directly(
        source.span, source.blocks, source.adapter, source.batches, step=step, seconds=settings.seconds
    )


def one_round(stack: Stack, silos: Sequence[Replay], seconds: float) -> tuple[Served, dict[str, Any]]:
    """Let the silos work for about `seconds`; what they measured, and what that comes to.

    Raises `TrunklineError` if one of them failed.
    """
    with Load(stack.endpoint, silos) as load:
        load.warm_up()
        begun, before = time.monotonic(), stack.cpu_seconds()
        served = load.measure(seconds)
        took, after = time.monotonic() - begun, stack.cpu_seconds()
        stack.settle(served.ended)
    if served.errors:
        raise TrunklineError(f"{len(served.errors)} silos failed; the first: {served.errors[0]}")
    cores = {name: (after[name] - before[name]) / took for name in after} | {"replay silos": served.cpu}
    return served, {
        "trunk_busy": stack.busy(served.begun, served.ended),
        "tokens_per_s": sum(served.rates),
        "bytes_per_token": served.size / max(1, served.tokens),
        "tokens_per_pass": stack.tokens_per_pass(served.begun, served.ended),
        "seconds": served.ended - served.begun,
        "cores": cores,
    }
