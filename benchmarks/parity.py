"""Is the split model the whole model? Tokens, logits, losses and adapters, side by side.

Broker and worker are real processes, the silos are threads here with links of their own; the
reference is plain transformers and PEFT (`benchmarks.reference`).
"""

import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.reference import Reference, greedy, padded_logits, whole_model
from broker.link import Link, ZmqLink
from codec.messages import Adapter, CloseRun, GetAdapter, OpenRun
from codec.partition import Partition
from codec.plan import RunPlan
from silo_agent.ends import Ends
from silo_agent.microbatch import Example, pack_examples
from silo_agent.noise import Noise, NoiseScale
from silo_agent.processes import Processes
from silo_agent.remote import Remote, silo_attach
from silo_agent.session import Session
from silo_agent.trainer import Trainer
from workers.checkpoint import Checkpoint

Connect = Callable[[str], Link]
"""Makes a silo's link, given the silo's name."""

_NO_NOISE = NoiseScale()


@dataclass(frozen=True, slots=True)
class GenerationParity:
    """Greedy tokens, and largest logit differences: of whole sequences in one packed pass, of the
    decode steps, and, for scale, of transformers' decode steps from its own pass over the whole.
    """

    equal: bool
    logits: float
    decode_logits: float
    reference_floor: float


@dataclass(frozen=True, slots=True)
class TrainParity:
    """Largest differences between split and reference training."""

    loss: float
    adapter: float
    first_loss: float
    last_loss: float


def compare_generation(
    checkpoint: Checkpoint,
    partition: Partition,
    connect: Connect,
    prompts: Sequence[Sequence[int]],
    new: int,
) -> GenerationParity:
    """Decode `new` tokens after each prompt, split and whole, and compare.

    The split model decodes all prompts in one batch with KV caches and scores whole sequences in
    one packed pass; the whole model generates each alone and scores them in one padded batch.
    """
    model = whole_model(checkpoint.ref)
    generated = [greedy(model, prompt, new) for prompt in prompts]
    sequences = [[*prompt, *tokens] for prompt, (tokens, _) in zip(prompts, generated, strict=True)]
    padded = padded_logits(model, sequences)
    remote = Remote(connect("parity"))
    capacity = max(len(prompt) for prompt in prompts) + new
    try:
        ends = Ends(checkpoint, partition)
        with Session(
            ends, remote, rows=len(prompts), capacity=capacity, noise=Noise(_NO_NOISE), wait=60
        ) as session:
            made, stepwise = _decode(session, prompts, new)
            everything = torch.arange(sum(len(sequence) for sequence in sequences))
            rows = range(len(prompts))
            packed = session.extend(rows, sequences, starts=[0] * len(prompts), keep=everything)
    finally:
        remote.close()
    theirs = [logits for _, logits in generated]
    rest = [logits[len(prompt) - 1 : -1] for prompt, logits in zip(prompts, padded, strict=True)]
    return GenerationParity(
        equal=made == [tokens for tokens, _ in generated],
        logits=_worst([packed], [torch.cat(padded)]),
        decode_logits=_worst(stepwise, theirs),
        reference_floor=_worst(theirs, rest),
    )


def _worst(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def _decode(
    session: Session, prompts: Sequence[Sequence[int]], new: int
) -> tuple[list[list[int]], list[Tensor]]:
    rows = range(len(prompts))
    made: list[list[int]] = [[] for _ in rows]
    logits = [session.extend(rows, prompts)]
    for _ in range(new):
        chosen = logits[-1].argmax(-1).tolist()
        for row in rows:
            made[row].append(chosen[row])
        if len(made[0]) < new:
            logits.append(session.extend(rows, [[token] for token in chosen]))
    return made, [torch.stack([step[row] for step in logits]) for row in rows]


def compare_training(
    checkpoint: Checkpoint,
    partition: Partition,
    connect: Connect,
    plan: RunPlan,
    batches: Sequence[Sequence[Sequence[Sequence[Example]]]],
) -> TrainParity:
    """Train split and whole on `batches[step][silo][micro-batch]`; the differences."""
    silos = range(plan.silos)
    # Models are built on this thread: building one is not thread-safe in the libraries we use.
    every = [Ends(checkpoint, partition) for _ in silos]
    for ends in every:
        ends.adapt(plan.lora, plan.seed)
    remotes = [Remote(connect(f"silo{silo}")) for silo in silos]
    try:
        with ThreadPoolExecutor(plan.silos) as pool:
            parts = [[step[silo] for step in batches] for silo in silos]
            ours = list(pool.map(_train_silo, every, remotes, repeat(plan), parts))
    finally:
        for remote in remotes:
            remote.close()
    _, trunk, _ = partition.spans(checkpoint.blocks)
    reference = Reference(whole_model(checkpoint.ref), plan, ours[0].initial, range(trunk.start, trunk.stop))
    theirs = [reference.step([[e for micro in silo for e in micro] for silo in step]) for step in batches]
    loss = max(
        abs(ours[silo].losses[step] - theirs[step][silo])
        for step in range(len(batches))
        for silo in range(plan.silos)
    )
    adapter = max(
        float((ours[silo].adapter[name] - tensor).abs().max())
        for silo in range(plan.silos)
        for name, tensor in reference.adapter(silo).items()
    )
    return TrainParity(loss, adapter, ours[0].losses[0], ours[0].losses[-1])


@dataclass(frozen=True, slots=True)
class _Trained:
    losses: list[float]
    initial: dict[str, Tensor]
    adapter: dict[str, Tensor]


def _train_silo(
    ends: Ends, remote: Remote, plan: RunPlan, steps: Sequence[Sequence[Sequence[Example]]]
) -> _Trained:
    trunk = ends.trunk
    request = OpenRun(run="parity", model=ends.card, start=trunk.start, stop=trunk.stop, plan=plan)
    remote.open(request, [], wait=60)
    initial = {**_copy(ends.adapter()), **_trunk_adapter(remote)}
    trainer = Trainer(ends, remote, run="parity", plan=plan, noise=Noise(_NO_NOISE), patience=120)
    reports = [trainer.step([pack_examples(micro) for micro in step]) for step in steps]
    losses = [report.loss for report in reports if report is not None]
    final = {**_copy(ends.adapter()), **_trunk_adapter(remote)}
    remote.call(CloseRun(run="parity"))
    return _Trained(losses, initial, final)


def _trunk_adapter(remote: Remote) -> dict[str, Tensor]:
    arrival = remote.call(GetAdapter(run="parity"))
    assert isinstance(arrival.header, Adapter)
    return dict(zip(arrival.header.names, arrival.tensors, strict=True))


def _copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def measure(
    model: str, partition: Partition, plan: RunPlan, texts: Sequence[Sequence[int]], new: int
) -> dict[str, Any]:
    """Start broker and worker for `model`, compare, and return the benchmark's results."""
    checkpoint = Checkpoint(model)
    prompts = [list(text[: 5 + 9 * i]) for i, text in enumerate(texts[:3])]
    with tempfile.TemporaryDirectory() as logs, Processes(Path(logs)) as processes:
        broker = processes.broker()
        processes.start("worker", "worker", "--broker", broker, "--model", model, "--dtype", "fp32")

        def connect(name: str) -> Link:
            return ZmqLink(broker, silo_attach(name), patience=60)

        generated = compare_generation(checkpoint, partition, connect, prompts, new)
        trained = compare_training(checkpoint, partition, connect, plan, _batches(texts, plan))
    return {
        "greedy_equal": generated.equal,
        "greedy_tokens": new * len(prompts),
        "logits_max_abs_diff": generated.logits,
        "decode_logits_max_abs_diff": generated.decode_logits,
        "transformers_decode_floor": generated.reference_floor,
        "loss_max_abs_diff": trained.loss,
        "adapter_max_abs_diff": trained.adapter,
        "loss_first": trained.first_loss,
        "loss_last": trained.last_loss,
    }


def _batches(texts: Sequence[Sequence[int]], plan: RunPlan) -> list[list[list[list[Example]]]]:
    """Two micro-batches of two sequences a silo and step; the last two thirds of each are learned."""
    examples = [Example(tuple(t), tuple(i > len(t) // 3 for i in range(len(t)))) for t in texts]
    at = iter(range(plan.steps * plan.silos * 4))
    return [
        [
            [[examples[next(at) % len(examples)] for _ in range(2)] for _ in range(2)]
            for _ in range(plan.silos)
        ]
        for _ in range(plan.steps)
    ]
