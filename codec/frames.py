"""Tensor frames: one tensor's bytes and back, without torch and without trust.

`raw` is the tensor's little-endian bytes. `planes` is lossless: byte k of every element goes to
plane k, and each plane is stored as `codec.planes` finds best. `steps` is the same for the integers
of a quantised tensor (`codec.quantise`).

On floating-point activations the mantissa planes are noise and the sign/exponent plane is not,
which is why plain lz4 of the whole is worth nothing and planes are worth a little.
"""

import math
from collections.abc import Sequence

import numpy as np

from codec.errors import FrameError
from codec.limits import MAX_FRAME_BYTES, MAX_MESSAGE_BYTES, MAX_TENSORS
from codec.messages import DType, TensorSpec
from codec.planes import Buffer, Bytes, fits, restore, shrink

ITEM_SIZES: dict[DType, int] = {"f32": 4, "bf16": 2, "f16": 2}
_MIN_PLANES_ELEMENTS = 4096
"""Below this a frame's planes save fewer bytes than their bookkeeping and time are worth."""


def encode_raw(data: Bytes, dtype: DType, shape: tuple[int, ...]) -> tuple[TensorSpec, Buffer]:
    """The bytes as they stand, `data` flat uint8; no copy is made."""
    return TensorSpec(dtype, shape, "raw", (data.nbytes,)), data.data


def encode_planes(data: Bytes, dtype: DType, shape: tuple[int, ...]) -> tuple[TensorSpec, Buffer]:
    """Lossless byte planes where they pay, `raw` where they do not. `data` is flat uint8."""
    elements = data.nbytes // ITEM_SIZES[dtype]
    if elements < _MIN_PLANES_ELEMENTS:
        return encode_raw(data, dtype, shape)
    columns = data.reshape(elements, ITEM_SIZES[dtype])
    planes = [np.ascontiguousarray(columns[:, k]) for k in range(columns.shape[1])]
    parts = [shrink(plane) for plane in planes]
    sizes = tuple(len(part) for part in parts)
    if sum(sizes) >= data.nbytes:
        return encode_raw(data, dtype, shape)
    return TensorSpec(dtype, shape, "planes", sizes), b"".join(parts)


def encode_steps(
    planes: Bytes, step: float, dtype: DType, shape: tuple[int, ...]
) -> tuple[TensorSpec, Buffer]:
    """Quantised codes as byte planes, uint8 `[planes, elements]`, lowest byte first."""
    parts = [shrink(plane) for plane in planes]
    return TensorSpec(dtype, shape, "steps", tuple(len(p) for p in parts), step), b"".join(parts)


def check_specs(specs: Sequence[TensorSpec], sizes: Sequence[int]) -> None:
    """Hold what `specs` declare against the received frame `sizes` and the limits.

    Nothing is allocated. Raises `FrameError` at the first thing that does not fit.
    """
    if len(specs) != len(sizes):
        raise FrameError(f"the header declares {len(specs)} tensors, {len(sizes)} frames followed")
    if len(specs) > MAX_TENSORS:
        raise FrameError(f"{len(specs)} tensors in one message, {MAX_TENSORS} are allowed")
    total = 0
    for spec, size in zip(specs, sizes, strict=True):
        total += _check_spec(spec, size)
    if total > MAX_MESSAGE_BYTES:
        raise FrameError(f"a message of {total} bytes, {MAX_MESSAGE_BYTES} are allowed")


def _check_spec(spec: TensorSpec, size: int) -> int:
    item = ITEM_SIZES[spec.dtype]
    elements = math.prod(spec.shape)
    # A size of 0 must not hide others that no tensor can have.
    if math.prod(max(1, extent) for extent in spec.shape) * item > MAX_FRAME_BYTES:
        raise FrameError(f"a tensor of shape {spec.shape} is over {MAX_FRAME_BYTES} bytes")
    if sum(spec.sizes) != size:
        raise FrameError(f"a frame of {size} bytes declares {sum(spec.sizes)}")
    if spec.encoding == "raw" and spec.sizes != (elements * item,):
        raise FrameError(f"shape {spec.shape} of {spec.dtype} takes {elements * item} bytes, not {size}")
    if (spec.encoding == "steps") != (spec.step > 0) or not math.isfinite(spec.step):
        raise FrameError(f"a step of {spec.step} does not go with {spec.encoding}")
    if spec.encoding == "planes" and (len(spec.sizes) != item or elements == 0):
        raise FrameError(f"{len(spec.sizes)} planes do not make shape {spec.shape} of {spec.dtype}")
    if spec.encoding != "raw" and not all(fits(stored, elements) for stored in spec.sizes):
        raise FrameError(f"planes of {spec.sizes} bytes do not make shape {spec.shape} of {spec.dtype}")
    return max(size, elements * max(item, len(spec.sizes)))


def decode(spec: TensorSpec, frame: Buffer) -> Bytes:
    """The tensor's flat bytes, uint8 `[elements * item size]`, of a lossless frame.

    A raw frame is returned as a view of `frame`. Call `check_specs` first: sizes are trusted here.
    Raises `FrameError` if a plane does not decompress to its declared size.
    """
    if spec.encoding == "raw":
        return np.frombuffer(frame, dtype=np.uint8)
    return np.ascontiguousarray(decode_planes(spec, frame).T).reshape(-1)


def decode_planes(spec: TensorSpec, frame: Buffer) -> Bytes:
    """A frame's byte planes, uint8 `[planes, elements]`. The same conditions and errors as `decode`."""
    elements = math.prod(spec.shape)
    out = np.empty((len(spec.sizes), elements), dtype=np.uint8)
    view, offset = memoryview(frame), 0
    for k, size in enumerate(spec.sizes):
        out[k] = restore(view[offset : offset + size], elements)
        offset += size
    return out
