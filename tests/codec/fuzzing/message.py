"""One received message, what reading it came to, and the promises held against it."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import torch

from broker.parcel import Parcel
from codec.errors import FrameError, TrunklineError
from codec.masks import decode_mask
from codec.messages import MaskSpec, TensorSpec
from codec.tensors import TORCH_DTYPES, decode_tensors

MAX_SIZE = 1 << 16
"""Bytes of a message at most, of those that are bred."""

_NUMBERS = re.compile(r"0x[0-9a-f]+|-?\d[\d.e+-]*")
_QUOTED = re.compile(r"'[^']*'(?!\w)")
_packer = msgspec.msgpack.Encoder()


class Violation(Exception):  # noqa: N818 - a promise of the codec that was not kept, not an error of it
    """A message was read, but what was made of it is not what it declared."""


@dataclass(frozen=True, slots=True)
class Message:
    """`frames` as they arrive, `[peer][header][tensor]...[mask]`.

    `kind` is that of the message it was bred from. A `dear` one may rightly take more memory than most
    of its size.
    """

    kind: str
    frames: tuple[bytes, ...]
    dear: bool = False

    @property
    def size(self) -> int:
        """Bytes of all frames."""
        return sum(map(len, self.frames))

    @property
    def head(self) -> int:
        """Which frame is in the header's place."""
        return min(1, len(self.frames) - 1)

    def put(self, at: int, data: bytes) -> "Message":
        """The same with another frame in that place."""
        return Message(self.kind, (*self.frames[:at], data, *self.frames[at + 1 :]))

    def pack(self) -> bytes:
        """As one file."""
        return _packer.encode((self.kind, self.frames))

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> "Message":
        """From `pack`."""
        kind, frames = msgspec.msgpack.decode(data, type=tuple[str, tuple[bytes, ...]])
        return cls(kind, frames)


@dataclass(frozen=True, slots=True)
class Outcome:
    """`refused` is the kind of error and its words without numbers, empty for what was read.

    `labels` are dtype, encoding and number of parts of each frame, if the header was read; `size` the
    bytes that were made of the frames.
    """

    kind: str
    labels: tuple[str, ...]
    refused: str
    size: int = 0

    @property
    def signature(self) -> tuple[str, ...]:
        """What stands for the path taken through the decoders."""
        return (self.refused or self.kind, *sorted(set(self.labels)))


def read(message: Message) -> Outcome:
    """Read a message as whoever received it does. Whatever but a `TrunklineError` comes out."""
    kind, labels, size = message.kind, list[str](), 0
    try:
        parcel = Parcel.read(message.frames)
        kind = str(type(parcel.header).__struct_config__.tag)
        specs, frames = parcel.header.tensors, parcel.buffers()
        labels += [f"{spec.dtype} {spec.encoding} {len(spec.sizes)}" for spec in specs]
        mask = getattr(parcel.header, "mask", None)
        if mask is not None:
            labels.append(f"bool {'mask-runs' if mask.runs else 'mask-bits'} 1")
            # The worker asks for the shape that is due first: this is held to what the codec says alone.
            size = _read_mask(mask, frames)
        return Outcome(kind, tuple(labels), "", size + _read_tensors(specs, frames))
    except TrunklineError as error:
        _hold_fed(error)
        words = _NUMBERS.sub("#", _QUOTED.sub("'…'", error.what))
        return Outcome(kind, tuple(labels), f"{type(error).__name__}: {words}")


def _hold_fed(error: BaseException | None) -> None:
    # zstd calls it an error of the frame's where memory runs out, and so a refusal would hide a bomb.
    while error := error.__context__ if error else None:
        if isinstance(error, MemoryError) or "not enough memory" in str(error):
            raise Violation(f"memory ran out: {error}") from error


def _read_tensors(specs: Sequence[TensorSpec], frames: Sequence[memoryview]) -> int:
    tensors = decode_tensors(specs, frames, boundary="fuzz")
    for spec, tensor in zip(specs, tensors, strict=True):
        if tuple(tensor.shape) != spec.shape or tensor.dtype != TORCH_DTYPES[spec.dtype]:
            raise Violation(f"{tensor.dtype} {tuple(tensor.shape)} was made of {spec}")
        # The largest of numbers with a NaN among them is NaN.
        if tensor.numel() and not math.isfinite(float(torch.linalg.vector_norm(tensor, math.inf))):
            raise Violation(f"NaN or infinity was made of {spec}")
    return sum(tensor.nbytes for tensor in tensors)


def _read_mask(spec: MaskSpec, frames: list[memoryview]) -> int:
    if not frames:
        raise FrameError("a mask is declared, and no frame follows")
    mask = decode_mask(spec, frames.pop())
    if mask.shape != (spec.queries, spec.keys) or mask.dtype != bool:
        raise Violation(f"{mask.dtype} {mask.shape} was made of {spec}")
    return mask.nbytes
