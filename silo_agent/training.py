"""One silo's part of a run, from open to saved adapter."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from torch import Tensor

from codec.errors import ProtocolError
from codec.messages import Adapter, CloseRun, GetAdapter, Opened, OpenRun
from codec.plan import RunPlan
from silo_agent.adapters import SavedAdapter
from silo_agent.microbatch import Example, batches
from silo_agent.options import Silo
from silo_agent.trainer import StepReport, Trainer


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """How this silo takes part: sequences in a micro-batch, micro-batches in a step and in flight (None:
    tuned)."""

    run: str
    batch: int
    accumulate: int
    window: int | None
    patience: float


def train(
    silo: Silo,
    plan: RunPlan,
    settings: TrainSettings,
    examples: Sequence[Example],
    resume: SavedAdapter | None,
    on_step: Callable[[StepReport], None],
) -> dict[str, Tensor]:
    """Take part in a run to its end; the whole model's adapter, by global name.

    Raises any `TrunklineError`; nothing was written then.
    """
    ends, remote, options = silo.ends, silo.remote, silo.options
    ends.adapt(plan.lora, plan.seed, resume.tensors if resume else None)
    trunk = resume.within(ends.trunk) if resume else {}
    opened = remote.open(
        OpenRun(
            run=settings.run,
            model=ends.card,
            start=ends.trunk.start,
            stop=ends.trunk.stop,
            plan=plan,
            encodings=silo.wires.needed(),
            names=tuple(trunk),
        ),
        list(trunk.values()),
        wait=options.wait,
    ).header
    if not isinstance(opened, Opened):
        raise ProtocolError("the worker answered an open with something else", side="worker")
    trainer = Trainer(
        ends,
        remote,
        run=settings.run,
        plan=plan,
        noise=silo.noise,
        wires=silo.wires,
        window=settings.window,
        patience=settings.patience,
        step=opened.step,
    )
    source = batches(examples, settings.batch, plan.seed)
    following = list(islice(source, settings.accumulate))
    for number in range(opened.step, plan.steps):
        present = following
        following = list(islice(source, settings.accumulate)) if number + 1 < plan.steps else []
        on_step(trainer.step(present, following))
    arrival = remote.call(GetAdapter(run=settings.run))
    if not isinstance(arrival.header, Adapter):
        raise ProtocolError("the worker answered with something other than an adapter", side="worker")
    received = dict(zip(arrival.header.names, arrival.tensors, strict=True))
    remote.call(CloseRun(run=settings.run))
    return {**ends.adapter(), **received}
