"""The training loop: micro-batches in flight, exact accumulation, and what the head needs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from codec.messages import Backward, Forward, Result
from codec.plan import RunPlan
from silo_agent.microbatch import MicroBatch

Batches = Callable[[int], list[MicroBatch]]
PLAN = RunPlan(steps=3, learning_rate=1e-2, clip_norm=0.1)


def trained(new_pool: Callable[[], Any], batches: list[MicroBatch], window: int) -> dict[str, Tensor]:
    with new_pool() as pool:
        pool.start_worker()
        trainer = pool.trainer(PLAN, window=window)
        for _ in range(PLAN.steps):
            trainer.step(batches)
        return {name: tensor.detach().clone() for name, tensor in trainer._ends.adapter().items()}


def joined(batches: list[MicroBatch]) -> MicroBatch:
    """All micro-batches as one."""
    offsets = torch.tensor([0, *(len(batch.ids) for batch in batches)]).cumsum(0)
    return MicroBatch(
        torch.cat([batch.ids for batch in batches]),
        tuple(length for batch in batches for length in batch.lengths),
        torch.cat([batch.keep + offset for batch, offset in zip(batches, offsets[:-1], strict=True)]),
        torch.cat([batch.targets for batch in batches]),
    )


def test_accumulation_over_micro_batches_is_exact(
    new_pool: Callable[[], Any], random_batches: Batches
) -> None:
    """Five micro-batches make the step that their union makes, however many are in flight."""
    batches = random_batches(5)
    union = trained(new_pool, [joined(batches)], window=1)
    for window in (1, 3, 8):
        parts = trained(new_pool, batches, window)
        assert parts.keys() == union.keys()
        assert max(float((parts[name] - union[name]).abs().max()) for name in union) < 1e-5
    assert any(float(tensor.abs().max()) > 0 for name, tensor in union.items() if "lora_B" in name)


@pytest.mark.parametrize("window", [1, 3])
def test_window_micro_batches_are_in_flight(bare_pool: Any, random_batches: Batches, window: int) -> None:
    """With a worker that does not answer yet, exactly `window` forwards have left the silo."""
    from threading import Thread

    bare_pool.start_worker()
    trainer = bare_pool.trainer(PLAN, window=window)
    most = 0
    start = trainer._start

    def counted(batch: MicroBatch) -> None:
        nonlocal most
        start(batch)
        most = max(most, len(trainer._flights))

    trainer._start = counted
    work = Thread(target=trainer.step, args=(random_batches(6),))
    work.start()
    work.join(60)
    assert not work.is_alive()
    assert most <= window
    if window > 1:
        assert most > 1, "nothing was pipelined"
    assert len(bare_pool.sent(Forward)) == len(bare_pool.sent(Backward)) == 6


def test_forwards_leave_before_the_first_answer_is_used(bare_pool: Any, random_batches: Batches) -> None:
    """The wire shows the overlap: a second forward is sent before the first backward."""
    bare_pool.start_worker()
    trainer = bare_pool.trainer(PLAN, window=4)
    trainer.step(random_batches(4))
    kinds = [type(p.header) for p in bare_pool.broker.passed if isinstance(p.header, Forward | Backward)]
    assert kinds.index(Backward) >= 2


def test_a_head_without_adapters_asks_for_no_gradient(
    bare_pool: Any, random_batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the embeddings alone in the head nothing there learns, and the last boundary stays empty."""
    bare_pool.start_worker()
    ends = type(bare_pool).ends
    monkeypatch.setattr(type(bare_pool), "ends", lambda self: ends(self, 0, 2))
    trainer = bare_pool.trainer(PLAN)
    trainer.step(random_batches(2))
    assert all(not parcel.header.wants_gradient for parcel in bare_pool.sent(Backward))
    results = bare_pool.sent(Result)
    assert sum(bool(parcel.tensors) for parcel in results) == sum(not p.tensors for p in results) == 2
