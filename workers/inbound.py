"""A message from a silo, opened up: its tensors decoded and on the span's device, its mask rebuilt.

Pure codec work without any state of the worker, so that it can be done on a thread of its own while
the trunk computes.
"""

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from broker.parcel import Parcel
from codec.errors import FrameError, MismatchError, TrunklineError
from codec.logs import Log
from codec.masks import decode_mask
from codec.messages import AnyHeader, Backward, Extend, Forward, Request, kind_of
from codec.tensors import decode_tensors
from workers.replies import unexpected


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """A request of `silo`, ready to be carried out, or the `trouble` that it could not be read for."""

    silo: bytes
    header: AnyHeader
    tensors: list[Tensor] = field(default_factory=list)
    mask: Tensor | None = None
    trouble: TrunklineError | None = None
    arrived: float = field(default_factory=time.monotonic)
    """When it was ready: a pass may be under way then."""

    @property
    def bytes(self) -> int:
        """What it holds in memory."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class Trunk:
    """Where opened-up tensors go: to what device, and at the boundary in what dtype and width."""

    device: torch.device
    dtype: torch.dtype
    hidden: int


def open_up(parcel: Parcel, trunk: Trunk) -> Work:
    """Decode a parcel's frames. Never raises: what is wrong with them is the work's `trouble`."""
    header = parcel.header
    if not isinstance(header, Request):
        return Work(parcel.peer, header)
    try:
        _check_boundary(header, trunk.hidden)  # Before anything is decoded: it may be much more.
        frames = parcel.buffers()
        mask = _mask(header, frames)
        boundary = f"silo's {kind_of(header)}"
        tensors = decode_tensors(header.tensors, frames, boundary=boundary, device=trunk.device)
        if isinstance(header, Extend | Forward | Backward):
            tensors = [tensor.to(trunk.dtype) for tensor in tensors]
    except TrunklineError as error:
        return Work(parcel.peer, header, trouble=error)
    except Exception as error:
        Log("worker").failed("request not read", kind=kind_of(header))
        return Work(parcel.peer, header, trouble=unexpected(error))
    return Work(parcel.peer, header, tensors, mask)


def _check_boundary(request: Request, hidden: int) -> None:
    """Raises `MismatchError` unless a boundary request brings one tensor, as long as it says."""
    if not isinstance(request, Extend | Forward | Backward):
        return
    shapes = [spec.shape for spec in request.tensors]
    if len(shapes) != 1 or len(shapes[0]) != 2 or shapes[0][1] != hidden:
        raise MismatchError(f"one tensor [tokens, {hidden}] is expected")
    if not isinstance(request, Backward) and shapes[0][0] != sum(request.lengths):
        raise MismatchError(
            f"the lengths sum to {sum(request.lengths)}, the tensor holds {shapes[0][0]} tokens"
        )


def _mask(request: Request, frames: list[memoryview]) -> Tensor | None:
    """The request's mask, bool `[T, T]`, if it has one; its frame, the last, is taken off `frames`.

    Raises `MismatchError` and `FrameError`.
    """
    if not isinstance(request, Extend | Forward) or request.mask is None:
        return None
    tokens, spec = sum(request.lengths), request.mask
    if (spec.queries, spec.keys) != (tokens, tokens):
        raise MismatchError(f"a mask of {spec.queries} by {spec.keys} for {tokens} tokens")
    if not frames:
        raise FrameError("a mask is declared, and no frame follows")
    mask = torch.from_numpy(decode_mask(spec, frames.pop()))
    if not bool(mask.diagonal().all()):
        raise MismatchError("a mask in which a token does not see itself")
    return mask
