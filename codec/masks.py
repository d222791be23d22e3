"""Attention masks as bit-packed runs: any boolean mask, exactly, in next to no bytes.

What is causal with padding crosses as lengths (`codec.lengths`); this is for every other mask. A mask
`[queries, keys]` is told by its toggles: True where a row differs from the row above, the first from an
empty one. The rows of real masks (prefix, block-diagonal, sliding window) are alike, so their toggles
are few and move evenly. Row after row, toggles are runs, first of False and then alternating; of each
run its difference to the run before the last is zigzagged and packed at a fixed width, and what repeats
is then shrunk as a byte plane is. Where toggles have no runs worth the name, their bits are stored.
"""

import numpy as np
import numpy.typing as npt

from codec.errors import FrameError, UsageError
from codec.limits import MASK_PER_RUN, MAX_MASK, MAX_MASK_WIDTH
from codec.messages import MaskSpec
from codec.planes import Buffer, Bytes, fits, restore, shrink
from codec.zigzag import Ints, unzigzag, zigzag

Mask = npt.NDArray[np.bool_]


def encode_mask(mask: Mask) -> tuple[MaskSpec, bytes]:
    """Any boolean mask `[queries, keys]`, in at most one bit per element.

    Raises `UsageError` if it is not that, or is larger than `MAX_MASK`.
    """
    if mask.ndim != 2 or mask.dtype != np.bool_:
        raise UsageError(f"a mask is bool [queries, keys], this one is {mask.dtype} {list(mask.shape)}")
    queries, keys = mask.shape
    if _rounded(queries, keys) > MAX_MASK:
        raise UsageError(f"a mask of {queries} by {keys} is over {MAX_MASK} elements")
    if not mask.size:
        return MaskSpec(queries, keys, 0, 0), b""
    toggles = mask.copy()
    toggles[1:] ^= mask[:-1]
    flat = toggles.reshape(-1)
    starts = np.diff(flat, prepend=False)
    if (1 + np.count_nonzero(starts)) * MASK_PER_RUN > flat.size:
        return MaskSpec(queries, keys, 0, 0), bytes(shrink(np.packbits(flat)))
    runs = np.diff(np.flatnonzero(starts), prepend=0, append=flat.size)
    steps = runs.copy()
    steps[2:] -= runs[:-2]
    values = zigzag(steps)
    width = int(values.max()).bit_length()
    bits = np.unpackbits(values.astype(">u4").view(np.uint8)).reshape(-1, 32)[:, 32 - width :]
    return MaskSpec(queries, keys, runs.size, width), bytes(shrink(np.packbits(bits)))


def check_mask(spec: MaskSpec, size: int) -> None:
    """Hold what `spec` declares against the received frame's `size` and the limits.

    Nothing is allocated. Raises `FrameError` at the first thing that does not fit. A few bytes may
    rightly say a mask of `MAX_MASK`: whoever knows what shape is due asks for that shape first.
    """
    elements, shape = spec.queries * spec.keys, f"{spec.queries} by {spec.keys}"
    if _rounded(spec.queries, spec.keys) > MAX_MASK:
        raise FrameError(f"a mask of {shape} is over {MAX_MASK} elements")
    if (
        (spec.runs > 0) != (spec.width > 0)
        or spec.runs * MASK_PER_RUN > elements
        or spec.width > MAX_MASK_WIDTH
    ):
        raise FrameError(f"{spec.runs} runs of {spec.width} bits do not make a mask of {shape}")
    if not fits(size, _stored(spec)) and (size or elements):
        raise FrameError(f"a frame of {size} bytes does not make a mask of {shape}")


def decode_mask(spec: MaskSpec, frame: Buffer) -> Mask:
    """The mask, bool `[queries, keys]`; checked first (`check_mask`), and the runs before it is made.

    Raises `FrameError` if the frame is not what `spec` declares.
    """
    view = memoryview(frame)
    check_mask(spec, view.nbytes)
    elements = spec.queries * spec.keys
    if not elements:
        return np.zeros((spec.queries, spec.keys), dtype=np.bool_)
    packed = restore(view, _stored(spec))
    if spec.runs:
        runs = _runs(packed, spec, elements)
        flat = np.repeat(np.arange(spec.runs) % 2 == 1, runs)
    else:
        flat = np.unpackbits(packed, count=elements).view(np.bool_)
    # Down the columns toggles add up to the mask. numpy adds item by item, so 64 columns go as one.
    columns = np.packbits(flat.reshape(spec.queries, spec.keys), axis=1)
    words = np.zeros((spec.queries, -(-spec.keys // 64)), dtype=np.uint64)
    words.view(np.uint8)[:, : columns.shape[1]] = columns
    np.bitwise_xor.accumulate(words, axis=0, out=words)
    return np.unpackbits(words.view(np.uint8), axis=1, count=spec.keys).view(np.bool_)


def _runs(packed: Bytes, spec: MaskSpec, elements: int) -> Ints:
    """The run lengths, int64 `[runs]`. Raises `FrameError` unless they make `elements`."""
    bits = np.zeros((spec.runs, 32), dtype=np.uint8)
    bits[:, 32 - spec.width :] = np.unpackbits(packed, count=spec.runs * spec.width).reshape(spec.runs, -1)
    runs = unzigzag(np.packbits(bits).view(">u4").astype(np.int64))
    for half in (runs[0::2], runs[1::2]):
        np.cumsum(half, out=half)
    # Neither sum overflows: 2**21 steps under 2**27, then 2**21 runs of at most 2**26.
    if runs[0] < 0 or runs.max() > elements or (runs[1:] < 1).any() or runs.sum() != elements:
        raise FrameError(f"the runs of a mask do not make {spec.queries} by {spec.keys}")
    return runs


def _stored(spec: MaskSpec) -> int:
    """Bytes of the toggles before they are shrunk."""
    return -(-(spec.runs * spec.width or spec.queries * spec.keys) // 8)


def _rounded(queries: int, keys: int) -> int:
    # An extent of 0 must not hide another that no mask can have.
    return max(1, queries) * -(-max(1, keys) // 64) * 64
