"""Torch tensors to frames and back. The broker never imports this module (it needs torch)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from codec.errors import FrameError
from codec.frames import check_specs, decode, decode_planes, encode_planes, encode_steps
from codec.messages import DType, TensorSpec, Wire
from codec.planes import Buffer
from codec.quantise import dequantise, quantise, step_of

TORCH_DTYPES: dict[DType, torch.dtype] = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
}
_WIRE_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_CASTS: dict[Wire, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


def encode_tensor(
    tensor: Tensor, wire: Wire, boundary: str, *, step: float = 0.0, stochastic: bool = False
) -> tuple[TensorSpec, Buffer]:
    """One tensor as a spec and its frame.

    `exact` keeps the dtype and every bit; `bf16` and `fp16` cast first, on the tensor's own device.
    `steps` quantises there to multiples of `step`, or of a share of the tensor's root mean square
    if that is 0, with unbiased rounding if `stochastic`: only packed bytes leave a GPU.
    `boundary` names what is being sent, for errors. Raises `FrameError` if a value is not finite
    (fp16 overflows at 65504) or the dtype is not in the table.
    """
    sent = tensor.detach()
    if wire in _CASTS:
        sent = sent.to(_CASTS[wire])
    name = _WIRE_DTYPES.get(sent.dtype)
    if name is None:
        raise FrameError(f"{boundary}: {sent.dtype} does not cross; {', '.join(_WIRE_DTYPES.values())} do")
    if not bool(torch.isfinite(sent).all()):
        raise FrameError(
            f"{boundary}: NaN or infinity in a tensor of shape {tuple(sent.shape)}",
            hint="Lower the learning rate, or use --wire bf16 if fp16 overflows.",
        )
    if wire == "steps" and sent.numel():
        size = step or step_of(sent, stochastic=stochastic)
        planes = quantise(sent, size, stochastic=stochastic).to("cpu").numpy()
        return encode_steps(planes, size, name, tuple(sent.shape))
    flat = sent.to("cpu").contiguous().view(-1).view(torch.uint8) if sent.numel() else torch.empty(0)
    data = flat.numpy().view(np.uint8)
    return encode_planes(data, name, tuple(sent.shape))


def decode_tensors(specs: Sequence[TensorSpec], frames: Sequence[Buffer], *, boundary: str) -> list[Tensor]:
    """The tensors of a message on the CPU, each in the dtype it crossed in.

    Raises `FrameError`, naming the boundary, for sizes that lie or values that are not finite.
    """
    try:
        check_specs(specs, [memoryview(frame).nbytes for frame in frames])
        return [_tensor(spec, frame) for spec, frame in zip(specs, frames, strict=True)]
    except FrameError as error:
        raise FrameError(f"{boundary}: {error.what}", hint=error.hint, side=error.at) from None


def _tensor(spec: TensorSpec, frame: Buffer) -> Tensor:
    if 0 in spec.shape:
        return torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype])
    if spec.encoding == "steps":
        planes = torch.from_numpy(decode_planes(spec, frame))
        values = dequantise(planes, spec.step).to(TORCH_DTYPES[spec.dtype])
        return _finite(values.reshape(spec.shape))
    data = decode(spec, frame)
    if not data.flags.writeable:
        # A received frame is read-only memory; torch has no read-only tensors, so this one copy stays.
        data = data.copy()
    return _finite(torch.from_numpy(data).view(TORCH_DTYPES[spec.dtype]).reshape(spec.shape))


def _finite(tensor: Tensor) -> Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise FrameError(f"NaN or infinity in a tensor of shape {tuple(tensor.shape)}")
    return tensor


def encode_tensors(
    tensors: Sequence[Tensor],
    wire: Wire,
    boundary: str,
    *,
    step: float = 0.0,
    stochastic: bool = False,
) -> tuple[tuple[TensorSpec, ...], list[Buffer]]:
    """Several tensors of one message, in order."""
    pairs = [encode_tensor(t, wire, boundary, step=step, stochastic=stochastic) for t in tensors]
    return tuple(spec for spec, _ in pairs), [frame for _, frame in pairs]
