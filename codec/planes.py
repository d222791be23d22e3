"""Byte planes: shrinking one plane of bytes, and getting it back without trust.

A plane that nothing shrinks is stored as it is: its stored size is its length. Otherwise its first
byte names the coder: lz4 for planes that are mostly runs, which it finds at memory speed, or zstd at
its fastest level, whose entropy coder takes what lz4 cannot, bytes that are merely more or less likely.
"""

import threading

import lz4.block
import numpy as np
import numpy.typing as npt
import zstandard

from codec.errors import FrameError

Bytes = npt.NDArray[np.uint8]
Buffer = bytes | bytearray | memoryview

MAX_RATIO = 256
"""A stored plane never grows more than this: a small frame cannot claim a large one."""

_LZ4, _ZSTD = b"\0", b"\1"
_SAMPLE = 4096
_RUNS = 0.25
"""lz4 below this share of a sample: the plane is mostly runs."""
_WORTH = 0.95


class _Coders(threading.local):
    """zstd's contexts: dear to make, and not to be shared between threads."""

    def __init__(self) -> None:
        self.shrink = zstandard.ZstdCompressor(level=1)
        self.restore = zstandard.ZstdDecompressor()


_coders = _Coders()


def shrink(plane: Bytes) -> Buffer:
    """The plane as it is stored. `plane` is flat, contiguous uint8."""
    middle = max(0, plane.size // 2 - _SAMPLE // 2)
    sample = plane[middle : middle + _SAMPLE]
    runs = len(lz4.block.compress(sample.data, store_size=False)) < _RUNS * sample.size
    if not runs and len(_coders.shrink.compress(sample.data)) > _WORTH * sample.size:
        return plane.data
    packed = b"" if runs else _ZSTD + _coders.shrink.compress(plane.data)
    if runs or len(packed) * MAX_RATIO < plane.size:
        packed = _LZ4 + lz4.block.compress(plane.data, store_size=False)
    return packed if len(packed) < plane.size else plane.data


def fits(stored: int, elements: int) -> bool:
    """Whether a plane of `elements` bytes can be stored in `stored` bytes at all."""
    return 0 < stored <= elements <= MAX_RATIO * stored


def restore(stored: memoryview, elements: int) -> Bytes:
    """A plane's `elements` bytes. Raises `FrameError` if they are not what is stored.

    Check `fits` first: `elements` is allocated here.
    """
    if len(stored) == elements:
        return np.frombuffer(stored, dtype=np.uint8)
    coder, packed = bytes(stored[:1]), stored[1:]
    try:
        if coder == _LZ4:
            plane = lz4.block.decompress(packed, uncompressed_size=elements)
        elif coder == _ZSTD and zstandard.frame_content_size(packed) == elements:
            # The size is checked first: zstd would allocate whatever its frame declares.
            plane = _coders.restore.decompress(packed, max_output_size=elements)
        else:
            raise FrameError("a byte plane names no coder, or another size than its tensor's")
    except (lz4.block.LZ4BlockError, zstandard.ZstdError, ValueError, OverflowError):
        raise FrameError("a byte plane cannot be decompressed") from None
    if len(plane) != elements:
        raise FrameError(f"a byte plane holds {len(plane)} bytes, {elements} were declared")
    return np.frombuffer(plane, dtype=np.uint8)
