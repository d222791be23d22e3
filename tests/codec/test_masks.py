"""Masks as bit-packed runs: any boolean mask and back, how small, and frames that lie."""

import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

import lz4.block
import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from codec.errors import FrameError, UsageError
from codec.masks import MAX_MASK, Mask, MaskSpec, check_mask, decode_mask, encode_mask
from codec.planes import MAX_RATIO, zstd

# --- masks -------------------------------------------------------------------------------------------


def grid(width: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    return np.arange(width)[:, None], np.arange(width)[None, :]


def causal(width: int) -> Mask:
    queries, keys = grid(width)
    return keys <= queries


def window(width: int, reach: int) -> Mask:
    queries, keys = grid(width)
    return (keys <= queries) & (keys > queries - reach)


def blocks(width: int, lengths: list[int]) -> Mask:
    """Block-diagonal: `lengths`, again and again, until `width` is full."""
    of = np.repeat(np.arange(width), np.resize(lengths, width))[:width]
    return np.equal(of[:, None], of)


def padded(mask: Mask, left: int, right: int) -> Mask:
    """No query and no key within the padding."""
    kept = (np.arange(len(mask)) >= left) & (np.arange(len(mask)) < len(mask) - right)
    return mask & kept[:, None] & kept[None, :]


def packing(width: int, least: int, most: int) -> Mask:
    return blocks(width, np.random.default_rng(least).integers(least, most, width).tolist())


def kinds(width: int) -> dict[str, Mask]:
    """The masks in use, and what they make together."""
    queries, keys = grid(width)
    lower, packed = causal(width), packing(width, 20, 200)
    prefix, starts = lower | (keys < width // 3), np.argmax(packed, axis=1)[:, None]
    return {
        "causal": lower,
        "prefix": prefix,
        "packing, short": lower & packing(width, 16, 64),
        "packing, middling": lower & packed,
        "packing, long": lower & packing(width, 100, 600),
        "packing, both ways": packed,
        "window": window(width, 256),
        "window, both ways": abs(queries - keys) < 64,
        "padding left": padded(lower, width // 7, 0),
        "padding right": padded(lower, 0, width // 7),
        "padding of keys alone": lower & (keys >= width // 7),
        "prefix and window": window(width, 128) | (lower & (keys < 50)),
        "prefix in packing": packed & (lower | (keys < starts + 8)),
        "packing and window": packed & window(width, 128),
        "packing and window, padded": padded(packed & window(width, 64), 33, 100),
        "window and global tokens": (abs(queries - keys) < 64) | (queries % 128 == 0) | (keys % 128 == 0),
        "keys dropped at random": lower & (np.random.default_rng(0).random(width) < 0.9),
    }


def decoded(mask: Mask) -> tuple[MaskSpec, bytes]:
    """Encoded, and decoded again to just what it was; a spec that crosses as a header's part does."""
    spec, frame = encode_mask(mask)
    assert len(frame) <= -(-mask.size // 8)
    crossed = msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=MaskSpec)
    check_mask(crossed, len(frame))
    found = decode_mask(crossed, memoryview(frame))
    assert found.dtype == np.bool_
    assert np.array_equal(found, mask)  # shapes too
    return spec, frame


# --- round trips -------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=70)))
def test_any_mask_comes_back_exactly(mask: Mask) -> None:
    decoded(mask)


@settings(max_examples=100)
@given(
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.lists(st.tuples(*[st.integers(0, 300)] * 4), max_size=6),
    st.sampled_from([0, 0, 0.001, 0.03, 0.5]),
)
def test_any_mask_of_few_runs_or_many_comes_back_exactly(
    shape: tuple[int, int], rectangles: list[tuple[int, int, int, int]], noise: float
) -> None:
    mask = np.random.default_rng(len(rectangles)).random(shape) < noise
    for top, height, left, width in rectangles:
        mask[top : top + height, left : left + width] ^= True
    decoded(mask)


@pytest.mark.parametrize("shape", [(0, 0), (0, 7), (7, 0), (1, 1), (1, 1000), (1000, 1), (64, 64), (65, 129)])
@pytest.mark.parametrize("value", [False, True])
def test_a_mask_of_one_value_comes_back_exactly(shape: tuple[int, int], value: bool) -> None:
    spec, frame = decoded(np.full(shape, value))
    assert spec.runs <= 3
    assert len(frame) < 17
    assert (frame == b"") == (0 in shape)


def test_a_mask_may_lie_in_memory_as_it_likes() -> None:
    mask = packing(200, 20, 60) & causal(200)
    for view in (mask.T, mask[::-1], mask[::3, 1::2], np.broadcast_to(mask[:1], (90, 200))):
        decoded(view)


@pytest.mark.parametrize("shape", [(MAX_MASK // 64, 64), (MAX_MASK // 64, 1), (1, MAX_MASK)])
def test_the_largest_masks_come_back_exactly(shape: tuple[int, int]) -> None:
    mask = np.zeros(shape, dtype=np.bool_)
    mask[0, 0] = mask[-1, -1] = True
    decoded(mask)


def test_what_is_no_mask_is_not_encoded() -> None:
    with pytest.raises(UsageError, match=r"bool \[queries, keys\], this one is int64 \[2, 2\]"):
        encode_mask(np.zeros((2, 2), dtype=np.int64))
    with pytest.raises(UsageError, match=r"this one is bool \[2, 2, 2\]"):
        encode_mask(np.zeros((2, 2, 2), dtype=np.bool_))
    for shape in ((1, MAX_MASK + 1), (MAX_MASK // 64 + 1, 1)):
        with pytest.raises(UsageError, match=f"over {MAX_MASK} elements"):
            encode_mask(np.broadcast_to(np.False_, shape))


# --- sizes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [920, 4096])
@pytest.mark.parametrize("kind", kinds(64))
def test_a_mask_in_use_takes_a_hundredth_of_its_bits(kind: str, width: int) -> None:
    """1 % of the mask at one *bit* an element, the harder of the two measures: 0.125 % of its bytes."""
    mask = kinds(width)[kind]
    assert 800 * len(decoded(mask)[1]) <= mask.size


@settings(max_examples=60, deadline=None)
@given(
    st.integers(920, 1500),
    st.lists(st.integers(24, 700), min_size=1, max_size=80),
    st.integers(24, 1500),
    st.integers(0, 700),
    st.integers(0, 150),
    st.integers(0, 150),
)
def test_masks_in_use_together_take_a_hundredth_of_their_bits(
    width: int, lengths: list[int], reach: int, prefix: int, left: int, right: int
) -> None:
    """The same 1 % of one bit an element: a packing of any lengths, a window, a prefix and padding."""
    seen = window(width, reach) | (np.arange(width) < prefix)
    mask = padded(seen & blocks(width, lengths), left, right)
    assert 800 * len(decoded(mask)[1]) <= mask.size


def test_a_mask_without_runs_takes_its_bits_and_no_more() -> None:
    mask = np.random.default_rng(0).random((920, 920)) < 0.5
    spec, frame = decoded(mask)
    assert (spec.runs, spec.width) == (0, 0)
    assert len(frame) == mask.size // 8


# --- the format --------------------------------------------------------------------------------------


def test_the_runs_of_a_mask_are_written_as_they_always_were() -> None:
    """Queries 0 and 1 see keys 0 to 9, queries 2 and 3 see 5 to 19.

    Toggles: row 0 at 0 to 9, row 2 at 0 to 4 and 10 to 19. Runs 0 10 118 5 5 10 108, to the run before
    the last 0 10 118 -5 -113 5 103, zigzagged 0 20 236 9 225 10 206: 8 bits each.
    """
    mask = np.zeros((4, 64), dtype=np.bool_)
    mask[:2, :10] = mask[2:, 5:20] = True
    spec, frame = decoded(mask)
    assert msgspec.msgpack.encode(spec).hex() == "9404400708"
    assert frame.hex() == "0014ec09e10ace"


def test_runs_of_a_width_that_is_no_byte_fill_bits_from_the_highest() -> None:
    """A prefix of 10 keys: runs 0 10 246, zigzagged 0 20 492 at 9 bits, and 5 bits to fill the byte."""
    mask = np.broadcast_to(np.arange(64) < 10, (4, 64))
    spec, frame = decoded(mask)
    assert spec == MaskSpec(4, 64, 3, 9)
    assert frame.hex() == f"{0b000000000_000010100_111101100_00000:08x}"


def test_the_bits_of_a_mask_are_written_as_they_always_were() -> None:
    """Causal, 3 queries and 5 keys: each row toggles one more key than the row above."""
    spec, frame = decoded(np.tri(3, 5, dtype=np.bool_))
    assert msgspec.msgpack.encode(spec).hex() == "9403050000"
    assert frame.hex() == f"{0b10000_01000_00100_0:04x}"


def plane_of(runs: list[int], width: int) -> bytes:
    """Runs as they are written down, one by one and not by numpy."""
    steps = [run - (runs[i - 2] if i > 1 else 0) for i, run in enumerate(runs)]
    text = "".join(f"{2 * step if step >= 0 else -2 * step - 1:0{width}b}" for step in steps)
    assert len(text) == len(runs) * width
    return int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(-(-len(text) // 8))


@pytest.mark.parametrize("coder", [0, 1, None])
@pytest.mark.parametrize("width", [8, 11, 28])
def test_a_frame_is_read_as_written_down(coder: int | None, width: int) -> None:
    """A causal mask toggles on its diagonal. As a byte plane is stored: 0 is lz4, 1 zstd, or as it is."""
    runs = [0, *[1, 96] * 95, 1]
    assert sum(runs) == 96 * 96
    plane = plane_of(runs, width)
    frame = {
        0: b"\0" + lz4.block.compress(plane, store_size=False),
        1: b"\1" + zstd.compress(plane, level=19),
        None: plane,
    }[coder]
    assert np.array_equal(decode_mask(MaskSpec(96, 96, len(runs), width), frame), causal(96))
    assert encode_mask(causal(96))[0] == MaskSpec(96, 96, len(runs), 8)


# --- frames that lie ---------------------------------------------------------------------------------


@contextmanager
def next_to_nothing() -> Iterator[None]:
    """What is within may allocate next to nothing, and must raise `FrameError`."""
    tracemalloc.start()
    with pytest.raises(FrameError) as caught:
        yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000
    assert "mask" in caught.value.what or "plane" in caught.value.what


MANY, TERABYTE = 8192, 1 << 40
LIES = {
    "four terabytes in a kilobyte": (MaskSpec(TERABYTE, 4, 8, 28), 1024),
    "four terabytes of bits in a kilobyte": (MaskSpec(1 << 21, 1 << 21, 0, 0), 1024),
    "a shape over 64 bits": (MaskSpec(1 << 62, 1 << 62, 1, 1), 1),
    "empty in an impossible shape": (MaskSpec(0, 1 << 63, 0, 0), 0),
    "empty in another impossible shape": (MaskSpec(1 << 63, 0, 0, 0), 0),
    "one row over the limit": (MaskSpec(MANY + 1, MANY, 1, 27), 4),
    "one key over the limit": (MaskSpec(MANY, MANY + 1, 1, 27), 4),
    "narrow rows that words would make wide": (MaskSpec(MAX_MASK // 32, 1, 1, 27), 4),
    "bits, too short": (MaskSpec(64, 64, 0, 0), 1),
    "bits, too long": (MaskSpec(64, 64, 0, 0), 513),
    "bits, one over what lz4 can": (MaskSpec(8 * MAX_RATIO + 1, 10, 0, 0), 10),
    "bits, of nothing": (MaskSpec(0, 64, 0, 0), 1),
    "bits, none": (MaskSpec(64, 64, 0, 0), 0),
    "bits, with a width": (MaskSpec(64, 64, 0, 9), 512),
    "runs, of nothing": (MaskSpec(0, 64, 1, 9), 2),
    "runs, without a width": (MaskSpec(64, 64, 8, 0), 1),
    "runs, none": (MaskSpec(64, 64, 8, 9), 0),
    "runs, too short": (MaskSpec(MANY, MANY, 8 * MAX_RATIO, 9), 8),
    "runs, too long": (MaskSpec(64, 64, 8, 9), 10),
    "runs, too many": (MaskSpec(64, 64, 129, 9), 146),
    "runs, too wide": (MaskSpec(64, 64, 8, 29), 29),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_spec_that_lies_is_refused_before_anything_is_allocated(lie: str) -> None:
    spec, size = LIES[lie]
    with next_to_nothing():
        check_mask(spec, size)
    frame = bytes(size)
    with next_to_nothing():
        decode_mask(spec, frame)


def test_the_limits_themselves_are_allowed() -> None:
    check_mask(MaskSpec(MANY, MANY, 0, 0), MAX_MASK // 8)
    check_mask(MaskSpec(MANY, MANY, 0, 0), MAX_MASK // 8 // MAX_RATIO)
    check_mask(MaskSpec(MANY, MANY, MAX_MASK // 32, 28), MAX_MASK // 32 * 28 // 8)
    check_mask(MaskSpec(MAX_MASK // 64, 64, 1, 28), 4)


BAD_RUNS = {
    "one element short": [0, 10, 117, 5, 5, 10, 108],
    "one element long": [0, 10, 119, 5, 5, 10, 108],
    "negative first": [-5, 15, 246],
    "negative within": [0, 200, -100, 156],
    "empty within": [10, 0, 246],
    "over the mask and back": [0, 300, -44],
}


@pytest.mark.parametrize("kind", BAD_RUNS)
def test_runs_that_do_not_make_the_mask_are_refused(kind: str) -> None:
    runs = BAD_RUNS[kind]
    with pytest.raises(FrameError, match="the runs of a mask do not make 4 by 64"):
        decode_mask(MaskSpec(4, 64, len(runs), 28), plane_of(runs, 28))


def test_runs_that_lie_about_the_largest_mask_cost_next_to_nothing() -> None:
    for runs in ([MAX_MASK - 1], [0, MAX_MASK - 1], [0, 1 << 26, 1 << 26], [1] * 100):
        frame = plane_of(runs, 28)
        with next_to_nothing():
            decode_mask(MaskSpec(MANY, MANY, len(runs), 28), frame)


def test_runs_whose_sum_wraps_to_the_masks_elements_are_refused() -> None:
    """As many runs as may be: of False 1 each, of True ever longer, and all together 2**64 too many."""
    half = MAX_MASK // 64
    step, rest = divmod((1 << 64) + MAX_MASK - half, half * (half + 1) // 2)
    steps = np.zeros((half, 2), dtype=np.int64)
    steps[0, 0], steps[:, 1] = 1, step
    weights = np.arange(half, 0, -1)
    first = int(np.searchsorted(weights.cumsum(), rest, side="right"))
    steps[:first, 1] += 1
    steps[half - (rest - int(weights[:first].sum())), 1] += 1
    assert steps.cumsum(axis=0).sum() == MAX_MASK
    bits = np.unpackbits((2 * steps).astype(">u4").view(np.uint8)).reshape(-1, 32)[:, 4:]
    frame = bytes(np.packbits(bits))
    with pytest.raises(FrameError, match="the runs of a mask"):
        decode_mask(MaskSpec(MANY, MANY, 2 * half, 28), frame)


INTS = st.one_of(st.integers(0, 40), st.sampled_from([256, 1 << 13, 1 << 20, 1 << 40, (1 << 64) - 1]))


@settings(max_examples=400)
@given(st.builds(MaskSpec, INTS, INTS, INTS, INTS), st.binary(max_size=40))
def test_any_spec_beside_any_frame_is_refused_or_decodes(spec: MaskSpec, frame: bytes) -> None:
    try:
        found = decode_mask(spec, frame)
    except FrameError:
        return
    assert found.dtype == np.bool_
    assert found.shape == (spec.queries, spec.keys)


DAMAGED = kinds(200) | {
    "noise": np.random.default_rng(0).random((90, 90)) < 0.5,
    "few": blocks(64, [20, 44]),  # stored as it is: what is changed are the runs themselves
}


@settings(max_examples=300)
@given(
    st.sampled_from(["causal", "packing, short", "keys dropped at random", "noise", "few"]),
    st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, 255)), max_size=8),
    st.tuples(*[st.sampled_from([0, 0, 0, 0, 1, -1])] * 4),
    st.sampled_from([0, 0, 0, 1, -1]),
)
def test_a_damaged_frame_is_refused_or_decodes(
    kind: str, edits: list[tuple[int, int]], moved: tuple[int, ...], longer: int
) -> None:
    """Bytes changed, one more or one less, and what the spec declares moved."""
    mask = DAMAGED[kind]
    spec, frame = encode_mask(mask)
    damaged = bytearray(frame)
    for at, value in edits:
        damaged[at % len(damaged)] = value
    damaged = damaged + b"\0" if longer > 0 else damaged[: len(damaged) + longer]
    fields = (spec.queries, spec.keys, spec.runs, spec.width)
    spec = MaskSpec(*(max(0, field + by) for field, by in zip(fields, moved, strict=True)))
    try:
        found = decode_mask(spec, damaged)
    except FrameError:
        return
    assert found.dtype == np.bool_
    assert found.shape == (spec.queries, spec.keys)


OTHERS: list[tuple[object, ...]] = [(4, 64, 7), (4, 64, 7, 8, 0), (-4, 64, 7, 8), (4, 64, 7, "8")]
OTHERS += [(MAX_MASK + 1, 1, 0, 0), (1, MAX_MASK + 1, 0, 0), (1, 1, MAX_MASK // 32 + 1, 1), (1, 1, 1, 29)]


@pytest.mark.parametrize("fields", OTHERS)
def test_a_spec_of_other_fields_or_over_its_bounds_is_refused(fields: tuple[object, ...]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(fields), type=MaskSpec)


def test_masks_need_no_torch() -> None:
    code = "import sys, codec.masks; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
