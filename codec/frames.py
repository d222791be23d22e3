"""Tensor frames: one tensor's bytes and back, without torch and without trust.

`raw` is the tensor's little-endian bytes. `planes` is lossless: byte k of every element goes to
plane k, and each plane is stored as `codec.planes` finds best. `steps` and `blocks` hold the parts of
a quantised tensor (`codec.quantise`): planes of bytes or nibbles, and what goes with them.

On floating-point activations the mantissa planes are noise and the sign/exponent plane is not,
which is why plain lz4 of the whole is worth nothing and planes are worth a little.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from codec.errors import FrameError
from codec.limits import MAX_FRAME_BYTES, MAX_MESSAGE_BYTES, MAX_TENSORS
from codec.messages import DType, TensorSpec
from codec.planes import Buffer, Bytes, fits, restore, shrink
from codec.zigzag import Ints, unzigzag, zigzag

ITEM_SIZES: dict[DType, int] = {"f32": 4, "bf16": 2, "f16": 2}
BLOCK = 64
"""Consecutive elements that share a step of their own in `blocks`."""

ELEMENTS_PER_OUTLIER = 12
"""More outliers than this and bf16 takes fewer bits; a decoder need not make room for them."""

_MIN_PLANES_ELEMENTS = 4096
"""Below this a frame's planes save fewer bytes than their bookkeeping and time are worth."""

_STEP_BYTES = 2
"""A block's step is a bf16."""

_WORD_BYTES = 4
"""An outlier's distance from the one before, and its zigzagged value, are 32 bits each."""


def encode_raw(data: Bytes, dtype: DType, shape: tuple[int, ...]) -> tuple[TensorSpec, Buffer]:
    """The bytes as they stand, `data` flat uint8; no copy is made."""
    return TensorSpec(dtype, shape, "raw", (data.nbytes,)), data.data


def encode_planes(data: Bytes, dtype: DType, shape: tuple[int, ...]) -> tuple[TensorSpec, Buffer]:
    """Lossless byte planes where they pay, `raw` where they do not. `data` is flat uint8."""
    item = ITEM_SIZES[dtype]
    elements = data.nbytes // item
    if elements < _MIN_PLANES_ELEMENTS:
        return encode_raw(data, dtype, shape)
    parts = [shrink(plane) for plane in _columns(data, item)]
    sizes = tuple(len(part) for part in parts)
    if sum(sizes) >= data.nbytes:
        return encode_raw(data, dtype, shape)
    return TensorSpec(dtype, shape, "planes", sizes), b"".join(parts)


def encode_steps(
    planes: Bytes, positions: Ints, values: Ints, step: float, dtype: DType, shape: tuple[int, ...]
) -> tuple[TensorSpec, Buffer]:
    """Codes as planes, uint8 `[1, n]` (bytes) or `[2, ceil(n / 2)]` (nibbles), with their outliers."""
    parts = list(planes)
    if len(positions):
        distances = np.diff(positions, prepend=0).astype("<u4")
        zigzagged = zigzag(values).astype("<u4")
        for words in (distances, zigzagged):
            columns = words.view(np.uint8).reshape(-1, _WORD_BYTES).T
            parts.append(np.ascontiguousarray(columns).reshape(-1))
    stored = _stored(parts, math.prod(shape))
    sizes = tuple(len(part) for part in stored)
    return TensorSpec(dtype, shape, "steps", sizes, step, len(positions)), b"".join(stored)


def encode_blocks(
    planes: Bytes, steps: Bytes, dtype: DType, shape: tuple[int, ...]
) -> tuple[TensorSpec, Buffer]:
    """Codes as for `encode_steps`, and a step per block, the bytes of bf16 `[ceil(n / 64)]`."""
    parts = [steps.data, *_stored(list(planes), math.prod(shape))]
    return TensorSpec(dtype, shape, "blocks", tuple(len(p) for p in parts)), b"".join(parts)


def _stored(parts: Sequence[Bytes], elements: int) -> list[Buffer]:
    few = elements < _MIN_PLANES_ELEMENTS
    return [part.data if few else shrink(part) for part in parts]


def _columns(data: Bytes, item: int) -> list[Bytes]:
    """Byte k of every element, for each k, from flat bytes of `item` bytes an element."""
    # Narrowing whole integers is faster than gathering every fourth byte.
    whole = data.view(f"<u{item}")
    return [(whole >> (8 * k) if k else whole).astype(np.uint8) for k in range(item)]


def _joined(planes: Sequence[Bytes], dtype: str) -> npt.NDArray[Any]:
    """The integers whose byte k is in plane k."""
    whole = planes[0].astype(dtype)
    for k, plane in enumerate(planes[1:], start=1):
        whole |= plane.astype(dtype) << (8 * k)
    return whole


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
    # Quantised tensors become fp32 first, whatever they are cast to then.
    item = ITEM_SIZES["f32" if spec.encoding in ("steps", "blocks") else spec.dtype]
    elements = math.prod(spec.shape)
    # A size of 0 must not hide others that no tensor can have.
    if math.prod(max(1, extent) for extent in spec.shape) * item > MAX_FRAME_BYTES:
        raise FrameError(f"a tensor of shape {spec.shape} is over {MAX_FRAME_BYTES} bytes")
    if sum(spec.sizes) != size:
        raise FrameError(f"a frame of {size} bytes declares {sum(spec.sizes)}")
    if (spec.encoding == "steps") != (spec.step > 0) or not math.isfinite(spec.step):
        raise FrameError(f"a step of {spec.step} does not go with {spec.encoding}")
    if spec.outliers and not (spec.encoding == "steps" and spec.outliers * ELEMENTS_PER_OUTLIER <= elements):
        raise FrameError(f"{spec.outliers} outliers do not go with {elements} elements of {spec.encoding}")
    lengths = _part_lengths(spec, elements)
    if lengths is None or len(lengths) != len(spec.sizes) or (spec.encoding != "raw" and not elements):
        raise FrameError(f"{len(spec.sizes)} parts of {spec.encoding} do not make shape {spec.shape}")
    shrunk_from = {"raw": 1, "blocks": 1}.get(spec.encoding, 0)
    for part, (stored, length) in enumerate(zip(spec.sizes, lengths, strict=True)):
        if stored != length and not (part >= shrunk_from and fits(stored, length)):
            raise FrameError(
                f"{spec.encoding} of shape {spec.shape}, {spec.dtype}, takes {length} bytes, not {stored}"
            )
    return max(size, elements * item, sum(lengths))


def _part_lengths(spec: TensorSpec, elements: int) -> list[int] | None:
    """Bytes of each part as it was before it was shrunk; None for a number of parts that cannot be."""
    item, parts = ITEM_SIZES[spec.dtype], len(spec.sizes)
    nibbles = [(elements + 1) // 2] * 2
    match spec.encoding, parts:
        case "raw", _:
            return [elements * item]
        case "planes", _:
            return [elements] * item
        case "blocks", 2 | 3:
            return [-(-elements // BLOCK) * _STEP_BYTES, *([elements] if parts == 2 else nibbles)]
        case "steps", _ if parts - 2 * bool(spec.outliers) in (1, 2):
            outliers = [spec.outliers * _WORD_BYTES] * 2 if spec.outliers else []
            return [*([elements] if parts - len(outliers) == 1 else nibbles), *outliers]
    return None


def decode(spec: TensorSpec, frame: Buffer) -> Bytes:
    """The tensor's flat bytes, uint8 `[elements * item size]`, of a lossless frame.

    A raw frame is returned as a view of `frame`. Call `check_specs` first: sizes are trusted here.
    Raises `FrameError` if a plane does not decompress to its declared size.
    """
    if spec.encoding == "raw":
        return np.frombuffer(frame, dtype=np.uint8)
    return _joined(decode_parts(spec, frame), f"<u{ITEM_SIZES[spec.dtype]}").view(np.uint8)


def decode_parts(spec: TensorSpec, frame: Buffer) -> list[Bytes]:
    """A frame's parts, uint8, as they were before they were shrunk, in order.

    The same conditions and errors as `decode`.
    """
    lengths = _part_lengths(spec, math.prod(spec.shape))
    assert lengths is not None
    view, offset, parts = memoryview(frame), 0, []
    for size, length in zip(spec.sizes, lengths, strict=True):
        parts.append(restore(view[offset : offset + size], length))
        offset += size
    return parts


def decode_outliers(spec: TensorSpec, parts: Sequence[Bytes]) -> tuple[Ints, Ints]:
    """Positions and values of the outliers, int64 `[spec.outliers]` each, from `decode_parts`.

    Raises `FrameError` for positions that are not within the tensor, or not in ascending order.
    """
    distances, zigzagged = (_joined(list(part.reshape(_WORD_BYTES, -1)), "<i8") for part in parts[-2:])
    positions = np.cumsum(distances)
    if (distances[1:] == 0).any() or positions[-1] >= math.prod(spec.shape):
        raise FrameError("the positions of a tensor's outliers are not within it, one after another")
    return positions, unzigzag(zigzagged)
