"""One silo's part of a run, from open to saved adapter."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from torch import Tensor

from codec.messages import OpenRun
from codec.plan import RunPlan
from silo_agent.adapters import SavedAdapter
from silo_agent.microbatch import Example, Steps
from silo_agent.options import Silo
from silo_agent.remote_run import RemoteRun
from silo_agent.snapshot import Snapshot, Standing, remove_snapshot, write_snapshot
from silo_agent.trainer import StepReport, Tensors, Trainer


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """How this silo takes part: sequences in a micro-batch, micro-batches in a step and in flight (None:
    tuned). Where the run survives, it is kept at `out` until it is finished. `last` is the step to end
    before; the plan's end, if it is not within a budget."""

    run: str
    batch: int
    accumulate: int
    window: int | None
    patience: float
    out: Path
    freeze_head: bool
    last: int


Unfinished = tuple[Snapshot, Tensors]
Save = Callable[[dict[str, Tensor]], None]


def train(
    silo: Silo,
    plan: RunPlan,
    settings: TrainSettings,
    examples: Sequence[Example],
    resume: SavedAdapter | Unfinished | None,
    on_step: Callable[[StepReport], None],
    save: Save,
) -> int:
    """Take part in a run to its end, and `save` the whole model's adapter, by global name.

    Returns how many steps it has done, those before it was resumed included.

    Begins with an adapter, or goes on with an unfinished run, to `resume`. Raises any `TrunklineError`;
    nothing was saved then but what it takes to go on.
    """
    ends, terms = silo.ends, _terms(silo, plan, settings, examples)
    first = resume if isinstance(resume, SavedAdapter) else None
    ends.adapt(plan.lora, plan.seed, first.tensors if first else None)
    trunk = first.within(ends.trunk) if first else {}
    opening = OpenRun(
        run=settings.run,
        model=ends.card,
        start=ends.trunk.start,
        stop=ends.trunk.stop,
        plan=plan,
        encodings=silo.wires.needed(),
        names=tuple(trunk),
    )
    if isinstance(resume, tuple):
        snapshot = resume[0]
        snapshot.check(terms)
        opening = msgspec.structs.replace(opening, ticket=snapshot.ticket, seat=snapshot.seat)
    remote_run = RemoteRun(silo.remote, opening, list(trunk.values()), wait=silo.options.wait)
    home = remote_run.open()

    def keep(standing: Standing, tensors: Tensors) -> None:
        ticket, seat = remote_run.opening.ticket, remote_run.opening.seat
        write_snapshot(settings.out, Snapshot(ticket, seat, terms, standing), tensors)

    trainer = Trainer(
        ends,
        silo.remote,
        run=settings.run,
        plan=plan,
        noise=silo.noise,
        wires=silo.wires,
        window=settings.window,
        patience=settings.patience,
        step=home,
        rejoin=remote_run.rejoin if remote_run.survives else None,
        keep=keep,
        freeze_head=settings.freeze_head,
    )
    if isinstance(resume, tuple):
        trainer.stand(resume[0].standing, resume[1])
        trainer.settle(home)
    elif remote_run.survives:
        keep(*trainer.standing())
    steps = Steps(examples, settings.batch, settings.accumulate, plan.seed)
    while (number := trainer.step_number) < settings.last:
        report = trainer.step(steps[number], steps[number + 1] if number + 1 < settings.last else ())
        if report is not None:
            on_step(report)
    save({**ends.adapter(), **remote_run.adapter()})
    remove_snapshot(settings.out)
    remote_run.close()
    return trainer.step_number


def _terms(silo: Silo, plan: RunPlan, settings: TrainSettings, examples: Sequence[Example]) -> dict[str, str]:
    """Everything that a run must be gone on with as it was begun, by what it is called."""
    trunk = silo.ends.trunk
    data = hashlib.sha256(msgspec.json.encode(list(examples))).hexdigest()
    return {
        **{f"plan ({field})": str(getattr(plan, field)) for field in plan.__struct_fields__},
        "run name": settings.run,
        "model": silo.ends.card.fingerprint,
        "trunk": str(trunk),
        "dtype": str(silo.ends.head.dtype),
        "--batch": str(settings.batch),
        "--accumulate": str(settings.accumulate),
        "data": data[:16],
        "--freeze-head": str(settings.freeze_head),
        # Under the same secret, noise of another strength would give both away.
        "noise": str(silo.noise.scale),
    }
