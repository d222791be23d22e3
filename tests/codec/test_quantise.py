"""Quantised tensors: how far a value moves, what a frame costs, and what is refused."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codec import quantise
from codec.errors import FrameError
from codec.frames import check_specs
from codec.messages import Result as ResultHeader
from codec.messages import TensorSpec, Wire, decode_header, encode_header
from codec.quantise import BLOCK, GRADIENT_SHARE, SHARE, Size
from codec.tensors import decode_tensors, encode_tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES: list[tuple[int, ...]] = [
    (),
    (1,),
    (0,),
    (3, 0),
    (1, 576),
    (129, 67),
    (5, 3, 7, 2),
    (4096, 3),
    (81, 81),
]
BLOCK_WIRES: dict[Wire, int] = {"q8": 8, "q7": 7, "q6": 6, "q5": 5, "q4": 4}


def crossed(
    tensor: torch.Tensor, step: float = 0.0, *, wire: Wire = "steps", stochastic: bool = False
) -> tuple[TensorSpec, torch.Tensor]:
    """Encoded, its spec sent in a header, checked and decoded as on the other side."""
    spec, frame = encode_tensor(tensor, wire, "head", step=step, stochastic=stochastic)
    header = decode_header(encode_header(ResultHeader(tensors=(spec,))))
    check_specs(header.tensors, [memoryview(frame).nbytes])
    (back,) = decode_tensors(header.tensors, [bytes(frame)], boundary="head")
    assert back.dtype == tensor.dtype or spec.dtype == "bf16"
    assert back.shape == tensor.shape
    return spec, back


# --- steps -------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=0, max_size=300),
    st.sampled_from(DTYPES),
    st.floats(1e-3, 10.0),
)
def test_no_value_moves_by_more_than_half_a_step(
    values: list[float], dtype: torch.dtype, step: float
) -> None:
    tensor = torch.tensor(values, dtype=dtype)
    spec, back = crossed(tensor, step)
    moved = (back.double() - tensor.double()).abs()
    # Casting back to the dtype it crossed in rounds once more; fp32 holds 24 bits of a code.
    slack = tensor.double().abs() * torch.finfo(back.dtype).eps * 2
    # Where the step is too fine for bytes bf16 crossed, which is as exact as its own eps.
    assert bool((moved <= step / 2 * (spec.encoding == "steps") + slack + 1e-6).all())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_shape_and_dtype_crosses(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randn(shape).to(dtype)
    typical = float(tensor.float().square().mean().sqrt()) if tensor.numel() else 1.0
    # A row of a few elements may be several times the typical one: half a step of the largest.
    assert torch.allclose(crossed(tensor)[1].float(), tensor.float(), atol=4 * SHARE * typical, rtol=2**-8)
    assert torch.equal(crossed(torch.zeros(shape, dtype=dtype))[1], torch.zeros(shape, dtype=dtype))


def test_non_contiguous_tensors_cross() -> None:
    tensor = torch.randn(64, 96).T
    assert torch.allclose(crossed(tensor, 0.1)[1], tensor, atol=0.0501)
    assert torch.allclose(crossed(torch.randn(1, 5).expand(7, 5), 0.1)[1].std(0), torch.zeros(5), atol=1e-6)


@pytest.mark.parametrize("elements", [1, 2, 7, 4095, 4096, 4097, 70_001])
@pytest.mark.parametrize("scale", [0.5, 5.0, 60.0])
def test_codes_survive_in_bytes_and_in_nibbles(elements: int, scale: float) -> None:
    """Small codes cross as bytes, larger ones as nibbles with outliers: every integer comes back."""
    torch.manual_seed(elements)
    codes = (torch.randn(elements) * scale).round()
    spec, back = crossed(codes, 1.0)
    assert torch.equal(back, codes)
    outliers = int(((codes > 127) | (codes < -128)).sum())
    assert spec.outliers == outliers if outliers * 12 <= elements else spec.dtype == "bf16"


def test_codes_survive_their_whole_range() -> None:
    values = [0.0, 1, -1, 126, 127, 128, -127, -128, -129, 255, -256, 32767, -32768, 65535, -65536]
    values += [2.0**22 - 1, 1 - 2.0**22, 2.0**24, -(2.0**29)]
    codes = torch.zeros(400)
    codes[10 : 10 + len(values)] = torch.tensor(values)
    spec, back = crossed(codes, 1.0)
    assert torch.equal(back, codes)
    assert spec.outliers == 12


@pytest.mark.parametrize("tensor", [torch.randn(100, 100), torch.tensor([1e30, *[0.0] * 8191])])
def test_a_step_too_fine_for_bytes_crosses_as_bf16(tensor: torch.Tensor) -> None:
    """Where outliers are the rule, or one is beyond 32 bits, bf16 is cheaper, and as exact."""
    spec, back = crossed(tensor, 1e-4)
    assert (spec.encoding, spec.dtype) == ("planes", "bf16")
    assert torch.equal(back, tensor.to(torch.bfloat16))


@pytest.mark.parametrize("rows", [1, 64])
def test_hidden_states_are_measured_by_their_typical_row(rows: int) -> None:
    """One row a thousand times the rest does not make the rest coarse."""
    tensor = torch.randn(rows, 256)
    plain = crossed(tensor)[0].step
    assert plain == pytest.approx(SHARE, rel=0.2)
    massive = torch.cat((tensor, 1000 * tensor[:1], tensor))
    if rows > 1:
        assert crossed(massive)[0].step == pytest.approx(plain, rel=0.05)


def test_gradients_are_measured_by_all_of_them() -> None:
    """Most rows of a gradient may be zero, and then the typical row says nothing."""
    gradient = torch.zeros(100, 64)
    gradient[:10] = torch.randn(10, 64)
    expected = GRADIENT_SHARE * float(gradient.square().mean().sqrt())
    assert crossed(gradient, stochastic=True)[0].step == pytest.approx(expected, rel=1e-5)
    assert Size.of(torch.zeros(5)).step(5, gradient=True) == 1.0


@pytest.mark.parametrize("wire", ["steps", "q8", "q4"])
def test_stochastic_rounding_is_unbiased(wire: Wire) -> None:
    """The mean over many roundings is the value itself, where plain rounding is off by 0.3 steps."""
    tensor = torch.full((400_000,), 1.3)
    if wire != "steps":
        tensor[::BLOCK] = 2.0 ** (BLOCK_WIRES[wire] - 1)  # the largest of each block decides its step
    mean = float(crossed(tensor, 1.0, wire=wire, stochastic=True)[1][tensor == 1.3].double().mean())
    assert mean == pytest.approx(1.3, abs=6 * math.sqrt(0.3 / tensor.numel()))
    assert float(crossed(torch.full((400,), 1.3), 1.0)[1].mean()) == 1.0


def test_over_many_messages_every_single_element_is_unbiased() -> None:
    """Not only their mean: an element must not meet the same dither again and again."""
    tensor = torch.full((64,), 0.25)
    total = sum(crossed(tensor, 1.0, stochastic=True)[1].double() for _ in range(2000))
    assert isinstance(total, torch.Tensor)
    assert bool(((total / 2000 - 0.25).abs() < 6 * math.sqrt(0.25 * 0.75 / 2000)).all())


def test_dither_covers_tensors_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool is read as a ring, as often round as it takes."""
    monkeypatch.setattr(quantise, "_POOL", 100)
    monkeypatch.setattr(quantise, "_pools", {})
    for size in (1, 99, 100, 101, 1000):
        dither = quantise._dither(torch.empty(size))
        assert dither.shape == (size,)
        assert float(dither.abs().max()) <= 0.5
        if size > 100:
            assert torch.equal(dither[100:], dither[:-100])


def test_outliers_cost_bits_only_where_they_are() -> None:
    """Values 10,000 times the rest: each costs its place and its value, the rest costs what it did."""
    torch.manual_seed(0)
    plain = torch.randn(1 << 18)
    spiky = plain.clone()
    spiky[:: 1 << 15] = 10_000.0
    sizes = [memoryview(encode_tensor(t, "steps", "head", step=0.05)[1]).nbytes for t in (plain, spiky)]
    assert sizes[1] - sizes[0] < 8 * 16
    spec, back = crossed(spiky, 0.05)
    assert spec.outliers == 8
    assert back[0] == pytest.approx(10_000.0, abs=0.03)


@pytest.mark.parametrize(("deviation", "stochastic"), [(20.0, False), (6.7, True), (2.0, False)])
def test_cost_stays_near_the_entropy_of_the_integers(deviation: float, stochastic: bool) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(1 << 20) * deviation
    spec, frame = encode_tensor(tensor, "steps", "head", step=1.0, stochastic=stochastic)
    (codes,) = decode_tensors([spec], [frame], boundary="head")
    counts = torch.unique(codes, return_counts=True)[1].double() / codes.numel()
    entropy = float(-(counts * counts.log2()).sum())
    bits = memoryview(frame).nbytes * 8 / tensor.numel()
    assert entropy - 0.01 <= bits < entropy + 0.15


# --- blocks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", BLOCK_WIRES)
@pytest.mark.parametrize("shape", [(1,), (64,), (65,), (1, 576), (129, 67), (64, 128)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_is_as_exact_as_its_largest_allows(
    wire: Wire, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensor = (torch.randn(shape) * torch.logspace(-3, 3, shape[-1])).to(dtype)
    spec, back = crossed(tensor, wire=wire)
    assert spec.encoding == "blocks"
    flat, moved = tensor.reshape(-1).double(), (back.double() - tensor.double()).reshape(-1).abs()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    steps = blocks.abs().amax(1) / (2 ** (BLOCK_WIRES[wire] - 1) - 1) * (1 + 2**-6)
    allowed = steps.repeat_interleave(BLOCK)[: len(flat)] / 2 + flat.abs() * torch.finfo(dtype).eps
    assert bool((moved <= allowed + 1e-9).all())


@pytest.mark.parametrize("wire", BLOCK_WIRES)
def test_a_block_of_zeros_and_a_zero_among_others_stay_zero(wire: Wire) -> None:
    tensor = torch.zeros(3, BLOCK)
    tensor[1, 5] = -7.0
    back = crossed(tensor, wire=wire)[1]
    assert torch.equal(back == 0, tensor == 0)
    assert back[1, 5] == pytest.approx(-7.0, rel=0.01)


def test_fewer_bits_are_fewer_bytes() -> None:
    tensor = torch.randn(256, 256)
    sizes = {wire: memoryview(encode_tensor(tensor, wire, "head")[1]).nbytes for wire in BLOCK_WIRES}
    assert sorted(sizes.values(), reverse=True) == list(sizes.values())
    for wire, bits in BLOCK_WIRES.items():
        assert sizes[wire] * 8 / tensor.numel() < bits + 0.3


# --- what is refused ---------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_by_name() -> None:
    for wire in ("steps", "q8"):
        for value in (math.nan, math.inf, -math.inf):
            with pytest.raises(FrameError, match="head: NaN or infinity"):
                encode_tensor(torch.tensor([value, 1.0]), wire, "head")


@pytest.mark.parametrize("wire", ["steps", *BLOCK_WIRES])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [1.0, 0.6, 0.1])
def test_the_largest_numbers_cross_finite(
    wire: Wire, stochastic: bool, dtype: torch.dtype, share: float
) -> None:
    """What the encoder sends the decoder takes, up to the edge of the dtype."""
    tensor = (torch.rand(50, 64) * 2 - 1).to(dtype) * (share * torch.finfo(dtype).max)
    back = crossed(tensor, wire=wire, stochastic=stochastic)[1]
    most = float(tensor.abs().max())
    assert torch.allclose(back.double() / most, tensor.double() / most, atol=0.2)


@pytest.mark.parametrize("scale", [1e-10, 1e-20, 1e-25])
def test_the_smallest_numbers_are_not_zero(scale: float) -> None:
    """Their squares are, in fp32."""
    tensor = torch.randn(64, 64) * scale
    back = crossed(tensor)[1]
    assert float((back - tensor).norm(dtype=torch.float64) / tensor.norm(dtype=torch.float64)) < 0.05


def test_a_received_frame_may_be_read_twice() -> None:
    """Over ZeroMQ a frame is memory that can be written, and turning bytes into codes is done in place."""
    for wire, scale in (("steps", 1.0), ("steps", 100.0), ("q8", 1.0), ("exact", 1.0)):
        spec, frame = encode_tensor(torch.randn(100, 64) * scale, wire, "head", step=1.0)  # type: ignore[arg-type]
        received = memoryview(bytearray(frame))
        first, again = (decode_tensors([spec], [received], boundary="head")[0].clone() for _ in range(2))
        assert torch.equal(first, again)


@pytest.mark.parametrize("offset", range(4))
def test_a_frame_may_lie_anywhere_in_memory(offset: int) -> None:
    tensor = torch.randn(40, 64)
    for wire in ("raw", "bf16", "steps", "q8"):
        spec, frame = encode_tensor(tensor, wire, "head")  # type: ignore[arg-type]
        buffer = memoryview(bytearray(offset) + bytearray(frame))[offset:]
        (found,) = decode_tensors([spec], [buffer], boundary="head")
        assert found.data_ptr() % found.element_size() == 0
        assert torch.allclose(found.float(), tensor, atol=0.1)


def test_values_whose_squares_overflow_are_finite_all_the_same() -> None:
    for wire in ("raw", "exact", "q8"):
        assert crossed(torch.tensor([1e30, 1.0]), wire=wire)[1][0] == pytest.approx(1e30, rel=0.01)


def outlier_frame(positions: list[int], values: list[int]) -> tuple[TensorSpec, bytes]:
    """A frame of 96 zeros with these outliers, as any peer might write it: distances, zigzag."""
    words = [np.array([x & 0xFFFFFFFF for x in row], dtype="<u4") for row in (positions, values)]
    parts = [bytes(96), *(row.view(np.uint8).reshape(-1, 4).T.tobytes() for row in words)]
    spec = TensorSpec("f32", (96,), "steps", tuple(map(len, parts)), 0.5, len(positions))
    return spec, b"".join(parts)


@pytest.mark.parametrize(
    "distances", [[96], [95, 1], [0, 0], [3, 0], [0xFFFFFFFF], [0xFFFFFFFF, 1], [1, 0xFFFFFFFF, 1]]
)
def test_positions_that_lie_are_refused(distances: list[int]) -> None:
    spec, frame = outlier_frame(distances, [0] * len(distances))
    check_specs([spec], [len(frame)])
    with pytest.raises(FrameError, match="head: the positions of a tensor's outliers"):
        decode_tensors([spec], [frame], boundary="head")


def test_positions_that_do_not_lie_are_read() -> None:
    spec, frame = outlier_frame([0, 95], [600, 601])
    (tensor,) = decode_tensors([spec], [frame], boundary="head")
    assert tensor.tolist() == [150.0, *[0.0] * 94, -150.5]


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_a_code_beyond_its_dtype_is_refused(dtype: Any) -> None:
    spec, frame = outlier_frame([1], [0xFFFFFFFF])
    huge = TensorSpec(dtype, (96,), "steps", spec.sizes, 1e300, 1)
    with pytest.raises(FrameError, match="is beyond"):
        decode_tensors([huge], [frame], boundary="head")


def test_a_block_step_that_is_not_finite_is_refused() -> None:
    frame = b"\x80\x7f" + b"\x02" * 64  # bf16 infinity, and ones
    with pytest.raises(FrameError, match="NaN or infinity"):
        decode_tensors([TensorSpec("f32", (64,), "blocks", (2, 64))], [frame], boundary="head")


def garbage() -> Iterator[Any]:
    return iter(
        (
            st.binary(min_size=1, max_size=64),
            st.integers(1, 4),
            st.integers(1, 4096),
            st.integers(0, 20),
            st.sampled_from(["steps", "blocks"]),
        )
    )


@settings(max_examples=300)
@given(*garbage())
def test_garbage_parts_are_refused_or_read(
    part: bytes, parts: int, elements: int, outliers: int, encoding: Any
) -> None:
    """Any bytes as parts: an error of ours, or a finite tensor; never a crash or another error."""
    step = 0.5 if encoding == "steps" else 0.0
    spec = TensorSpec("f32", (elements,), encoding, (len(part),) * parts, step, outliers)
    try:
        (tensor,) = decode_tensors([spec], [part * parts], boundary="head")
    except FrameError:
        return
    assert tensor.shape == (elements,)
    assert bool(torch.isfinite(tensor).all())
