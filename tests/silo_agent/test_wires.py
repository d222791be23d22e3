"""Which wire is picked: the one that is there first, of those that the other side reads."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from broker.speed import Speed
from codec.messages import ENCODINGS, Encodings, Extend, Result, TensorSpec
from codec.tensors import encode_tensor
from silo_agent.wires import CANDIDATES, NEEDS, Cost, Wires, choose

COSTS = {
    "raw": Cost(1e-5, 1e-10, 0, 4.0),
    "bf16": Cost(2e-5, 5e-10, 0, 1.4),
    "steps": Cost(1e-4, 2e-9, 0, 0.75),
}
NUMBERS = st.floats(0, 1e3)


@pytest.mark.parametrize(
    ("rate", "elements", "wire"),
    [
        (1.25e6, 576, "steps"),
        (1.25e6, 1 << 20, "steps"),
        (125e6, 1 << 20, "steps"),
        (125e6, 576, "raw"),
        (1.25e9, 576, "raw"),
        (1e12, 1 << 20, "raw"),
    ],
)
def test_bits_count_on_a_slow_link_and_time_on_a_fast_one(rate: float, elements: int, wire: str) -> None:
    pick = choose(COSTS, elements, rate)
    assert pick.wire == wire
    assert pick.seconds[pick.wire] == min(pick.seconds.values())


@given(
    st.dictionaries(
        st.sampled_from(CANDIDATES), st.builds(Cost, NUMBERS, NUMBERS, NUMBERS, NUMBERS), min_size=1
    ),
    st.integers(0, 1 << 24),
    st.floats(1, 1e12),
)
def test_nothing_is_picked_that_another_would_beat(
    costs: dict[str, Cost], elements: int, rate: float
) -> None:
    pick = choose(costs, elements, rate)  # type: ignore[arg-type]
    assert all(cost.seconds(elements, rate) >= pick.seconds[pick.wire] for cost in costs.values())
    if "raw" in costs:
        assert pick.seconds[pick.wire] <= costs["raw"].seconds(elements, rate)


@pytest.mark.parametrize("wire", NEEDS)
def test_a_wire_uses_the_encodings_it_needs_and_no_others(wire: str) -> None:
    for tensor in (
        torch.randn(3, 8),
        torch.randn(100, 100) * 1e-3,
        torch.zeros(0, 4),
        torch.randn(()),
        1e4 * torch.randn(70, 64),
    ):
        for step in (0.0, 1e-5, 1.0):
            spec, _ = encode_tensor(tensor, wire, "test", step=step)  # type: ignore[arg-type]
            assert spec.encoding in NEEDS[wire]  # type: ignore[index]
    assert set(NEEDS[wire]) <= set(ENCODINGS)  # type: ignore[index]


def test_a_wire_that_is_asked_for_is_used() -> None:
    wires = Wires("q6", speed=lambda: Speed(0.1, 1e12))
    assert wires.pick("trunk → tail", 10, 64) == "q6"
    assert (wires.summary(), wires.report(), wires.needed()) == ("q6", {}, NEEDS["q6"])


def test_auto_quantises_on_a_slow_link_and_says_so() -> None:
    wires = Wires("auto", speed=lambda: Speed(0.05, 1.25e5), noise=0.05)
    assert wires.needed() == ("raw", "planes", "steps")
    for boundary in ("head → trunk", "trunk → tail", "tail → trunk (gradient)"):
        assert wires.pick(boundary, 256, 64) == "steps"
    assert wires.summary() == "steps"
    report = wires.report()["trunk → tail"]
    assert (report["wire"], report["link_mbit_per_s"]) == ("steps", 1.0)
    assert set(report["expected_ms"]) == set(CANDIDATES)


def test_auto_sends_the_bytes_as_they_are_where_the_link_costs_nothing() -> None:
    wires = Wires("auto", speed=lambda: Speed(1e-5, 1e15))
    assert wires.pick("head → trunk", 1, 64) == "raw"
    assert wires.summary() == "raw"


def test_auto_keeps_to_what_workers_read() -> None:
    wires = Wires("auto", speed=lambda: Speed(0.05, 1e5), encodings=lambda: ("raw", "planes"))
    assert wires.pick("head → trunk", 256, 64) == "bf16"
    for few in (("raw",), ()):
        wires = Wires("auto", speed=lambda: Speed(0.05, 1e5), encodings=lambda few=few: few)
        assert wires.pick("head → trunk", 256, 64) == "raw"


def test_auto_keeps_to_what_it_told_the_broker() -> None:
    """A worker was chosen by it; that another, older one leaves or a newer one comes changes nothing."""
    reads: list[Encodings] = [("raw", "planes"), ENCODINGS]
    wires = Wires("auto", speed=lambda: Speed(0.05, 1e5), encodings=lambda: reads.pop(0))
    assert wires.needed() == ("raw", "planes")
    assert wires.pick("head → trunk", 256, 64) == "bf16"


def test_boundaries_that_differ_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Wires, "costs", lambda *_: COSTS)  # Measured ones are as near as the machine is busy.
    speeds = iter([Speed(0.05, 1e5), Speed(1e-5, 1e15)])
    wires = Wires("auto", speed=lambda: next(speeds))
    wires.pick("head → trunk", 256, 64)
    wires.pick("trunk → tail", 1, 64)
    assert wires.summary() == "head → trunk steps, trunk → tail raw"


def test_a_session_picks_for_both_directions(new_pool: object) -> None:
    with new_pool() as pool:  # type: ignore[operator]
        pool.start_worker()
        wires = Wires("auto", speed=lambda: Speed(0.05, 1e5))
        with pool.session(wires=wires) as session:
            session.extend([0], [list(range(3, 50))])
        sent: list[TensorSpec] = [
            s for kind in (Extend, Result) for p in pool.sent(kind) for s in p.header.tensors
        ]
        assert {spec.encoding for spec in sent} == {"steps"}
        assert set(wires.report()) == {"head → trunk", "trunk → tail"}
