"""The training loop: micro-batches in flight, exact accumulation, and what the head needs."""

import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from broker.parcel import Parcel
from codec.messages import Backward, Forward, Result
from codec.plan import RunPlan
from silo_agent.microbatch import MicroBatch
from silo_agent.noise import Noise, NoiseScale
from silo_agent.trainer import Trainer
from silo_agent.window import Window

Batches = Callable[..., list[MicroBatch]]
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

    def counted(index: int, batch: MicroBatch) -> None:
        nonlocal most
        start(index, batch)
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


class Watched(Window):
    """Notes what the trainer tells it."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.events: list[tuple[str, int]] = []

    def began(self, number: int, now: float) -> None:
        super().began(number, now)
        self.events.append(("began", number))

    def answered(self, number: int, now: float, seconds: float) -> None:
        super().answered(number, now, seconds)
        self.events.append(("answered", number))

    def ended(self, number: int, now: float) -> None:
        super().ended(number, now)
        self.events.append(("ended", number))


def test_one_backward_makes_room_for_one_forward(bare_pool: Any, random_batches: Batches) -> None:
    """Filled first, then one forward for each backward, then drained; answers in the order they came."""
    bare_pool.start_worker()
    trainer = bare_pool.trainer(PLAN)
    trainer._window = watched = Watched(3)
    trainer.step(random_batches(9))
    kinds = [kind for kind, _ in watched.events]
    assert kinds[:3] == ["began"] * 3
    assert "began" not in kinds[-3 * 2 :]
    for at, kind in enumerate(kinds[3:], 3):
        if kind == "began":
            assert kinds[at - 1] == "ended"
    assert sum(a == "ended" and b == "began" for a, b in pairwise(kinds)) == 6
    came = [parcel.header.id for parcel in bare_pool.sent(Result) if not parcel.peer]
    numbers = {p.header.id: p.header.microbatch for p in bare_pool.broker.passed if is_boundary(p)}
    assert [number for kind, number in watched.events if kind == "answered"] == [numbers[i] for i in came]


def is_boundary(parcel: Parcel) -> bool:
    return isinstance(parcel.header, Forward | Backward)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_head_that_does_not_learn_begins_while_the_step_is_committed(
    new_pool: Callable[[], Any], random_batches: Batches, monkeypatch: pytest.MonkeyPatch, noise: float
) -> None:
    """What is sent is the same to the last bit, and each output is noised once; so what is learned is the
    same, but for rounding: which micro-batches share a pass is a matter of time."""
    steps = [random_batches(3, seed) for seed in range(PLAN.steps)]
    found = []
    for ahead in (False, True):
        with new_pool() as pool:
            pool.start_worker()
            ends = pool.ends(0, 2)
            monkeypatch.setattr(pool, "ends", lambda ends=ends: ends)
            trainer = pool.trainer(PLAN, noise=seeded(noise), window=2)
            early = prepared_before_the_answer(pool, trainer)
            for batches, following in zip(steps, [*steps[1:], []], strict=True):
                trainer.step(batches, following if ahead else ())
            assert len(early) == (2 * (PLAN.steps - 1) if ahead else 0)
            forwards = pool.sent(Forward)
            assert len(forwards) == len({p.header.microbatch for p in forwards}) == 9
            found.append(
                (
                    [bytes(frame) for parcel in forwards for frame in parcel.tensors],
                    {name: tensor.detach().clone() for name, tensor in trainer._ends.adapter().items()},
                )
            )
    (frames, adapter), (frames_ahead, adapter_ahead) = found
    assert frames == frames_ahead
    for name, tensor in adapter.items():
        torch.testing.assert_close(tensor, adapter_ahead[name], atol=1e-5, rtol=0)


def test_a_head_that_learns_does_not_begin_before_its_step(pool: Any, random_batches: Batches) -> None:
    trainer = pool.trainer(PLAN)
    early = prepared_before_the_answer(pool, trainer)
    trainer.step(random_batches(3), random_batches(3, 1))
    trainer.step(random_batches(3, 1))
    assert early == []


def test_what_was_prepared_for_other_batches_is_dropped(
    pool: Any, random_batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = type(pool).ends
    monkeypatch.setattr(type(pool), "ends", lambda self: ends(self, 0, 2))
    trainer = pool.trainer(PLAN)
    trainer.step(random_batches(2), random_batches(2, 1))
    trainer.step(random_batches(2, 2))
    expected = [batch.lengths for seed in (0, 2) for batch in random_batches(2, seed)]
    assert [parcel.header.lengths for parcel in pool.sent(Forward)] == expected


def seeded(relative: float) -> Noise:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Noise(NoiseScale(relative=relative), seed=3)


def prepared_before_the_answer(pool: Any, trainer: Trainer) -> list[MicroBatch]:
    """Fills with the micro-batches whose heads run between a commit and its answer."""
    prepare, early = trainer._prepare, []

    def noted(batch: MicroBatch, *place: int) -> Any:
        if not trainer._flights and trainer._remote._waiting:
            early.append(batch)
        return prepare(batch, *place)

    trainer._prepare = noted  # type: ignore[method-assign]
    return early


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
