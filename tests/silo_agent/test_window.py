"""The tuned window against the best fixed one, in a simulation of silos, their lines and one trunk."""

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silo_agent.window import LEAST, MOST, Window

FIXED = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 48)


@dataclass(frozen=True)
class Scene:
    """Seconds: a line's round trip; `wire` for one tensor on it; `silo` for head, tail and head's backward
    of one micro-batch; `trunk` for its forward and backward. Micro-batches differ by up to `spread`."""

    rtt: float = 0.001
    wire: float = 0.0
    silo: float = 0.06
    trunk: float = 0.06
    silos: int = 1
    batches: int = 48
    spread: float = 0.0
    fair: bool = True
    jitter: float = 0.0
    """Everything takes longer, by this share in the mean."""


@dataclass
class _Silo:
    window: Window
    scales: list[float]
    inbox: "deque[tuple[int, bool, float]]" = field(default_factory=deque)
    up: float = 0.0
    down: float = 0.0
    busy: bool = False
    todo: int = 0
    started: int = 0
    flights: int = 0
    most: int = 0
    served: float = 0.0


class Simulation:
    """Events in order of time; ties in the order in which they were made."""

    def __init__(self, scene: Scene, windows: Sequence[Window]) -> None:
        self.scene, self.now = scene, 0.0
        draw = random.Random(0)
        self.silos = [
            _Silo(window, [1 + scene.spread * draw.uniform(-1, 1) for _ in range(scene.batches)])
            for window in windows
        ]
        self._ticks = itertools.count()
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._queue: list[tuple[int, _Silo, int, bool]] = []
        self._trunk_busy = False
        self._delays = random.Random(1)

    def step(self) -> float:
        """Seconds of one step, from the broadcast of the last one's commit to the next."""
        begun = self.now
        for silo in self.silos:
            silo.todo, silo.most, silo.served = self.scene.batches, 0, 0.0
            self._after(self.scene.rtt / 2, self._idle, silo)
        while self._events:
            self.now, _, work, arguments = heapq.heappop(self._events)
            work(*arguments)
        self.now += self.scene.rtt / 2
        return self.now - begun

    def _after(self, seconds: float, work: Callable[..., None], *arguments: Any) -> None:
        if self.scene.jitter:
            seconds *= 1 + self._delays.expovariate(1 / self.scene.jitter)
        heapq.heappush(self._events, (self.now + seconds, next(self._ticks), work, arguments))

    def _scale(self, silo: _Silo, number: int) -> float:
        """The same sizes in every step, others in every silo."""
        return silo.scales[number % len(silo.scales)]

    def _idle(self, silo: _Silo) -> None:
        """What a trainer does: fill the window, else take what came first."""
        if silo.busy:
            return
        if silo.todo and silo.flights < silo.window.size:
            number = silo.started
            silo.todo, silo.flights, silo.started = silo.todo - 1, silo.flights + 1, number + 1
            silo.most = max(silo.most, silo.flights)
            silo.window.began(number, self.now)
            self._compute(silo, number, 0.2, self._send, False)
        elif silo.inbox:
            number, returning, seconds = silo.inbox.popleft()
            silo.window.answered(number, self.now, seconds)
            self._compute(silo, number, *((0.3, self._end) if returning else (0.5, self._send, True)))

    def _compute(
        self, silo: _Silo, number: int, share: float, then: Callable[..., None], *rest: bool
    ) -> None:
        silo.busy = True
        seconds = share * self.scene.silo * self._scale(silo, number)
        self._after(seconds, self._computed, silo, number, then, *rest)

    def _computed(self, silo: _Silo, number: int, then: Callable[..., None], *rest: bool) -> None:
        silo.busy = False
        then(silo, number, *rest)
        self._idle(silo)

    def _end(self, silo: _Silo, number: int) -> None:
        silo.flights -= 1
        silo.window.ended(number, self.now)
        if not silo.todo and not silo.flights:
            silo.window.committed()

    def _send(self, silo: _Silo, number: int, returning: bool) -> None:
        silo.window.sent(number, self.now)
        silo.up = max(silo.up, self.now) + self.scene.wire * self._scale(silo, number)
        self._after(silo.up + self.scene.rtt / 2 - self.now, self._queued, silo, number, returning)

    def _queued(self, silo: _Silo, number: int, returning: bool) -> None:
        self._queue.append((next(self._ticks), silo, number, returning))
        self._serve()

    def _serve(self) -> None:
        """Fair: the silo that had least of the trunk in this step; else in order of arrival."""
        if self._trunk_busy or not self._queue:
            return
        chosen = min(self._queue, key=lambda waiting: (waiting[1].served * self.scene.fair, waiting[0]))
        self._queue.remove(chosen)
        _, silo, number, returning = chosen
        share = 2 / 3 if returning else 1 / 3
        seconds = share * self.scene.trunk * self._scale(silo, number)
        silo.served += seconds
        self._trunk_busy = True
        self._after(seconds, self._served, silo, number, returning, seconds)

    def _served(self, silo: _Silo, number: int, returning: bool, seconds: float) -> None:
        self._trunk_busy = False
        silo.down = max(silo.down, self.now) + self.scene.wire * self._scale(silo, number)
        arrived = silo.down + self.scene.rtt / 2 - self.now
        self._after(arrived, self._arrived, silo, number, returning, seconds)
        self._serve()

    def _arrived(self, silo: _Silo, number: int, returning: bool, seconds: float) -> None:
        silo.inbox.append((number, returning, seconds))
        self._idle(silo)


@cache
def fixed(scene: Scene) -> dict[int, float]:
    """Micro-batches per second and silo with each fixed window."""
    rates = {}
    for size in FIXED:
        simulation = Simulation(scene, [Window(size) for _ in range(scene.silos)])
        simulation.step()
        rates[size] = scene.batches / simulation.step()
    return rates


def tuned(scene: Scene, simulation: Simulation, steps: int) -> tuple[float, float]:
    """Micro-batches per second and silo in the last step of `steps`, and the most in flight (mean)."""
    simulation.scene = scene
    seconds = [simulation.step() for _ in range(steps)][-1]
    return scene.batches / seconds, sum(silo.most for silo in simulation.silos) / scene.silos


def fresh(scene: Scene) -> Simulation:
    return Simulation(scene, [Window() for _ in range(scene.silos)])


def check(scene: Scene, rate: float, in_flight: float, *, enough: float = 0.95) -> None:
    rates = fixed(scene)
    best = max(rates.values())
    least = min(size for size in rates if rates[size] >= 0.95 * best)
    assert rate >= enough * best, (scene, rate / best, in_flight, least)
    assert in_flight <= 2 * max(least, LEAST) + 0.5, (scene, rate / best, in_flight, least)


@pytest.mark.parametrize("silos", [1, 2, 4, 8])
@pytest.mark.parametrize("rtt", [0.0005, 0.01, 0.05])
def test_it_is_as_fast_as_the_best_fixed_window_and_not_much_larger(rtt: float, silos: int) -> None:
    computing = ((0.02, 0.02), (0.02, 0.3), (0.06, 0.06), (0.3, 0.02), (0.3, 0.3))
    for (trunk, silo), wire in itertools.product(computing, (0.0, 0.05)):
        scene = Scene(rtt=rtt, wire=wire, silo=silo, trunk=trunk, silos=silos)
        check(scene, *tuned(scene, fresh(scene), 8))


@pytest.mark.parametrize("silos", [1, 4])
def test_micro_batches_of_different_sizes(silos: int) -> None:
    for rtt, trunk, silo in itertools.product((0.0005, 0.05), (0.02, 0.3), (0.06, 0.3)):
        scene = Scene(rtt=rtt, trunk=trunk, silo=silo, silos=silos, spread=0.5)
        check(scene, *tuned(scene, fresh(scene), 8), enough=0.93)


@pytest.mark.parametrize("silos", [1, 3])
def test_times_that_vary(silos: int) -> None:
    """Queues of chance ask for more than the least that is enough without them."""
    for rtt, trunk, silo in itertools.product((0.0005, 0.05), (0.02, 0.1), (0.02, 0.2)):
        scene = Scene(rtt=rtt, trunk=trunk, silo=silo, silos=silos, jitter=0.3)
        check(scene, *tuned(scene, fresh(scene), 8), enough=0.88)


@pytest.mark.parametrize("fair", [True, False])
def test_waiting_for_others_does_not_feed_the_window(fair: bool) -> None:
    """Were the trunk's queue taken for a long line, each silo's window would lengthen all others'."""
    scene = Scene(silo=0.02, trunk=0.1, silos=12, batches=24, fair=fair)
    simulation = fresh(scene)
    sizes = []
    for _ in range(16):
        simulation.step()
        sizes.append(max(silo.window.size for silo in simulation.silos))
    assert max(sizes[4:]) <= 2 * LEAST


def test_it_follows_a_line_that_gets_longer_and_shorter() -> None:
    near = Scene(rtt=0.001)
    far = replace(near, rtt=0.3)
    simulation = fresh(near)
    for scene in (near, far, near):
        check(scene, *tuned(scene, simulation, 10))


def test_it_follows_silos_that_come_and_go() -> None:
    alone = Scene(rtt=0.05, silo=0.02)
    among = replace(alone, silos=8)
    everyone = fresh(among)
    sizes = []
    for silos in (everyone.silos, everyone.silos[:1], everyone.silos):
        simulation = Simulation(replace(among, silos=len(silos)), [silo.window for silo in silos])
        tuned(simulation.scene, simulation, 10)
        sizes.append(simulation.silos[0].window.size)
    assert sizes[1] > sizes[0] == sizes[2]


def test_a_step_that_fits_the_window_teaches_nothing() -> None:
    scene = Scene(batches=2)
    simulation = fresh(scene)
    before = simulation.silos[0].window.size
    tuned(scene, simulation, 5)
    assert simulation.silos[0].window.size == before


def test_a_fixed_window_stays() -> None:
    scene = Scene(rtt=0.3)
    for size in (1, 7, 100):
        simulation = Simulation(scene, [Window(size)])
        simulation.step()
        assert simulation.silos[0].window.size == size


def test_what_a_broker_lets_wait_is_a_bound() -> None:
    scene = Scene(rtt=0.3, silo=0.01, trunk=0.01)
    window = Window()
    window.began(-1, 0.0)
    window.sent(-1, 0.0, 1 << 27)
    simulation = Simulation(scene, [window])
    tuned(scene, simulation, 4)
    assert window.size == 4


@given(
    st.lists(st.tuples(*[st.floats(0, 1e6)] * 6), min_size=1, max_size=60),
    st.integers(1, 9),
)
def test_whatever_it_is_told_it_stays_within_bounds(turns: list[tuple[float, ...]], every: int) -> None:
    """Clocks that stand still and answers that took less than the trunk says among them."""
    window, now = Window(), 0.0
    for number, (head, ahead, tail, back, end, seconds) in enumerate(turns):
        window.began(number, now)
        window.sent(number, now := now + head)
        window.answered(number, now := now + ahead, seconds)
        window.sent(number, now := now + tail)
        window.answered(number, now := now + back, seconds)
        window.ended(number, now := now + end)
        if number % every == 0:
            window.committed()
        assert LEAST <= window.size <= MOST
        assert not math.isnan(window.size)
