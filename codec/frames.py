"""Tensor frames: one tensor's bytes and back, without torch and without trust.

`raw` is the tensor's little-endian bytes. `planes` is lossless: byte k of every element goes to
plane k, and a plane that lz4 shrinks is stored compressed; one that it cannot shrink is stored as
it is. A plane's stored size tells which: equal to the element count means stored.

On floating-point activations the mantissa planes are noise and the sign/exponent plane is not,
which is why plain lz4 of the whole is worth nothing and this is worth a little.
"""

import math
from collections.abc import Sequence

import lz4.block
import numpy as np
import numpy.typing as npt

from codec.errors import FrameError
from codec.limits import MAX_FRAME_BYTES, MAX_MESSAGE_BYTES, MAX_TENSORS
from codec.messages import DType, TensorSpec

Bytes = npt.NDArray[np.uint8]
Buffer = bytes | bytearray | memoryview

ITEM_SIZES: dict[DType, int] = {"f32": 4, "bf16": 2, "f16": 2}
_MIN_PLANES_ELEMENTS = 4096
"""Below this a frame's planes save fewer bytes than their bookkeeping and time are worth."""
_SAMPLE = 4096
_WORTH = 0.9
_LZ4_MAX_RATIO = 256
"""No lz4 block grows more than 255-fold: a small frame cannot claim a large plane."""


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
    parts = [_shrunk(plane) for plane in planes]
    sizes = tuple(len(part) for part in parts)
    if sum(sizes) >= data.nbytes:
        return encode_raw(data, dtype, shape)
    return TensorSpec(dtype, shape, "planes", sizes), b"".join(parts)


def _shrunk(plane: Bytes) -> Buffer:
    middle = plane.size // 2
    sample = plane[middle : middle + _SAMPLE]
    if len(lz4.block.compress(sample.data, store_size=False)) > _WORTH * sample.size:
        return plane.data
    packed: bytes = lz4.block.compress(plane.data, store_size=False)
    return packed if len(packed) < plane.size else plane.data


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
    if spec.encoding == "planes" and (
        len(spec.sizes) != item
        or elements == 0
        or not all(elements <= _LZ4_MAX_RATIO * s and s <= elements for s in spec.sizes)
    ):
        raise FrameError(f"planes of {spec.sizes} bytes do not make shape {spec.shape} of {spec.dtype}")
    return max(size, elements * item)


def decode(spec: TensorSpec, frame: Buffer) -> Bytes:
    """The tensor's flat bytes, uint8 `[elements * item size]`.

    A raw frame is returned as a view of `frame`. Call `check_specs` first: sizes are trusted here.
    Raises `FrameError` if a plane does not decompress to its declared size.
    """
    if spec.encoding == "raw":
        return np.frombuffer(frame, dtype=np.uint8)
    elements, item = math.prod(spec.shape), ITEM_SIZES[spec.dtype]
    out = np.empty((elements, item), dtype=np.uint8)
    view, offset = memoryview(frame), 0
    for k, size in enumerate(spec.sizes):
        out[:, k] = _restored(view[offset : offset + size], elements)
        offset += size
    return out.reshape(-1)


def _restored(part: memoryview, elements: int) -> Bytes:
    if len(part) == elements:
        return np.frombuffer(part, dtype=np.uint8)
    try:
        plane = lz4.block.decompress(part, uncompressed_size=elements)
    except (lz4.block.LZ4BlockError, ValueError, OverflowError):
        raise FrameError("a byte plane is not valid lz4") from None
    if len(plane) != elements:
        raise FrameError(f"a byte plane holds {len(plane)} bytes, {elements} were declared")
    return np.frombuffer(plane, dtype=np.uint8)
