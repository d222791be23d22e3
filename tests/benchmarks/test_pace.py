"""The timed GPU: its figures, and a span that takes its time, served by the real service."""

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.meter import Meter
from benchmarks.pace import PACES, Pace, Work
from benchmarks.paced_span import PacedSpan
from benchmarks.recording import crossing, made_up
from benchmarks.replay import Generation, Replay, Training, Trunk
from broker.parcel import Parcel
from codec.messages import Committed, Error, Result
from codec.partition import Span
from workers.kv import RowCache
from workers.parts import Part
from workers.service import TrunkService

pytestmark = pytest.mark.timeout(60)

H100 = PACES["llama-2-7b-h100"]
TINY = PACES["tiny"]


def test_a_pass_of_llama_on_an_h100_takes_what_its_data_sheet_says() -> None:
    whole = Span(0, 32)
    # 13 GB of weights at 3.35 TB/s, whatever is in the pass.
    assert H100.forward([Work(whole, 0)]) == pytest.approx(12.95e9 / 3.35e12, rel=0.01)
    # 6.5 billion weights, two operations each, at 40 % of 989 TFLOP/s.
    each = H100.forward([Work(whole, 1001)]) - H100.forward([Work(whole, 1)])
    assert each / 1000 == pytest.approx(2 * 6.476e9 / (0.4 * 989e12), rel=0.01)
    assert H100.backward([Work(whole, 512)]) == H100.forward([Work(whole, 512)])
    # 500 tokens of context are 262 MB of keys and values.
    read = H100.forward([Work(whole, 1, 500)]) - H100.forward([Work(whole, 1)])
    assert read == pytest.approx(500 * 2 * 32 * 4096 * 2 / 3.35e12, rel=0.01)


def test_weights_are_read_once_for_all_that_shares_a_pass() -> None:
    paced = replace(TINY, pace=Pace(fixed_s=1.0, forward_s=0.1, backward_s=0.2, kv_byte_s=0.0))
    both = [Work(Span(0, 3), 5), Work(Span(1, 4), 7)]
    assert paced.forward(both) == pytest.approx(4 * 1.0 + 3 * 5 * 0.1 + 3 * 7 * 0.1)
    assert paced.backward(both) == pytest.approx(4 * 1.0 + 3 * 5 * 0.2 + 3 * 7 * 0.2)
    assert paced.forward(both[:1]) + paced.forward(both[1:]) == pytest.approx(paced.forward(both) + 2 * 1.0)


def slow(fixed: float = 0.02) -> Any:
    return replace(TINY, pace=Pace(fixed_s=fixed / TINY.blocks, forward_s=0, backward_s=0, kv_byte_s=0))


def test_a_pass_takes_its_time_forward_and_backward_and_gives_back_what_came() -> None:
    meter = Meter()
    span = PacedSpan(slow(), meter)
    entry = torch.randn(3, TINY.hidden, requires_grad=True)
    begun = time.monotonic()
    output = span.run(entry, [3])
    forward = time.monotonic() - begun
    output.backward(torch.full_like(output, 2.0))
    assert forward >= 0.02
    assert time.monotonic() - begun >= forward + 0.02
    assert torch.equal(output, entry)
    assert entry.grad is not None
    assert torch.equal(entry.grad, torch.full_like(entry, 2.0))
    assert meter.counters() == pytest.approx({"busy": 0.04, "passes": 2, "tokens": 6})


def test_parts_share_one_pass_and_keep_their_caches() -> None:
    meter = Meter()
    span = PacedSpan(slow(), meter)
    cache = RowCache(span.kv_shape(), capacity=8)
    parts = [
        Part(torch.randn(3, TINY.hidden), (3,), Span(0, 4), caches=[cache]),
        Part(torch.randn(2, TINY.hidden, requires_grad=True), (1, 1), Span(1, 3)),
    ]
    first, second = span.run_parts(parts)
    assert cache.length == 3
    assert torch.equal(first, parts[0].packed)
    assert meter.counters() == pytest.approx({"busy": 0.02, "passes": 1, "tokens": 5})
    second.sum().backward()  # Only what has a gradient goes back: two blocks of four.
    assert meter.counters() == pytest.approx({"busy": 0.03, "passes": 2, "tokens": 7})


def test_a_paced_session_reserves_next_to_nothing() -> None:
    assert PacedSpan(H100, Meter()).kv_shape().bytes_for(64 * 4096) < 64 << 20


def served(handle: Any, service: TrunkService, replay: Replay, answers: int) -> list[Any]:
    """The answers' headers as one silo talks to the service, without a broker."""
    waiting, headers = [replay.opening().to(b"silo")], []
    while len(headers) < answers:
        results = handle(service, waiting)
        headers += [result.header for result in results]
        follow: list[Parcel] = []
        for result in results:
            assert not isinstance(result.header, Error), result.header
            follow += replay.answered(result.header)
        waiting = [parcel.to(b"silo") for parcel in follow]
    return headers


def test_the_real_service_trains_and_generates_on_a_paced_span(handle: Any) -> None:
    service = TrunkService(PacedSpan(TINY, Meter()), TINY.card, 1 << 20)
    trunk = Trunk(TINY.card, Span(1, 3), "raw")
    batch = made_up([3, 2], TINY.hidden).encoded("raw")
    training = Training(trunk, "run", 1, [batch], window=2, accumulate=3)
    headers = served(handle, service, training, 16)
    committed = [header for header in headers if isinstance(header, Committed)]
    assert [header.step for header in committed] == [0, 1]
    assert training.tokens == 2 * 3 * 5
    sent = made_up([4], TINY.hidden).sent
    generation = Generation(trunk, crossing(sent, "raw"), crossing(sent[:1], "raw"), 2)
    headers = served(handle, service, generation, 7)
    assert [len(header.tensors) for header in headers if isinstance(header, Result)] == [1] * 6
    assert generation.tokens == 4
