"""The `steps` encoding: integers of a quantised tensor, byte planes, and what they cost."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from codec.errors import FrameError
from codec.frames import check_specs
from codec.messages import TensorSpec
from codec.quantise import SHARE, dequantise, quantise, step_of
from codec.tensors import decode_tensors, encode_tensor


def crossed(tensor: torch.Tensor, step: float = 0.0, *, stochastic: bool = False) -> torch.Tensor:
    spec, frame = encode_tensor(tensor, "steps", "head", step=step, stochastic=stochastic)
    check_specs([spec], [memoryview(frame).nbytes])
    (back,) = decode_tensors([spec], [bytes(frame)], boundary="head")
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    return back


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=0, max_size=300),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.floats(1e-3, 10.0),
)
def test_no_value_moves_by_more_than_half_a_step(
    values: list[float], dtype: torch.dtype, step: float
) -> None:
    tensor = torch.tensor(values, dtype=dtype)
    moved = (crossed(tensor, step).double() - tensor.double()).abs()
    # Casting back to the dtype it crossed in rounds once more; fp32 holds 24 bits of a code.
    slack = tensor.double().abs() * torch.finfo(dtype).eps * 2
    assert bool((moved <= step / 2 + slack + 1e-6).all())


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (1, 576), (129, 67)])
def test_every_shape_crosses(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    assert torch.allclose(crossed(tensor), tensor, atol=SHARE)
    assert torch.allclose(crossed(torch.zeros(shape)), torch.zeros(shape))


def test_non_contiguous_tensors_cross() -> None:
    tensor = torch.randn(64, 96).T
    assert torch.allclose(crossed(tensor), tensor, atol=SHARE)


def test_stochastic_rounding_is_unbiased() -> None:
    """The mean over many roundings is the value itself, where plain rounding is off by 0.3 steps."""
    tensor = torch.full((400_000,), 1.3)
    mean = float(crossed(tensor, 1.0, stochastic=True).mean())
    assert mean == pytest.approx(1.3, abs=5 * math.sqrt(0.21 / tensor.numel()))
    assert float(crossed(tensor, 1.0).mean()) == 1.0


def test_outliers_cost_bits_only_where_they_are() -> None:
    """A handful of values 10,000 times the rest: the rest costs what it did."""
    torch.manual_seed(0)
    plain = torch.randn(1 << 18)
    spiky = plain.clone()
    spiky[:: 1 << 15] = 10_000.0
    sizes = [memoryview(encode_tensor(t, "steps", "head", step=0.05)[1]).nbytes for t in (plain, spiky)]
    # One more plane of zeros with eight values in it, which lz4 takes to 1/255; zstd shifts a little.
    assert sizes[1] - sizes[0] < plain.numel() / 100
    assert crossed(spiky, 0.05)[0] == pytest.approx(10_000.0, abs=0.03)


def test_cost_stays_near_the_entropy_of_the_integers() -> None:
    torch.manual_seed(0)
    noisy = torch.randn(1 << 20) * 20  # What noise at 1/20 of the deviation leaves, in steps of it.
    codes = noisy.round().to(torch.int64)
    counts = torch.unique(codes, return_counts=True)[1].double() / codes.numel()
    entropy = float(-(counts * counts.log2()).sum())
    _, frame = encode_tensor(noisy, "steps", "head", step=1.0)
    bits = memoryview(frame).nbytes * 8 / noisy.numel()
    assert entropy <= bits < entropy + 0.3


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(FrameError, match="does not fit steps"):
        encode_tensor(torch.tensor([1e30]), "steps", "head", step=1e-3)
    with pytest.raises(FrameError, match="head: NaN or infinity"):
        encode_tensor(torch.tensor([math.nan]), "steps", "head")


@pytest.mark.parametrize(
    "spec",
    [
        TensorSpec("f32", (4,), "steps", (4,), 0.0),
        TensorSpec("f32", (4,), "steps", (4,), math.inf),
        TensorSpec("f32", (4,), "raw", (16,), 0.5),
        TensorSpec("f32", (1 << 26,), "steps", (4,), 0.5),
        TensorSpec("f32", (1 << 40,), "steps", (4,), 0.5),
        TensorSpec("f32", (0,), "steps", (4,), 0.5),
        TensorSpec("f32", (4,), "steps", (0,), 0.5),
    ],
)
def test_a_spec_that_lies_is_refused(spec: TensorSpec) -> None:
    with pytest.raises(FrameError):
        check_specs([spec], [sum(spec.sizes)])


@given(st.binary(min_size=1, max_size=64), st.integers(1, 3), st.integers(1, 4096))
def test_garbage_planes_are_refused_or_read(part: bytes, planes: int, elements: int) -> None:
    """Any bytes as planes: an error of ours, or a finite tensor; never a crash or another error."""
    spec = TensorSpec("f32", (elements,), "steps", (len(part),) * planes, 0.5)
    try:
        (tensor,) = decode_tensors([spec], [part * planes], boundary="head")
    except FrameError:
        return
    assert tensor.shape == (elements,)
    assert bool(torch.isfinite(tensor).all())


def test_codes_survive_their_whole_range() -> None:
    values = torch.tensor([0.0, 1, -1, 127, -128, 255, -256, 65535, -65536, 2**24 - 1, -(2**24) + 1])
    assert torch.equal(dequantise(quantise(values, 1.0, stochastic=False), 1.0), values)
    assert step_of(torch.zeros(5)) == 1.0
