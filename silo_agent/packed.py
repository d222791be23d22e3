"""A request with its tensors encoded: bytes that can be sent again exactly as they were."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from torch import Tensor

from broker.parcel import Frames, Parcel
from codec.errors import FrameError
from codec.frames import check_specs
from codec.masks import encode_mask
from codec.messages import Request, Wire, kind_of
from codec.tensors import encode_tensors


@dataclass(frozen=True, slots=True)
class Packed:
    """A request that has no number yet, its tensor frames, and the tokens in them (0: no boundary)."""

    request: Request
    frames: Frames
    tokens: int

    @property
    def kind(self) -> str:
        """What the header's `kind` says."""
        return kind_of(self.request)

    @property
    def size(self) -> int:
        """Bytes of all tensor frames."""
        return sum(len(frame) for frame in self.frames)

    def parcel(self, number: int) -> Parcel:
        """The message, as request `number`."""
        return Parcel.of(msgspec.structs.replace(self.request, id=number), self.frames)


def pack(
    request: Request,
    tensors: Sequence[Tensor] = (),
    *,
    wire: Wire = "exact",
    step: float = 0.0,
    stochastic: bool = False,
    mask: Tensor | None = None,
) -> Packed:
    """Encode `tensors` for `request`. A `mask`, bool `[T, T]`, never crosses dense.

    Raises `FrameError` if a tensor cannot cross or is too large.
    """
    if not tensors and mask is None:
        return Packed(request, (), 0)
    kind = kind_of(request)
    specs, frames = encode_tensors(tensors, wire, kind, step=step, stochastic=stochastic)
    try:
        # A broker drops the connection of who sends more than this.
        check_specs(specs, [memoryview(frame).nbytes for frame in frames])
    except FrameError as error:
        hint = "Send fewer tokens at once: lower --batch or --max-length."
        raise FrameError(f"{kind}: {error.what}", hint=hint) from None
    fields: dict[str, object] = {"tensors": specs}
    if mask is not None:
        fields["mask"], packed = encode_mask(mask.cpu().numpy())
        frames = [*frames, packed]
    return Packed(msgspec.structs.replace(request, **fields), tuple(frames), tokens_of(tensors))


def tokens_of(tensors: Sequence[Tensor]) -> int:
    """The tokens of a boundary's one tensor `[tokens, hidden]`; 0 for all else."""
    return tensors[0].shape[0] if len(tensors) == 1 and tensors[0].dim() == 2 else 0
