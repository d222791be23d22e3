"""The messages of a hostile silo: right ones that lead somewhere, and the same in every wrong way.

Damage is that of the decoders' fuzzer (tests/codec/fuzzing), but what is damaged is part of a
conversation: names that are open, numbers that are new, positions that fit. So it gets past the decoder.
"""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any, get_args

import msgspec
import torch
from fuzzing.examples import example
from fuzzing.message import Message
from fuzzing.mutators import damage

from codec.limits import MAX_HEADER_BYTES, MAX_TENSORS
from codec.messages import (
    AnyHeader,
    Attach,
    Backward,
    CloseRun,
    CloseSession,
    Commit,
    Extend,
    Forward,
    GetAdapter,
    Heartbeat,
    Leave,
    OpenRun,
    OpenSession,
    TensorSpec,
    encode_header,
    kind_of,
)
from codec.plan import LoraPlan, ModelCard, RunPlan
from codec.tensors import encode_tensor

Frames = Sequence[bytes]
KINDS: tuple[Any, ...] = get_args(AnyHeader)
LORA = LoraPlan(rank=2, targets=("q_proj",))
_MOST_TOKENS = 4
_WIRES: tuple[Any, ...] = ("raw", "exact", "bf16", "steps", "q8")


class Tensors:
    """Right tensors `[tokens, hidden]` for the boundary, as they cross."""

    def __init__(self, hidden: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._made: dict[int, list[tuple[TensorSpec, bytes]]] = {}
        for tokens in range(1, 2 * _MOST_TOKENS + 1):
            value = torch.randn(tokens, hidden, generator=generator)
            made = [encode_tensor(value, wire, "siege", **self._step(wire)) for wire in _WIRES]
            self._made[tokens] = [(spec, bytes(frame)) for spec, frame in made]

    @staticmethod
    def _step(wire: str) -> dict[str, float]:
        return {"step": 0.05} if wire == "steps" else {}

    def draw(self, rng: Random, tokens: int) -> tuple[TensorSpec, bytes]:
        """One of so many tokens."""
        return rng.choice(self._made[tokens])


class Arsenal:
    """What one hostile silo throws, the same for the same generator whatever is answered."""

    def __init__(self, rng: Random, card: ModelCard, tensors: Tensors, others: Sequence[str]) -> None:
        """`others` are names that are other silos'."""
        self._rng, self._card, self._tensors = rng, card, tensors
        self._names = [*"aaaaabc", *others]
        self._number = 0
        self._length: dict[str, int] = {}
        self._step: dict[str, int] = {}
        self._thrown: list[Frames] = []
        self._ways: list[tuple[Callable[[], Frames], int]] = [
            (self._right, 40),
            (self._damaged, 35),
            (self._strange, 10),
            (self._again, 8),
            (self._special, 3),
        ]

    def attach(self, **fields: Any) -> Frames:
        """An introduction under a new identity."""
        peer = self._rng.randbytes(16)
        return [b"", encode_header(Attach(role="silo", name="hostile", peer=peer, **fields))]

    def throw(self) -> Frames:
        """The next message."""
        ways = [way for way, _ in self._ways]
        weights = [weight for _, weight in self._ways]
        (way,) = self._rng.choices(ways, weights)
        frames = way()
        if len(self._thrown) < 200:
            self._thrown.append(frames)
        return frames

    def flood(self) -> Frames:
        """One of many that cost the trunk something."""
        return self._frames(*self._extend())

    def _right(self) -> Frames:
        header, frames = self._rng.choice(_CONVERSATION)(self)
        return self._frames(header, frames)

    def _damaged(self) -> Frames:
        one, other = (self._message(*self._rng.choice(_CONVERSATION)(self)) for _ in range(2))
        return damage(self._rng, one, other).frames

    def _strange(self) -> Frames:
        """Any kind, most of them not a silo's to send."""
        header = example(self._rng.choice(KINDS), self._rng, tensors=())
        return [self._rng.randbytes(self._rng.choice((0, 8, 16))), encode_header(header)]

    def _again(self) -> Frames:
        """The same bytes a second time."""
        return self._rng.choice(self._thrown) if self._thrown else self._right()

    def _special(self) -> Frames:
        rng = self._rng
        header, frames = self._extend()
        match rng.randrange(9):
            case 0:  # No header, no peer, or more frames than any message has.
                return [b""] * rng.choice((1, MAX_TENSORS + 3))
            case 1:
                return [b"", b"\x03" + bytes(rng.choice((MAX_HEADER_BYTES - 1, MAX_HEADER_BYTES)))]
            case 2:  # 4 TB, so it says.
                spec = TensorSpec("f32", (1 << 20, 1 << 20), "raw", (1 << 42,))
                return self._frames(msgspec.structs.replace(header, tensors=(spec,)), frames)
            case 3:  # Heavy, and refused for what it is.
                return self._frames(header, [bytes(4 << 20)])
            case 4:
                return self._frames(msgspec.structs.replace(header, id=rng.choice((0, 1, 1 << 62))), frames)
            case 5:
                return [rng.randbytes(rng.choice((8, 64, 65, 4096))), encode_header(header), *frames]
            case 6:
                return self.attach(encodings=rng.choice((("raw",), ("raw", "planes"))))
            case 7:
                return self.attach(id=rng.randrange(9))
            case _:
                return self._frames(Leave() if rng.random() < 0.1 else Heartbeat(id=rng.randrange(9)), [])

    def _frames(self, header: AnyHeader, frames: Sequence[bytes]) -> Frames:
        return [b"", encode_header(header), *frames]

    def _message(self, header: AnyHeader, frames: Sequence[bytes]) -> Message:
        return Message(kind_of(header), tuple(self._frames(header, frames)))

    # --- a conversation ------------------------------------------------------------------------------

    def _id(self) -> int:
        self._number += 1
        return self._number

    def _blocks(self) -> dict[str, int]:
        return self._rng.choice([{"start": 1, "stop": 4}, {"start": 1, "stop": 4}, {"start": 2, "stop": 3}])

    def _open_session(self) -> tuple[AnyHeader, Frames]:
        name, rng = self._rng.choice(self._names), self._rng
        self._length[name] = 0
        fields = {"rows": 1, "capacity": rng.choice((8, 16, 64)), "replays": rng.random() < 0.5}
        return OpenSession(id=self._id(), session=name, model=self._card, **self._blocks(), **fields), []

    def _extend(self) -> tuple[AnyHeader, Frames]:
        name, rng = self._rng.choice(self._names), self._rng
        tokens = rng.choice((1, 1, 1, _MOST_TOKENS))
        start = self._length.get(name, 0) * (rng.random() < 0.9)
        self._length[name] = (start + tokens) % 8
        spec, frame = self._tensors.draw(rng, tokens)
        fields = {"rows": (0,), "starts": (start,), "lengths": (tokens,), "wire": rng.choice(_WIRES)}
        return Extend(id=self._id(), tensors=(spec,), session=name, **fields), [frame]

    def _close_session(self) -> tuple[AnyHeader, Frames]:
        return CloseSession(id=self._id(), session=self._rng.choice(self._names)), []

    def _open_run(self) -> tuple[AnyHeader, Frames]:
        name, rng = self._rng.choice(self._names), self._rng
        self._step[name] = 0
        members = rng.choice(((), (), ("hostile",), ("north",)))
        plan = RunPlan(lora=LORA, steps=rng.choice((1, 1000)), members=members)
        return OpenRun(id=self._id(), run=name, model=self._card, plan=plan, **self._blocks()), []

    def _forward(self) -> tuple[AnyHeader, Frames]:
        rng = self._rng
        spec, frame = self._tensors.draw(rng, 2)
        fields = {"microbatch": rng.randrange(3), "lengths": (2,), "wire": rng.choice(_WIRES)}
        return Forward(id=self._id(), tensors=(spec,), run=rng.choice(self._names), **fields), [frame]

    def _backward(self) -> tuple[AnyHeader, Frames]:
        rng = self._rng
        spec, frame = self._tensors.draw(rng, 2)
        run, number = rng.choice(self._names), rng.randrange(3)
        return Backward(id=self._id(), tensors=(spec,), run=run, microbatch=number), [frame]

    def _commit(self) -> tuple[AnyHeader, Frames]:
        name = self._rng.choice(self._names)
        step = self._step.get(name, 0)
        self._step[name] = step + 1
        return Commit(id=self._id(), run=name, step=step, loss_tokens=2, square_norm=1.0), []

    def _get_adapter(self) -> tuple[AnyHeader, Frames]:
        return GetAdapter(id=self._id(), run=self._rng.choice(self._names)), []

    def _close_run(self) -> tuple[AnyHeader, Frames]:
        return CloseRun(id=self._id(), run=self._rng.choice(self._names)), []


_CONVERSATION: list[Callable[[Arsenal], tuple[AnyHeader, Frames]]] = [
    *[Arsenal._open_session] * 3,
    *[Arsenal._extend] * 6,
    Arsenal._close_session,
    *[Arsenal._open_run] * 2,
    *[Arsenal._forward] * 3,
    *[Arsenal._backward] * 3,
    *[Arsenal._commit] * 2,
    Arsenal._get_adapter,
    Arsenal._close_run,
]
