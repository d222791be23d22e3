"""What does each of our ideas bring? From the published way of working to ours, one switch at a time.

On a paced trunk behind slow lines, with real frames over a real broker. Clients that are called one
after another are measured as one: the others would wait meanwhile and add nothing.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import latencies_ms
from benchmarks.pace import PACES, PacedModel
from benchmarks.progress import Progress
from benchmarks.published import MaskedTraining, PublishedGeneration
from benchmarks.recording import Recorded, crossing, made_up
from benchmarks.replay import Crossing, Replay, Replayed, Training, Trunk
from benchmarks.stack import Stack
from benchmarks.throughput import one_round
from codec.messages import Wire
from codec.partition import Partition
from silo_agent.processes import Processes

R0, R1 = "R0", "R1"


@dataclass(frozen=True, slots=True)
class Way:
    """A way of working. `name` is what it does that the one before it does not.

    `accumulate` micro-batches are a training step, of three round trips with one, `trips` are a token's
    round trips. `wire` is what tensors cross in; `raw` is fp16 up and bf16 down.
    """

    name: str
    label: str = ""
    cached: bool = False
    masked: bool = True
    padded: bool = True
    accumulate: int = 1
    trips: int = 2
    window: int = 1
    silos: int = 1
    wire: Wire = "raw"


@dataclass(frozen=True, slots=True)
class Size:
    """What is trained on and generated: sequences of `length` tokens, padded ones of `padded_to`."""

    length: int
    padded_to: int
    new: int


def training_ways(*, silos: int, accumulate: int, window: int, wire: Wire) -> list[Way]:
    """From a dense mask with every step to Trunkline, in training."""
    ways = [Way("dense masks, padding, one client at a time", R0)]
    ways.append(replace(ways[-1], name="+ lengths instead of masks", label=R1, masked=False))
    ways.append(replace(ways[-1], name="+ packing", label="", padded=False))
    ways.append(replace(ways[-1], name=f"+ one commit for {accumulate} micro-batches", accumulate=accumulate))
    ways.append(replace(ways[-1], name=f"+ {window} micro-batches in flight", window=window))
    ways.append(replace(ways[-1], name=f"+ batching across {silos} silos", silos=silos))
    return [*ways, replace(ways[-1], name=f"+ wire {wire}", wire=wire)]


def generation_ways(*, silos: int, wire: Wire) -> list[Way]:
    """From the whole sequence for every token to Trunkline, in generation."""
    ways = [Way("no KV cache, dense masks, one client at a time", R0)]
    ways.append(replace(ways[-1], name="+ KV cache", label="", cached=True))
    ways.append(replace(ways[-1], name="+ lengths instead of masks", label=R1, masked=False))
    ways.append(replace(ways[-1], name="+ packing", label="", padded=False))
    ways.append(replace(ways[-1], name="+ one round trip a token", trips=1))
    ways.append(replace(ways[-1], name=f"+ batching across {silos} sessions", silos=silos))
    return [*ways, replace(ways[-1], name=f"+ wire {wire}", wire=wire)]


def measure(
    pace: str,
    cut: Partition,
    size: Size,
    *,
    training: Sequence[Way],
    generation: Sequence[Way],
    rtt_ms: float,
    mbit: float,
    seconds: float,
    progress: Progress,
) -> dict[str, Any]:
    """Every way of both tasks, measured for about `seconds` each."""
    paced = PACES[pace]
    batch = made_up([size.length], paced.hidden)
    trunk = Trunk(paced.card, cut.spans(paced.blocks)[1], "raw")
    with tempfile.TemporaryDirectory() as logs, Processes(Path(logs)) as processes:
        progress("starting broker, worker and relay")
        stack = Stack(processes, worker=("--pace", pace), rtt_ms=rtt_ms, mbit=mbit)
        rows: dict[str, list[dict[str, Any]]] = {}
        for task, ways in (("training", training), ("generation", generation)):
            rows[task] = []
            for number, way in enumerate(ways):
                progress(f"{task}, {number + 1} of {len(ways)}: {way.name}")
                here = replace(trunk, wire=way.wire)
                if task == "training":
                    silos = _training(here, paced, way, size, batch, f"run-{number}")
                else:
                    silos = _generation(here, paced, way, size, batch)
                rows[task].append(asdict(way) | _measured(stack, silos, seconds))
    return {task: compared(found) for task, found in rows.items()}


def compared(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rows, each with its gain over the one before, and how many times R0 and R1 the last one is."""
    rates = [row["tokens_per_s"] for row in rows]
    labelled = {row["label"]: row["tokens_per_s"] for row in rows}
    gains = [1.0, *(new / old for old, new in pairwise(rates))]
    return {
        "rows": [row | {"gain": gain} for row, gain in zip(rows, gains, strict=True)],
        "times_r0": rates[-1] / labelled[R0],
        "times_r1": rates[-1] / labelled[R1],
    }


def _measured(stack: Stack, silos: Sequence[Replay], seconds: float) -> dict[str, Any]:
    served, found = one_round(stack, silos, seconds)
    told = ("tokens_per_s", "bytes_per_token", "trunk_busy")
    return {name: found[name] for name in told} | {"latency_ms": latencies_ms(served.waits)}


def _training(
    trunk: Trunk, paced: PacedModel, way: Way, size: Size, batch: Recorded, run: str
) -> list[Replay]:
    if way.padded:
        padded = made_up([size.padded_to], paced.hidden)
        replayed = replace(_encoded(padded, way.wire), useful=size.length)
    else:
        replayed = _encoded(batch, way.wire)
    how = {"window": way.window, "accumulate": way.accumulate}
    if way.masked:
        mask = _mask(size.padded_to, size.padded_to)
        return [MaskedTraining(trunk, run, way.silos, [replayed], mask=mask, **how) for _ in range(way.silos)]
    return [Training(trunk, run, way.silos, [replayed], **how) for _ in range(way.silos)]


def _generation(trunk: Trunk, paced: PacedModel, way: Way, size: Size, batch: Recorded) -> list[Replay]:
    sent = made_up([size.padded_to], paced.hidden).sent if way.padded else batch.sent
    prompt, token = (_encoded(Recorded((len(part),), part, part), way.wire).sent for part in (sent, sent[:1]))
    masks = _mask(size.padded_to, size.padded_to), _mask(1, size.padded_to)
    return [
        PublishedGeneration(
            trunk,
            prompt,
            token,
            size.new,
            cached=way.cached,
            masks=masks if way.masked else None,
            trips=way.trips,
        )
        for _ in range(way.silos)
    ]


def _encoded(batch: Recorded, wire: Wire) -> Replayed:
    if wire != "raw":
        return batch.encoded(wire)
    return Recorded(batch.lengths, batch.sent.half(), batch.gradient.half()).encoded("raw")


def _mask(queries: int, keys: int) -> Crossing:
    """A dense causal mask in fp16, as additive masks are."""
    later = torch.ones(queries, keys, dtype=torch.bool).triu(1)
    mask = torch.zeros(queries, keys, dtype=torch.float16).masked_fill(later, -65504.0)
    return crossing(mask, "raw")
