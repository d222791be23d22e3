"""How each boundary's tensors cross: as the user says, or, with `auto`, in whatever is there first.

`auto` weighs the time a tensor takes on the way, the link's rate being measured by the link, against
the time that encoding and decoding take, which is measured here when it is first needed.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from broker.speed import Speed
from codec.messages import ENCODINGS, Encodings, Wire
from codec.tensors import decode_tensors, encode_tensor

Choice = Wire | Literal["auto"]
Boundary = Literal["head → trunk", "trunk → tail", "tail → trunk (gradient)", "trunk → head (gradient)"]


def is_gradient(boundary: Boundary) -> bool:
    """Whether gradients cross this boundary, which are rounded without bias."""
    return "gradient" in boundary


CANDIDATES: tuple[Wire, ...] = ("raw", "bf16", "steps")
"""What `auto` chooses from: all that loses nothing a model notices (docs/codec.md)."""

NEEDS: Mapping[Wire, Encodings] = {
    "raw": ("raw",),
    "exact": ("raw", "planes"),
    "bf16": ("raw", "planes"),
    "fp16": ("raw", "planes"),
    "steps": ("raw", "planes", "steps"),
    **dict.fromkeys(("q8", "q7", "q6", "q5", "q4"), ("raw", "blocks")),
}
"""The encodings a wire may use."""

ASSUMED_RATE = 12.5e6
"""Bytes per second, 100 Mbit/s: until a large message was timed."""

_BESIDE_OTHERS = 2.0
"""Encoding takes about twice as long in use, beside other threads and with cold caches, as alone."""

_ROUNDS = 5
_LARGE_ROWS = 256


@dataclass(frozen=True, slots=True)
class Cost:
    """What a wire takes for a tensor of `n` elements, alone: seconds and bytes, `fixed + n * each`."""

    fixed_s: float
    each_s: float
    fixed_bytes: float
    each_bytes: float

    def bytes(self, elements: int) -> float:
        """What crosses."""
        return self.fixed_bytes + elements * self.each_bytes

    def seconds(self, elements: int, rate: float) -> float:
        """Encoding, `rate` bytes per second of link, and decoding."""
        return _BESIDE_OTHERS * (self.fixed_s + elements * self.each_s) + self.bytes(elements) / rate


@dataclass(frozen=True, slots=True)
class Pick:
    """A choice and the reason: the `rate` it was made for and what each candidate would take."""

    wire: Wire
    rate: float
    seconds: Mapping[Wire, float]


def choose(costs: Mapping[Wire, Cost], elements: int, rate: float) -> Pick:
    """The candidate that is there first. Pure; ties go to the earlier, simpler one."""
    seconds = {wire: cost.seconds(elements, rate) for wire, cost in costs.items()}
    return Pick(min(seconds, key=lambda wire: seconds[wire]), rate, seconds)


class Wires:
    """The wires of one silo's boundaries.

    `speed` tells the link's, `encodings` what the workers read; `noise` is the noise's deviation in
    units of the boundary's own, 0 if there is none or it is not known.
    """

    def __init__(
        self,
        wire: Choice = "exact",
        *,
        speed: Callable[[], Speed | None] = lambda: None,
        encodings: Callable[[], Encodings] = lambda: ENCODINGS,
        noise: float = 0.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._wire, self._speed, self._encodings, self._noise = wire, speed, encodings, noise
        self._dtype, self._device = dtype, torch.device(device)
        self._candidates: tuple[Wire, ...] = ()
        self._costs: dict[tuple[float, bool, int], dict[Wire, Cost]] = {}
        self.picks: dict[Boundary, Pick] = {}
        """What `auto` chose last, by boundary."""

    def needed(self) -> Encodings:
        """The encodings that a worker must read, whatever is picked from now on.

        With `auto`, what all workers read that are attached now: asked once, and kept to.
        """
        return tuple(e for e in ENCODINGS if any(e in NEEDS[wire] for wire in self._usable()))

    def _usable(self) -> tuple[Wire, ...]:
        if self._wire != "auto":
            return (self._wire,)
        if not self._candidates:
            readable = {"raw", *self._encodings()}  # Whatever a broker says, every peer reads raw.
            self._candidates = tuple(wire for wire in CANDIDATES if readable.issuperset(NEEDS[wire]))
        return self._candidates

    def pick(self, boundary: Boundary, tokens: int, hidden: int) -> Wire:
        """The wire for a tensor `[tokens, hidden]` that is about to cross `boundary`."""
        if self._wire != "auto":
            return self._wire
        costs, speed = self.costs(boundary, hidden), self._speed()
        pick = choose(costs, tokens * hidden, speed.rate if speed else ASSUMED_RATE)
        self.picks[boundary] = pick
        return pick.wire

    def summary(self) -> str:
        """The wire in use in few words; every boundary's, where they differ."""
        used = {
            boundary: self.picks[boundary].wire for boundary in get_args(Boundary) if boundary in self.picks
        }
        if len(set(used.values())) <= 1:
            return next(iter(used.values()), str(self._wire))
        return ", ".join(f"{boundary} {wire}" for boundary, wire in used.items())

    def report(self) -> dict[str, dict[str, object]]:
        """The last picks for a JSON file: by boundary, the wire, the rate in Mbit/s, milliseconds.

        The rate is None where the link was too fast to be measured.
        """
        return {
            boundary: {
                "wire": pick.wire,
                "link_mbit_per_s": round(pick.rate * 8e-6, 1) if math.isfinite(pick.rate) else None,
                "expected_ms": {wire: round(s * 1e3, 3) for wire, s in pick.seconds.items()},
            }
            for boundary, pick in self.picks.items()
        }

    def costs(self, boundary: Boundary, hidden: int) -> Mapping[Wire, Cost]:
        """What each wire that may be picked costs there, measured when it is first asked for."""
        noise, gradient = self._noise if boundary == "head → trunk" else 0.0, is_gradient(boundary)
        key = noise, gradient, hidden
        if key not in self._costs:
            few, many = (
                torch.randn(rows, hidden, dtype=self._dtype, device=self._device) for rows in (1, _LARGE_ROWS)
            )
            self._costs[key] = {wire: _cost(few, many, wire, noise, gradient) for wire in self._usable()}
        return self._costs[key]


def _cost(few: Tensor, many: Tensor, wire: Wire, step: float, stochastic: bool) -> Cost:
    """The line through a small and a large tensor."""
    (small_s, small_b), (large_s, large_b) = (_timed(t, wire, step, stochastic) for t in (few, many))
    span = many.numel() - few.numel()
    each_s, each_b = max(0.0, large_s - small_s) / span, (large_b - small_b) / span
    return Cost(
        fixed_s=max(0.0, small_s - few.numel() * each_s),
        each_s=each_s,
        fixed_bytes=small_b - few.numel() * each_b,
        each_bytes=each_b,
    )


def _timed(tensor: Tensor, wire: Wire, step: float, stochastic: bool) -> tuple[float, int]:
    """Seconds to encode and decode, the least of some rounds, and bytes."""
    best, size = math.inf, 0
    for _ in range(_ROUNDS):
        begun = time.perf_counter()
        spec, frame = encode_tensor(tensor, wire, "measuring", step=step, stochastic=stochastic)
        decode_tensors([spec], [frame], boundary="measuring", device=tensor.device)
        best, size = min(best, time.perf_counter() - begun), len(frame)
    return best, size
