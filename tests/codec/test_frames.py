"""Tensor frames without torch: bytes to frames and back, and frames that lie."""

import math
import random
import time
import tracemalloc

import lz4.block
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codec.errors import FrameError
from codec.frames import ITEM_SIZES, check_specs, decode, encode_planes, encode_raw
from codec.limits import MAX_FRAME_BYTES, MAX_MESSAGE_BYTES, MAX_TENSORS
from codec.messages import DType, TensorSpec
from codec.planes import zstd

Bytes = npt.NDArray[np.uint8]

DTYPES: list[DType] = ["f32", "bf16", "f16"]
MANY = 8192
"""Elements: enough for planes to be worth it."""


def flat(data: bytes) -> Bytes:
    return np.frombuffer(data, dtype=np.uint8)


def activations(dtype: DType, elements: int, seed: int = 0) -> Bytes:
    """Gaussian values as flat bytes: the high plane shrinks and the low ones do not."""
    values = np.random.default_rng(seed).standard_normal(elements).astype(np.float32)
    if dtype == "f16":
        return values.astype(np.float16).view(np.uint8)
    if dtype == "bf16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    return values.view(np.uint8)


def checked(spec: TensorSpec, frame: bytes | bytearray) -> Bytes:
    """Held against the limits and decoded, as every received frame is."""
    check_specs([spec], [len(frame)])
    return decode(spec, frame)


# --- round trips -------------------------------------------------------------------------------------


@given(st.sampled_from(DTYPES), st.binary(max_size=400))
def test_raw_is_the_bytes_as_they_stand(dtype: DType, data: bytes) -> None:
    data = data[: len(data) // ITEM_SIZES[dtype] * ITEM_SIZES[dtype]]
    shape = (len(data) // ITEM_SIZES[dtype],)
    spec, frame = encode_raw(flat(data), dtype, shape)
    assert (spec.encoding, spec.sizes, spec.shape, spec.dtype) == ("raw", (len(data),), shape, dtype)
    assert bytes(frame) == data
    check_specs([spec], [len(data)])
    assert bytes(decode(spec, frame)) == data


def test_raw_copies_nothing_either_way() -> None:
    data = activations("f32", 100)
    spec, frame = encode_raw(data, "f32", (10, 10))
    assert np.shares_memory(np.frombuffer(frame, dtype=np.uint8), data)
    received = bytes(frame)
    assert np.shares_memory(decode(spec, received), flat(received))


@settings(max_examples=60)
@given(
    st.sampled_from(DTYPES),
    st.integers(4096, 20_000),
    st.lists(st.sampled_from(["constant", "random", "runs", "few"]), min_size=4, max_size=4),
    st.integers(0, 1000),
)
def test_planes_give_every_bit_back(dtype: DType, elements: int, kinds: list[str], seed: int) -> None:
    """Whatever each plane holds: some shrink, some do not, and the rest of a frame stays aligned."""
    rng, item = np.random.default_rng(seed), ITEM_SIZES[dtype]
    columns = np.empty((elements, item), dtype=np.uint8)
    for k in range(item):
        columns[:, k] = {
            "constant": np.full(elements, seed % 256),
            "random": rng.integers(0, 256, elements),
            "runs": np.repeat(rng.integers(0, 256, elements // 50 + 1), 50)[:elements],
            "few": rng.integers(0, 8, elements),
        }[kinds[k]]
    data = columns.reshape(-1)
    spec, frame = encode_planes(data, dtype, (elements,))
    size = memoryview(frame).nbytes
    check_specs([spec], [size])
    assert size == sum(spec.sizes) <= data.nbytes
    if {"constant", "runs"} & set(kinds[:item]):
        assert spec.encoding == "planes"
    elif set(kinds[:item]) == {"random"}:
        assert spec.encoding == "raw"
    assert np.array_equal(decode(spec, frame), data)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_planes_of_activations_save_what_the_exponent_wastes(dtype: DType) -> None:
    data = activations(dtype, 200_000)
    spec, frame = encode_planes(data, dtype, (200_000,))
    if dtype == "f16":
        assert memoryview(frame).nbytes <= data.nbytes  # its high byte holds two bits of mantissa
    else:
        assert spec.encoding == "planes"
        assert memoryview(frame).nbytes < 0.95 * data.nbytes
        assert spec.sizes[0] == 200_000  # the lowest plane is noise and is stored as it is
        assert spec.sizes[-1] < 150_000
    assert np.array_equal(decode(spec, frame), data)


def test_a_small_tensor_is_not_worth_planes() -> None:
    data = np.zeros(4 * 4095, dtype=np.uint8)
    assert encode_planes(data, "f32", (4095,))[0].encoding == "raw"
    assert encode_planes(np.zeros(4 * 4096, np.uint8), "f32", (4096,))[0].encoding == "planes"


def test_what_does_not_shrink_is_sent_raw() -> None:
    data = np.random.default_rng(0).integers(0, 256, 4 * MANY).astype(np.uint8)
    spec, frame = encode_planes(data, "f32", (MANY,))
    assert spec.encoding == "raw"
    assert np.shares_memory(np.frombuffer(frame, dtype=np.uint8), data)


def test_a_sample_that_misleads_costs_nothing_but_time() -> None:
    """A plane whose middle alone looks compressible is stored, never grown."""
    elements = 3_000_000
    columns = np.random.default_rng(0).integers(0, 256, (elements, 2)).astype(np.uint8)
    columns[elements // 2 : elements // 2 + 4096, 0] = 0
    columns[:, 1] = 7
    assert len(lz4.block.compress(columns[:, 0].tobytes(), store_size=False)) > elements
    data = columns.reshape(-1)
    spec, frame = encode_planes(data, "f16", (elements,))
    assert spec.encoding == "planes"
    assert spec.sizes[0] <= elements
    assert np.array_equal(checked(spec, bytes(frame)), data)


@pytest.mark.parametrize("coder", [0, 1])
def test_a_planes_frame_is_read_as_written_down(coder: int) -> None:
    """Plane by plane, lowest byte first: element i is (plane 0 [i], plane 1 [i]); 0 is lz4, 1 zstd."""
    packed = {
        0: lz4.block.compress(b"\x3f" * 4096, store_size=False),
        1: zstd.compress(b"\x3f" * 4096, level=19),
    }
    high = bytes([coder]) + packed[coder]
    low = bytes(range(256)) * 16
    spec = TensorSpec("bf16", (64, 64), "planes", (4096, len(high)))
    check_specs([spec], [4096 + len(high)])
    found = decode(spec, low + high)
    assert bytes(found[0::2]) == low
    assert bytes(found[1::2]) == b"\x3f" * 4096


# --- frames that lie ---------------------------------------------------------------------------------


def refused(spec: TensorSpec, size: int) -> str:
    """The refusal of one frame, which must have taken neither memory nor time."""
    tracemalloc.start()
    begun = time.monotonic()
    with pytest.raises(FrameError) as caught:
        check_specs([spec], [size])
    taken, peak = time.monotonic() - begun, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000
    assert taken < 0.5
    return caught.value.what


TERABYTE = 1 << 40

LIES = {
    "raw, too short": (TensorSpec("f32", (10,), "raw", (40,)), 39),
    "raw, too long": (TensorSpec("f32", (10,), "raw", (40,)), 41),
    "raw, said to be short": (TensorSpec("f32", (10,), "raw", (39,)), 39),
    "raw, of another dtype": (TensorSpec("bf16", (10,), "raw", (40,)), 40),
    "raw, in two parts": (TensorSpec("f32", (10,), "raw", (20, 20)), 40),
    "raw, a terabyte in a kilobyte": (TensorSpec("f32", (TERABYTE,), "raw", (4 * TERABYTE,)), 1024),
    "raw, a terabyte that says a kilobyte": (TensorSpec("f32", (TERABYTE,), "raw", (1024,)), 1024),
    "raw, shape over 64 bits": (TensorSpec("f32", (1 << 62, 1 << 62, 1 << 62, 4), "raw", (40,)), 40),
    "raw, shape that wraps to 40": (TensorSpec("f32", (1 << 63, 2, 1, 1), "raw", (0,)), 0),
    "raw, empty in an impossible shape": (TensorSpec("f32", (0, 1 << 63), "raw", (0,)), 0),
    "raw, empty with strides over 64 bits": (TensorSpec("f32", (0, *[1 << 27] * 3), "raw", (0,)), 0),
    "raw, empty yet long": (TensorSpec("f32", (0, TERABYTE), "raw", (40,)), 40),
    "planes, too few": (TensorSpec("f32", (MANY,), "planes", (MANY,) * 3), MANY * 3),
    "planes, too many": (TensorSpec("bf16", (MANY,), "planes", (MANY,) * 3), MANY * 3),
    "planes, other sum": (TensorSpec("bf16", (MANY,), "planes", (MANY, 100)), MANY + 101),
    "planes, longer than stored": (TensorSpec("bf16", (100,), "planes", (101, 99)), 200),
    "planes, of nothing": (TensorSpec("bf16", (0,), "planes", (0, 0)), 0),
    "planes, an empty one": (TensorSpec("bf16", (MANY,), "planes", (MANY, 0)), MANY),
    "planes, a terabyte in a kilobyte": (TensorSpec("bf16", (TERABYTE,), "planes", (512, 512)), 1024),
    "planes, a quarter gigabyte in a kilobyte": (
        TensorSpec("bf16", (MAX_FRAME_BYTES // 2,), "planes", (512, 512)),
        1024,
    ),
    "planes, one over what lz4 can": (TensorSpec("bf16", (256 * 512 + 1,), "planes", (512, 512)), 1024),
    "steps, without a step": (TensorSpec("f32", (4,), "steps", (4,), 0.0), 4),
    "steps, of infinity": (TensorSpec("f32", (4,), "steps", (4,), math.inf), 4),
    "steps, of a raw frame": (TensorSpec("f32", (4,), "raw", (16,), 0.5), 16),
    "steps, of nothing": (TensorSpec("f32", (0,), "steps", (4,), 0.5), 4),
    "steps, an empty plane": (TensorSpec("f32", (4,), "steps", (0,), 0.5), 0),
    "steps, a terabyte": (TensorSpec("f32", (TERABYTE,), "steps", (512, 512), 0.5), 1024),
    "steps, three planes": (TensorSpec("f32", (8,), "steps", (4, 4, 4), 0.5), 12),
    "steps, outliers without their parts": (TensorSpec("f32", (8,), "steps", (4, 4), 0.5, 1), 8),
    "steps, parts without outliers": (TensorSpec("f32", (8,), "steps", (4, 4, 4, 4), 0.5), 16),
    "steps, more outliers than an encoder sends": (
        TensorSpec("f32", (95,), "steps", (95, 32, 32), 0.5, 8),
        159,
    ),
    "steps, a million outliers in a kilobyte": (
        TensorSpec("f32", (1 << 20,), "steps", (512, 256, 256), 0.5, 1 << 20),
        1024,
    ),
    "planes, with outliers": (TensorSpec("bf16", (8,), "planes", (8, 8), 0.0, 1), 16),
    "blocks, with a step": (TensorSpec("f32", (64,), "blocks", (2, 64), 0.5), 66),
    "blocks, with outliers": (TensorSpec("f32", (64,), "blocks", (2, 64), 0.0, 1), 66),
    "blocks, without steps": (TensorSpec("f32", (64,), "blocks", (64,)), 64),
    "blocks, too few steps": (TensorSpec("f32", (65,), "blocks", (1, 65)), 66),
    "blocks, a terabyte": (TensorSpec("f32", (TERABYTE,), "blocks", (512, 512)), 1024),
    "over the limit": (
        TensorSpec("f32", (MAX_FRAME_BYTES // 4 + 1,), "raw", (MAX_FRAME_BYTES + 4,)),
        MAX_FRAME_BYTES + 4,
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_spec_that_lies_is_refused_before_anything_is_allocated(lie: str) -> None:
    spec, size = LIES[lie]
    assert refused(spec, size)


def test_the_largest_frame_and_message_are_allowed_and_no_more() -> None:
    spec = TensorSpec("f32", (MAX_FRAME_BYTES // 4,), "raw", (MAX_FRAME_BYTES,))
    fitting = MAX_MESSAGE_BYTES // MAX_FRAME_BYTES
    check_specs([spec] * fitting, [MAX_FRAME_BYTES] * fitting)
    one = TensorSpec("f16", (1,), "raw", (2,))
    with pytest.raises(FrameError, match=f"a message of {MAX_MESSAGE_BYTES + 2} bytes"):
        check_specs([*[spec] * fitting, one], [*[MAX_FRAME_BYTES] * fitting, 2])


def test_a_messages_limit_counts_what_planes_become() -> None:
    elements = MAX_FRAME_BYTES // 2
    spec = TensorSpec("bf16", (elements,), "planes", (elements // 256, elements // 256))
    size = elements // 256 * 2
    check_specs([spec] * 2, [size] * 2)
    with pytest.raises(FrameError, match="a message of"):
        check_specs([spec] * 3, [size] * 3)


@pytest.mark.parametrize(("specs", "frames"), [(1, 0), (0, 1), (2, 3)])
def test_as_many_frames_follow_as_the_header_declares(specs: int, frames: int) -> None:
    spec = TensorSpec("f32", (1,), "raw", (4,))
    with pytest.raises(FrameError, match=f"declares {specs} tensors, {frames} frames followed"):
        check_specs([spec] * specs, [4] * frames)


def test_a_message_has_so_many_tensors_and_no_more() -> None:
    spec = TensorSpec("f32", (0,), "raw", (0,))
    check_specs([spec] * MAX_TENSORS, [0] * MAX_TENSORS)
    with pytest.raises(FrameError, match=f"{MAX_TENSORS} are allowed"):
        check_specs([spec] * (MAX_TENSORS + 1), [0] * (MAX_TENSORS + 1))


INTS = st.one_of(st.integers(0, 40), st.sampled_from([1 << 20, 1 << 28, 1 << 40, 1 << 63, (1 << 64) - 1]))


@settings(max_examples=400)
@given(
    st.builds(
        TensorSpec,
        st.sampled_from(DTYPES),
        st.lists(INTS, max_size=4).map(tuple),
        st.sampled_from(["raw", "planes"]),
        st.lists(INTS, min_size=1, max_size=4).map(tuple),
    ),
    st.binary(max_size=40),
)
def test_any_spec_beside_any_frame_is_refused_or_decodes(spec: TensorSpec, frame: bytes) -> None:
    try:
        found = checked(spec, frame)
    except FrameError:
        return
    assert found.nbytes == math.prod(spec.shape) * ITEM_SIZES[spec.dtype]


@settings(max_examples=200)
@given(
    st.sampled_from(DTYPES),
    st.integers(0, 3),
    st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, 255)), min_size=1, max_size=30),
    st.integers(0, 1000),
)
def test_a_damaged_frame_is_refused_or_decodes(
    dtype: DType, shuffled: int, edits: list[tuple[int, int]], seed: int
) -> None:
    """Bytes changed, and sometimes the parts of the spec moved against each other."""
    columns = np.random.default_rng(seed).integers(0, 4, (MANY, ITEM_SIZES[dtype])).astype(np.uint8)
    spec, frame = encode_planes(columns.reshape(-1), dtype, (MANY,))
    assert spec.encoding == "planes"
    damaged = bytearray(frame)
    for at, value in edits:
        damaged[at % len(damaged)] = value
    if shuffled:
        sizes = list(spec.sizes)
        random.Random(shuffled).shuffle(sizes)
        sizes[0], sizes[-1] = sizes[0] + shuffled, sizes[-1] - shuffled
        spec = TensorSpec(spec.dtype, spec.shape, spec.encoding, tuple(sizes))
    try:
        found = checked(spec, damaged)
    except FrameError:
        return
    assert found.nbytes == columns.nbytes


@pytest.mark.parametrize("held", [MANY - 1, MANY + 1, 0, 16 * MANY])
def test_a_plane_that_holds_another_size_is_refused(held: int) -> None:
    """Decompression stops at the declared size: a bomb is not unpacked to see how large it is."""
    part = lz4.block.compress(bytes(held), store_size=False)
    spec = TensorSpec("bf16", (MANY,), "planes", (MANY, len(part)))
    frame = bytes(MANY) + part
    with pytest.raises(FrameError, match="plane"):
        checked(spec, frame)


def test_a_bomb_of_many_planes_is_held_to_the_message_limit() -> None:
    """Highly compressible planes at the edge of what a kilobyte may claim: 255 KiB, and no more."""
    claimed = 256 * 512
    part = lz4.block.compress(bytes(64 * claimed), store_size=False)[:512]
    spec = TensorSpec("bf16", (claimed,), "planes", (512, 512))
    tracemalloc.start()
    check_specs([spec], [1024])
    with pytest.raises(FrameError):
        decode(spec, part.ljust(512, b"\x00") * 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * claimed
