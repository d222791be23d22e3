"""Planes: shrinking one plane of bytes, and getting it back without trust.

A plane that nothing shrinks is stored as it is: its stored size is its length. Otherwise its first
byte names the coder: lz4 for planes that are mostly runs, which it finds at memory speed, or zstd,
whose Huffman coder takes what lz4 cannot, bytes that are merely more or less likely.
"""

import sys

import lz4.block
import numpy as np
import numpy.typing as npt

from codec.errors import FrameError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Bytes = npt.NDArray[np.uint8]
Buffer = bytes | bytearray | memoryview

MAX_RATIO = 256
"""A stored plane never grows more than this: a small frame cannot claim a large one."""

_LZ4, _ZSTD = b"\0", b"\1"
_SAMPLE = 4096
_RUNS = 0.25
"""lz4 below this share of a sample: the plane is mostly runs."""
_WORTH = 0.95
_WINDOW_LOG = 17
"""zstd's window, 128 KiB: what a frame can make a decoder hold beside the plane itself."""

_HUFFMAN_ALONE: dict[int, int] = {
    zstd.CompressionParameter.compression_level: 1,
    zstd.CompressionParameter.window_log: _WINDOW_LOG,
    zstd.CompressionParameter.hash_log: 6,
    zstd.CompressionParameter.min_match: 7,
    zstd.CompressionParameter.strategy: zstd.Strategy.fast,
    # Step over the plane without looking for repetitions: there are none worth having, and with
    # usual settings the search takes twice as long as the coding and makes the result larger.
    zstd.CompressionParameter.target_length: 1 << 17,
    # Code literals all the same (ZSTD_c_literalCompressionMode = ZSTD_lcm_huffman): a strategy this
    # fast would leave them as they are.
    1002: 1,
}
_BOUNDED: dict[int, int] = {zstd.DecompressionParameter.window_log_max: _WINDOW_LOG}


def shrink(plane: Bytes) -> Buffer:
    """The plane as it is stored. `plane` is flat, contiguous uint8."""
    middle = max(0, plane.size // 2 - _SAMPLE // 2)
    sample = plane[middle : middle + _SAMPLE]
    runs = len(lz4.block.compress(sample.data, store_size=False)) < _RUNS * sample.size
    if not runs and len(_huffman(sample)) > _WORTH * sample.size:
        return plane.data
    packed = b"" if runs else _huffman(plane)
    if runs or len(packed) * MAX_RATIO < plane.size:
        packed = _LZ4 + lz4.block.compress(plane.data, store_size=False)
    return packed if len(packed) < plane.size else plane.data


def _huffman(plane: Bytes) -> bytes:
    return _ZSTD + zstd.compress(plane.data, options=_HUFFMAN_ALONE)


def fits(stored: int, length: int) -> bool:
    """Whether a plane of `length` bytes can be stored in `stored` bytes at all."""
    return 0 < stored <= length <= MAX_RATIO * stored


def restore(stored: memoryview, length: int) -> Bytes:
    """A plane's `length` bytes. Raises `FrameError` if they are not what is stored.

    Check `fits` first: `length` is allocated here.
    """
    if len(stored) == length:
        return np.frombuffer(stored, dtype=np.uint8)
    coder, packed = bytes(stored[:1]), stored[1:]
    try:
        if coder == _LZ4:
            plane = lz4.block.decompress(packed, uncompressed_size=length)
        elif coder == _ZSTD and zstd.get_frame_info(packed).decompressed_size == length:
            # The size is checked first, and bounds what is made of the frame whatever it holds.
            plane = zstd.ZstdDecompressor(options=_BOUNDED).decompress(packed, max_length=length)
        else:
            raise FrameError("a plane names no coder, or another size than its tensor's")
    except (lz4.block.LZ4BlockError, zstd.ZstdError, ValueError, OverflowError):
        raise FrameError("a plane cannot be decompressed") from None
    if len(plane) != length:
        raise FrameError(f"a plane holds {len(plane)} bytes, {length} were declared")
    return np.frombuffer(plane, dtype=np.uint8)
