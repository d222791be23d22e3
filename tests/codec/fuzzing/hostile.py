"""Planes and frames that no encoder of ours writes: bombs, and sizes that lie, in the coders' own words."""

import struct
import sys
from random import Random
from typing import Any

import lz4.block
import numpy as np

from codec.frames import BLOCK, ITEM_SIZES, encode_steps
from codec.limits import MASK_PER_RUN, MAX_MASK
from codec.messages import DType, Encoding

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

LZ4, ZSTD = b"\0", b"\1"
_MAGIC = struct.pack("<I", 0xFD2FB528)
LARGEST: dict[DType, float] = {"f32": 2.0**128 - 2.0**104, "bf16": 2.0**128 - 2.0**120, "f16": 65504.0}
_MOST = 1 << 20
"""Bytes that one bomb here really holds: more only costs time, since a decoder must stop long before."""


def zstd_frame(content: int | None, window_log: int, blocks: bytes, *, checksum: bool = False) -> bytes:
    """A zstd frame (RFC 8878) that declares `content` bytes and a window of `2**window_log`."""
    size = b"" if content is None else struct.pack("<Q", content % (1 << 64))
    return (
        _MAGIC + bytes([(0xC0 if size else 0) | 4 * checksum, max(0, window_log - 10) << 3]) + size + blocks
    )


def run_blocks(total: int, value: int = 0) -> bytes:
    """zstd blocks that make `total` times `value`, 128 KiB of every four bytes."""
    sizes = [1 << 17] * (total >> 17) + [total & 0x1FFFF]
    return b"".join(
        struct.pack("<I", size << 3 | 2 | (at == len(sizes) - 1))[:3] + bytes([value])
        for at, size in enumerate(sizes)
    )


_FLOOD = run_blocks(1 << 30)
"""A GiB in 32 KiB: for a decoder that lets a frame make what it likes."""


def _lz4(length: int) -> bytes:
    """A plane of zeros."""
    packed: bytes = lz4.block.compress(bytes(length), store_size=False)
    return LZ4 + packed


def plane(rng: Random, length: int) -> bytes:
    """What may stand for a plane of `length` bytes: right, or wrong in one of many ways."""
    length = max(0, min(length, _MOST))
    other = rng.choice([max(0, length - 1), length + 1, 2 * length, min(_MOST, 256 * length), _MOST, 0])
    more = rng.choice([_FLOOD, run_blocks(other), run_blocks(length)])
    data = bytes(length) if rng.random() < 0.5 else rng.randbytes(length)
    match rng.randrange(12):
        case 0:
            return _lz4(length)
        case 1:
            return _lz4(other)
        case 2:  # The size stands before the block, where this codec has none.
            return LZ4 + struct.pack("<I", length) + _lz4(length)[1:]
        case 3:  # A run of literals that never ends.
            return LZ4 + b"\xf0" + b"\xff" * rng.randrange(1, 300)
        case 4:
            return ZSTD + zstd.compress(data, rng.choice([1, 3]))
        case 5:  # Right about its size, and then made of more.
            return ZSTD + zstd_frame(length, 17, more)
        case 6:  # Right about its size or silent, and wants a window of up to 2 TiB.
            return ZSTD + zstd_frame(rng.choice([length, None]), rng.randrange(10, 42), run_blocks(length))
        case 7:
            huge = rng.choice([None, 0, other, 1 << 31, 1 << 32, 1 << 42, 1 << 63, (1 << 64) - 1])
            return ZSTD + zstd_frame(huge, 17, more, checksum=rng.random() < 0.3)
        case 8:  # A frame to be skipped, that claims 4 GiB or just enough, and a real one.
            skipped = rng.choice([0xFFFFFFFF, 4, 0])
            return ZSTD + struct.pack("<II", 0x184D2A50, skipped) + bytes(4) + zstd.compress(data, 1)
        case 9:
            return ZSTD + 2 * zstd.compress(data[: length // 2], 1)
        case 10:
            return data
    return rng.randbytes(1 + rng.randrange(16))


def mask(rng: Random) -> tuple[list[int], bytes]:
    """A mask's spec and frame whose runs add up to its elements, though some may be none, or negative."""
    queries, keys = 1 << rng.randrange(27), rng.choice([1, 2, 3, 64, 65])
    if queries * (keys + 63 & ~63) <= MAX_MASK:
        queries = min(queries, 1 << 16)  # Right, and so large a mask is slow to make.
    elements = queries * keys
    runs = [
        rng.randint(-2, 1 + elements // 8)
        for _ in range(rng.randrange(min(12, elements // MASK_PER_RUN + 1)))
    ]
    runs.append(elements - sum(runs))
    steps = runs[:2] + [run - before for before, run in zip(runs, runs[2:], strict=False)]
    values = [2 * step if step >= 0 else -2 * step - 1 for step in steps]
    width = max(values).bit_length()
    bits = "".join(f"{value:0{width}b}" for value in values)
    bits += "0" * (-len(bits) % 8)
    return [queries, keys, len(runs), width], int(bits or "0", 2).to_bytes(len(bits) // 8)


def brim(rng: Random) -> tuple[list[Any], bytes]:
    """A quantised tensor whose largest number is the largest that its dtype holds, or just beyond."""
    dtype: DType = rng.choice(sorted(ITEM_SIZES))
    value = rng.choice([1, -1]) * rng.randint(129, 1 << 12)
    nearly = rng.choice([0, 0, -(2.0**-53), 2.0**-52, -(2.0**-25), 2.0**-24])
    step = LARGEST[dtype] / abs(value) * (1 + nearly)
    codes = np.zeros((1, rng.randrange(1, 100)), dtype=np.uint8)
    at = np.array([rng.randrange(codes.size)])
    spec, frame = encode_steps(codes, at, np.array([value]), step, dtype, (codes.size,))
    return [dtype, [codes.size], "steps", list(spec.sizes), step, 1], bytes(frame)


def bomb(dtype: DType, encoding: Encoding, elements: int) -> tuple[list[Any], bytes]:
    """A right tensor of almost zeros, as a spec's fields and its frame: what a byte may at most become."""
    lengths = {
        "raw": [elements * ITEM_SIZES[dtype]],
        "planes": [elements] * ITEM_SIZES[dtype],
        "steps": [elements],
        "blocks": [-(-elements // BLOCK) * 2, elements],
    }[encoding]
    parts = [_lz4(length) for length in lengths]
    if encoding in ("raw", "blocks"):  # What is never shrunk.
        parts[0] = bytes(lengths[0])
    step = 0.5 if encoding == "steps" else 0.0
    return [dtype, [elements], encoding, [len(part) for part in parts], step, 0], b"".join(parts)
