"""Torch tensors to frames and back: every bit, every shape, and no number that is not one."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codec.errors import FrameError
from codec.messages import Result, TensorSpec, decode_header, encode_header
from codec.tensors import TORCH_DTYPES, decode_tensors, encode_tensor, encode_tensors

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = st.lists(st.integers(0, 6), max_size=4).map(tuple)


def bits(tensor: Tensor) -> bytes:
    """The exact bits: equality of floats cannot tell 0 from -0."""
    flat = tensor.detach().contiguous().reshape(-1)
    return b"" if not flat.numel() else flat.view(torch.uint8).numpy().tobytes()


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 3).to(dtype)


def over_the_wire(tensor: Tensor, wire: Any = "exact") -> tuple[TensorSpec, Tensor]:
    """Encoded, sent as header and frame bytes, and decoded as on the other side."""
    specs, frames = encode_tensors([tensor], wire, "test")
    header = decode_header(encode_header(Result(tensors=specs)))
    (found,) = decode_tensors(header.tensors, [bytes(frame) for frame in frames], boundary="test")
    return header.tensors[0], found


@settings(max_examples=200)
@given(SHAPES, st.sampled_from(DTYPES), st.integers(0, 99))
def test_every_shape_and_dtype_crosses_exactly(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    tensor = draw(shape, dtype, seed)
    spec, found = over_the_wire(tensor)
    assert found.dtype == dtype == TORCH_DTYPES[spec.dtype]
    assert found.shape == tensor.shape
    assert bits(found) == bits(tensor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0])
def test_large_tensors_cross_exactly_in_planes(dtype: torch.dtype, scale: float) -> None:
    tensor = draw((50, 200), dtype) * scale
    tensor[3, :5] = -0.0
    spec, found = over_the_wire(tensor)
    if dtype != torch.float16 or not scale:
        assert spec.encoding == "planes"
    assert bits(found) == bits(tensor)


def test_every_finite_half_precision_number_crosses_exactly() -> None:
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    for dtype in (torch.bfloat16, torch.float16):
        values = patterns.view(dtype)
        values = values[torch.isfinite(values)]
        assert bits(over_the_wire(values)[1]) == bits(values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes_cross_exactly(dtype: torch.dtype) -> None:
    facts = torch.finfo(dtype)
    tensor = torch.tensor([facts.max, facts.min, facts.tiny, -facts.tiny / 2, 0.0, -0.0], dtype=dtype)
    assert bits(over_the_wire(tensor)[1]) == bits(tensor)


@pytest.mark.parametrize("size", [8, 120])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_view_crosses_as_what_it_shows(dtype: torch.dtype, size: int) -> None:
    base = draw((size, size, 2), dtype)
    for view in (
        base.transpose(0, 2),
        base[::2, 1::3],
        base[..., 1],
        base[size // 2 :],
        base[:1].expand(size, size, 2),
        base[2, 3, 1],
        base.flip(0),
        base[:0],
    ):
        spec, found = over_the_wire(view)
        assert spec.shape == tuple(view.shape)
        assert bits(found) == bits(view)


@pytest.mark.parametrize(("wire", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (100, 100)])
def test_a_wire_dtype_rounds_as_torch_rounds(wire: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = draw(shape, torch.float32)
    _, found = over_the_wire(tensor, wire)
    assert found.dtype == dtype
    assert bits(found) == bits(tensor.to(dtype))


def test_what_is_sent_stays_as_it_was() -> None:
    tensor = draw((10, 10), torch.float32).requires_grad_()
    before = bits(tensor)
    _, frame = encode_tensor(tensor, "bf16", "test")
    assert tensor.requires_grad
    assert bits(tensor) == before
    assert memoryview(frame).nbytes == 200


def test_what_is_received_is_ones_own_to_change() -> None:
    spec, frame = encode_tensor(draw((10, 10), torch.float32), "exact", "test")
    received = bytes(frame)
    (found,) = decode_tensors([spec], [received], boundary="test")
    found.add_(1)
    found.requires_grad_()
    assert received == bytes(frame)


def test_several_tensors_keep_their_order() -> None:
    tensors = [draw((n, 3), dtype, n) for n, dtype in enumerate(DTYPES * 3)]
    specs, frames = encode_tensors(tensors, "exact", "test")
    found = decode_tensors(specs, [bytes(frame) for frame in frames], boundary="test")
    assert [bits(tensor) for tensor in found] == [bits(tensor) for tensor in tensors]
    assert decode_tensors([], [], boundary="test") == []


# --- what does not cross -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float64])
def test_token_ids_labels_and_masks_do_not_cross(dtype: torch.dtype) -> None:
    with pytest.raises(FrameError, match=r"head output: torch\.\w+ does not cross; f32, bf16, f16 do"):
        encode_tensor(torch.ones(3).to(dtype), "exact", "head output")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 10_000])
def test_a_number_that_is_not_finite_names_its_boundary_before_it_leaves(
    value: float, dtype: torch.dtype, size: int
) -> None:
    tensor = draw((size, 2), dtype)
    tensor[size // 2, 1] = value
    with pytest.raises(FrameError, match=rf"tail gradient: NaN or infinity .* shape \({size}, 2\)") as caught:
        encode_tensor(tensor, "exact", "tail gradient")
    assert "learning rate" in caught.value.hint


def test_what_fp16_cannot_hold_is_refused_and_bf16_can() -> None:
    tensor = torch.tensor([70000.0, 1.0])
    with pytest.raises(FrameError, match="head output: NaN or infinity") as caught:
        encode_tensor(tensor, "fp16", "head output")
    assert "--wire bf16" in caught.value.hint
    assert over_the_wire(tensor, "bf16")[1].tolist() == [70144.0, 1.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_number_that_is_not_finite_names_its_boundary_where_it_arrives(
    value: float, dtype: torch.dtype
) -> None:
    """A peer need not have used this encoder."""
    name = next(name for name, found in TORCH_DTYPES.items() if found == dtype)
    frame = bits(torch.tensor([1.0, value], dtype=dtype))
    spec = TensorSpec(name, (2,), "raw", (len(frame),))
    with pytest.raises(FrameError, match=r"trunk output: NaN or infinity in a tensor of shape \(2,\)"):
        decode_tensors([spec], [frame], boundary="trunk output")


INTS = st.one_of(st.integers(0, 6), st.sampled_from([1 << 20, 1 << 31, 1 << 62, 1 << 63, (1 << 64) - 1]))


@settings(max_examples=300)
@given(
    st.sampled_from(sorted(TORCH_DTYPES)),
    st.lists(INTS, max_size=4).map(tuple),
    st.sampled_from(["raw", "planes"]),
    st.lists(INTS, min_size=1, max_size=4).map(tuple),
    st.integers(0, 48),
)
def test_any_spec_beside_any_frame_is_refused_or_is_a_tensor(
    dtype: Any, shape: tuple[int, ...], encoding: Any, sizes: tuple[int, ...], length: int
) -> None:
    """No other error than a `FrameError`: a peer cannot end a process with an odd shape."""
    spec = TensorSpec(dtype, shape, encoding, sizes)
    try:
        (found,) = decode_tensors([spec], [bytes(length)], boundary="test")
    except FrameError:
        return
    assert found.shape == shape
    assert found.nbytes == length


@pytest.mark.parametrize(
    "shape", [(0,), (0, 3), (3, 0), (2, 0, 1 << 20), (0, 1 << 63), (0, 1 << 40, 1 << 40)]
)
def test_an_empty_tensor_is_empty_or_refused(shape: tuple[int, ...]) -> None:
    spec = TensorSpec("bf16", shape, "raw", (0,))
    if max(shape) > 1 << 20:
        with pytest.raises(FrameError, match="a tensor of shape"):
            decode_tensors([spec], [b""], boundary="test")
    else:
        (found,) = decode_tensors([spec], [b""], boundary="test")
        assert (found.shape, found.dtype) == (shape, torch.bfloat16)


def test_a_frame_that_lies_names_its_boundary() -> None:
    spec = TensorSpec("f32", (1 << 40,), "raw", (1024,))
    with pytest.raises(FrameError, match="trunk output: a tensor of shape") as caught:
        decode_tensors([spec], [bytes(1024)], boundary="trunk output")
    assert caught.value.at == "silo"


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=20))
def test_damaged_activations_are_refused_or_finite(edits: list[tuple[int, int]]) -> None:
    spec, frame = encode_tensor(draw((64, 80), torch.bfloat16), "exact", "test")
    damaged = bytearray(frame)
    for at, value in edits:
        damaged[at % len(damaged)] = value
    try:
        (found,) = decode_tensors([spec], [damaged], boundary="test")
    except FrameError:
        return
    assert found.shape == (64, 80)
    assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_frame_may_come_in_any_buffer(kind: Any) -> None:
    tensor = draw((40, 128), torch.bfloat16)
    spec, frame = encode_tensor(tensor, "exact", "test")
    (found,) = decode_tensors([spec], [kind(bytes(frame))], boundary="test")
    assert bits(found) == bits(tensor)
    raw = TensorSpec("bf16", (40, 128), "raw", (tensor.nbytes,))
    (found,) = decode_tensors([raw], [kind(bits(tensor))], boundary="test")
    assert bits(found) == bits(tensor)
