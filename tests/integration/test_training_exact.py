"""Split training equals plain transformers + PEFT training of the whole model, step by step.

The real trunk service, router and trainer; only the sockets are left out (test_parity.py has them).
"""

import secrets
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.parity import TrainParity, compare_training
from broker.memory import MemoryBroker
from codec.messages import Attach
from codec.partition import Partition
from codec.partition import Span as Blocks
from codec.plan import LoraPlan, RunPlan
from silo_agent.microbatch import Example
from silo_agent.remote import silo_attach
from workers.checkpoint import Checkpoint
from workers.families import FAMILIES, lora_targets
from workers.serve import serve
from workers.service import TrunkService
from workers.span import Span

STEPS = 10
Train = Callable[..., TrainParity]


@pytest.fixture
def broker_with_worker() -> Iterator[Callable[[Checkpoint], MemoryBroker]]:
    """Starts a worker thread that hosts every block of a model; ended with the test."""
    stop, threads = threading.Event(), []

    def start(checkpoint: Checkpoint) -> MemoryBroker:
        broker = MemoryBroker()
        blocks = range(checkpoint.blocks)
        card = checkpoint.card(blocks)
        span = Span(checkpoint, Blocks(0, checkpoint.blocks))
        attach = Attach(
            role="worker", name="w", peer=secrets.token_bytes(16), model=card, start=0, stop=checkpoint.blocks
        )
        link = broker.link(attach)
        thread = threading.Thread(target=serve, args=(link, TrunkService(span, card, 1 << 28), stop))
        thread.start()
        threads.append(thread)
        return broker

    yield start
    stop.set()
    for thread in threads:
        thread.join(10)


@pytest.fixture
def train(broker_with_worker: Callable[[Checkpoint], MemoryBroker]) -> Train:
    def run(checkpoint: Checkpoint, partition: Partition, plan: RunPlan) -> TrainParity:
        broker = broker_with_worker(checkpoint)
        vocabulary = checkpoint.config.vocab_size
        draw = torch.Generator().manual_seed(7)

        def example() -> Example:
            length = int(torch.randint(4, 19, (), generator=draw))
            ids = torch.randint(3, vocabulary, (length,), generator=draw).tolist()
            return Example(tuple(ids), tuple(t > length // 3 for t in range(length)))

        batches = [
            [[[example() for _ in range(2)] for _ in range(3)] for _ in range(plan.silos)]
            for _ in range(plan.steps)
        ]
        return compare_training(
            checkpoint, partition, lambda name: broker.link(silo_attach(name)), plan, batches
        )

    return run


def plan(checkpoint: Checkpoint, targets: str, **fields: object) -> RunPlan:
    lora = LoraPlan(rank=4, alpha=8.0, targets=lora_targets(checkpoint.config, targets))
    settings = {"steps": STEPS, "learning_rate": 1e-3, "warmup_steps": 3, "clip_norm": 0.05} | fields
    return RunPlan(lora=lora, weight_decay=0.01, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("targets", ["attention", "all"])
@pytest.mark.parametrize(("silos", "ends"), [(1, "own"), (2, "shared"), (2, "own")])
def test_ten_steps_equal_plain_training(
    tiny_model: Callable[[str], Any], train: Train, silos: int, ends: str, targets: str, schedule: str
) -> None:
    checkpoint = tiny_model("llama").checkpoint
    parity = train(
        checkpoint,
        Partition(1, 1),
        plan(checkpoint, targets, silos=silos, ends=ends, schedule=schedule),
    )
    assert parity.loss < 1e-5
    assert parity.adapter < 1e-5
    assert parity.last_loss != pytest.approx(parity.first_loss, abs=1e-4), "nothing was trained"


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_trains_exactly(tiny_model: Callable[[str], Any], train: Train, family: str) -> None:
    checkpoint = tiny_model(family).checkpoint
    parity = train(checkpoint, Partition(1, 2), plan(checkpoint, "all", silos=2, ends="own"))
    assert parity.loss < 1e-5
    assert parity.adapter < 1e-5


@pytest.mark.parametrize(("head", "tail"), [(0, 0), (0, 3), (3, 0), (2, 1)])
def test_partitions_at_the_edge_train_exactly(
    tiny_model: Callable[[str], Any], train: Train, head: int, tail: int
) -> None:
    checkpoint = tiny_model("llama").checkpoint
    parity = train(checkpoint, Partition(head, tail), plan(checkpoint, "attention", silos=2, ends="shared"))
    assert parity.loss < 1e-5
    assert parity.adapter < 1e-5


def test_clipping_takes_part_in_these_comparisons(tiny_model: Callable[[str], Any], train: Train) -> None:
    checkpoint = tiny_model("llama").checkpoint
    clipped, free = (
        train(checkpoint, Partition(1, 1), plan(checkpoint, "attention", clip_norm=bound))
        for bound in (0.05, 0)
    )
    assert abs(clipped.last_loss - free.last_loss) > 1e-4
