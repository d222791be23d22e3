"""Torch tensors to frames and back. The broker never imports this module (it needs torch)."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from codec.errors import FrameError
from codec.frames import (
    check_specs,
    decode,
    decode_outliers,
    decode_parts,
    encode_blocks,
    encode_planes,
    encode_raw,
    encode_steps,
)
from codec.messages import DType, TensorSpec, Wire
from codec.nibbles import join, split
from codec.planes import Buffer, Bytes
from codec.quantise import (
    Codes,
    Size,
    dequantise,
    dequantise_blocks,
    quantise,
    quantise_blocks,
)
from codec.staging import download, settle, upload

TORCH_DTYPES: dict[DType, torch.dtype] = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
}
_WIRE_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_CASTS: dict[Wire, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
_BLOCK_BITS: dict[Wire, int] = {"q8": 8, "q7": 7, "q6": 6, "q5": 5, "q4": 4}

_MIN_STEP = 1e-30
"""Numbers far below this are zero to any model; a step must have a reciprocal."""

_LARGEST_BODY = 128

_ALIGNMENT = 4

_Frame = Callable[[], tuple[TensorSpec, Buffer]]
"""Makes a frame of a tensor that is packed and on its way to the host."""

_NIBBLES_FROM = 10.0
"""Root mean square in steps from which the low nibbles of codes are as good as random."""


def encode_tensor(
    tensor: Tensor, wire: Wire, boundary: str, *, step: float = 0.0, stochastic: bool = False
) -> tuple[TensorSpec, Buffer]:
    """One tensor as a spec and its frame.

    `raw` and `exact` keep the dtype and every bit; `bf16` and `fp16` cast first. `steps` quantises to
    multiples of `step`, or of a share of the tensor's own size if that is 0; `q8` to `q4` in blocks.
    `stochastic` rounds without bias. All of this happens on the tensor's own device: only packed
    bytes leave a GPU. `boundary` names what is being sent, for errors. Raises `FrameError` if a value
    is not finite (fp16 overflows at 65504) or the dtype is not in the table.
    """
    frame = _leaving(tensor, wire, boundary, step, stochastic)
    settle(tensor.device)
    return frame()


def _leaving(tensor: Tensor, wire: Wire, boundary: str, step: float, stochastic: bool) -> _Frame:
    """Tell the tensor's device all that is to be done there, and what makes the frame of it once it is."""
    sent = tensor.detach()
    if wire in _CASTS:
        sent = sent.to(_CASTS[wire])
    name = _WIRE_DTYPES.get(sent.dtype)
    if name is None:
        raise FrameError(f"{boundary}: {sent.dtype} does not cross; {', '.join(_WIRE_DTYPES.values())} do")
    shape = tuple(sent.shape)
    if not sent.numel():
        return lambda: encode_raw(torch.empty(0, dtype=torch.uint8).numpy(), name, shape)
    size = Size.of(sent)
    if not math.isfinite(size.norm):
        raise FrameError(
            f"{boundary}: NaN or infinity in a tensor of shape {shape}",
            hint="Lower the learning rate, or use --wire bf16 if fp16 overflows.",
        )
    most = _most(sent.dtype)
    if wire in _BLOCK_BITS:
        if size.norm > most / 2 and float(sent.abs().max()) > most / 2:
            # A value rounded up might not be finite.
            return _leaving(sent, "exact", boundary, step, stochastic)
        steps, body = quantise_blocks(_flat(sent), _BLOCK_BITS[wire], stochastic=stochastic)
        planes, steps = _planes(body, nibbles=True), download(steps)
        return lambda: encode_blocks(planes.numpy(), _bytes(steps), name, shape)
    if wire == "steps":
        width = max(step or size.step(sent.numel(), gradient=stochastic), _MIN_STEP)
        if _LARGEST_BODY * width > most:
            return _leaving(sent, "exact", boundary, step, stochastic)
        codes = quantise(_flat(sent), width, size.norm, stochastic=stochastic)
        if codes is None:
            return _leaving(sent, "bf16", boundary, step, stochastic)
        planes = _planes(codes.body, nibbles=size.norm > _NIBBLES_FROM * width * math.sqrt(sent.numel()))
        at, values = download(codes.positions), download(codes.values)
        return lambda: encode_steps(planes.numpy(), at.numpy(), values.numpy(), width, name, shape)
    encode, whole = encode_raw if wire == "raw" else encode_planes, download(sent)
    return lambda: encode(_bytes(whole), name, shape)


def _most(dtype: torch.dtype) -> float:
    """What is below this is finite however fp32 rounds on the way to `dtype`."""
    return (1 - 2.0**-20) * torch.finfo(dtype).max


def _flat(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous().view(-1)


def _planes(body: Tensor, *, nibbles: bool) -> Tensor:
    return download(split(body) if nibbles else body[None])


def _bytes(host: Tensor) -> Bytes:
    flat: Bytes = host.contiguous().view(-1).view(torch.uint8).numpy()
    return flat


def decode_tensors(
    specs: Sequence[TensorSpec],
    frames: Sequence[Buffer],
    *,
    boundary: str,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """The tensors of a message on `device`, each in the dtype it crossed in.

    A raw tensor may be the frame's own memory, which is its owner's to change from then on.

    What is packed goes to the device packed. Raises `FrameError`, naming the boundary, for sizes that
    lie or values that are not finite.
    """
    try:
        check_specs(specs, [memoryview(frame).nbytes for frame in frames])
        where = torch.device(device)
        return [_tensor(spec, frame, where) for spec, frame in zip(specs, frames, strict=True)]
    except FrameError as error:
        raise FrameError(f"{boundary}: {error.what}", hint=error.hint, side=error.at) from None


def _tensor(spec: TensorSpec, frame: Buffer, device: torch.device) -> Tensor:
    dtype = TORCH_DTYPES[spec.dtype]
    if 0 in spec.shape:
        return torch.empty(spec.shape, dtype=dtype, device=device)
    if spec.encoding == "steps":
        return _from_steps(spec, frame, device).to(dtype).reshape(spec.shape)
    if spec.encoding == "blocks":
        tensor = _from_blocks(spec, frame, device).to(dtype)
    else:
        tensor = upload(_writable(decode(spec, frame)).view(dtype), device)
    if not math.isfinite(Size.of(tensor).norm):
        raise FrameError(f"NaN or infinity in a tensor of shape {spec.shape}")
    return tensor.reshape(spec.shape)


def _from_steps(spec: TensorSpec, frame: Buffer, device: torch.device) -> Tensor:
    parts = decode_parts(spec, frame)
    planes, largest = parts, _LARGEST_BODY
    positions = values = torch.empty(0, dtype=torch.int64)
    if spec.outliers:
        planes = parts[:-2]
        positions, values = map(torch.from_numpy, decode_outliers(spec, parts))
        largest = max(largest, int(values.abs().max()))
    if largest * spec.step > _most(TORCH_DTYPES[spec.dtype]):
        # Told from the largest code: no pass over the values is needed to find them all finite.
        raise FrameError(f"a code of {largest} steps of {spec.step:.3g} is beyond {spec.dtype}")
    body = _body(planes, math.prod(spec.shape), device)
    return dequantise(Codes(body, upload(positions, device), upload(values, device)), spec.step)


def _from_blocks(spec: TensorSpec, frame: Buffer, device: torch.device) -> Tensor:
    steps, *planes = decode_parts(spec, frame)
    body = _body(planes, math.prod(spec.shape), device)
    return dequantise_blocks(body, upload(_writable(steps).view(torch.bfloat16), device))


def _body(planes: Sequence[Bytes], elements: int, device: torch.device) -> Tensor:
    """The codes' bytes, in memory of their own: turning them back into codes changes them."""
    if len(planes) == 1:
        return upload(torch.from_numpy(planes[0].copy()), device)
    low, high = (upload(_writable(plane), device) for plane in planes)
    return join(low, high, elements)


def _writable(data: Bytes) -> Tensor:
    """A received frame's memory as a tensor; copied where torch could not use it as it is."""
    aligned = data.__array_interface__["data"][0] % _ALIGNMENT == 0
    return torch.from_numpy(data if data.flags.writeable and aligned else data.copy())


def encode_tensors(
    tensors: Sequence[Tensor],
    wire: Wire,
    boundary: str,
    *,
    step: float = 0.0,
    stochastic: bool = False,
) -> tuple[tuple[TensorSpec, ...], list[Buffer]]:
    """Several tensors of one message, in order."""
    leaving: Iterable[_Frame] = (_leaving(t, wire, boundary, step, stochastic) for t in tensors)
    if (gpu := next((tensor.device for tensor in tensors if tensor.is_cuda), None)) is not None:
        # All are told before any is awaited. On a CPU a tensor's frame is made before the next one is
        # touched: both use the same scratch memory.
        leaving = list(leaving)
        settle(gpu)
    pairs = [frame() for frame in leaving]
    return tuple(spec for spec, _ in pairs), [frame for _, frame in pairs]
