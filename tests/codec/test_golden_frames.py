"""Frames as they have always been: what was sent yesterday is read today, bit for bit.

A change here is a change of the protocol: raise `PROTOCOL`, and say so in docs/protocol.md.
"""

from typing import Any

import pytest
import torch

from codec.frames import check_specs
from codec.messages import TensorSpec, Wire
from codec.tensors import decode_tensors, encode_tensor

ONE_TO_64 = torch.arange(1.0, 65.0)
SPIKE = torch.tensor([0.0, 0.5, -0.5, 1.0, 500.0, -0.25])

EXACT: dict[str, tuple[torch.Tensor, Wire, dict[str, Any], TensorSpec, str]] = {
    "raw": (
        torch.tensor([[1.0, -2.0], [0.5, 0.25]]),
        "raw",
        {},
        TensorSpec("f32", (2, 2), "raw", (16,)),
        "0000803f000000c00000003f0000803e",
    ),
    "bf16": (
        torch.tensor([1.0, -2.0]),
        "bf16",
        {},
        TensorSpec("bf16", (2,), "raw", (4,)),
        "803f00c0",
    ),
    "planes": (
        torch.ones(64, 64),
        "exact",
        {},
        TensorSpec("f32", (64, 64), "planes", (27, 27, 27, 27)),
        "001f000100fffffffffffffffffffffffffffffff6500000000000"
        "001f000100fffffffffffffffffffffffffffffff6500000000000"
        "001f800100fffffffffffffffffffffffffffffff6508080808080"
        "001f3f0100fffffffffffffffffffffffffffffff6503f3f3f3f3f",
    ),
    "steps, bytes": (
        torch.tensor([0.0, 0.5, -0.5, 1.0]),
        "steps",
        {"step": 0.5},
        TensorSpec("f32", (4,), "steps", (4,), 0.5),
        "00020104",
    ),
    "steps, nibbles": (
        torch.tensor([20.0, -20.0, 33.0, 0.0, 127.0]),
        "steps",
        {"step": 1.0},
        TensorSpec("f32", (5,), "steps", (3, 3), 1.0),
        "08e70202f204",
    ),
    "steps, outlier": (
        torch.cat((SPIKE, torch.zeros(10))),
        "steps",
        {"step": 0.5},
        TensorSpec("f32", (16,), "steps", (8, 8, 4, 4), 0.5, 1),
        "0002010400000000000000000000000004000000d0070000",
    ),
    "blocks": (
        ONE_TO_64,
        "q4",
        {},
        TensorSpec("f32", (64,), "blocks", (2, 32, 32)),
        "1341"
        "808080808282828282a2a2a2a2a4a4a4a4a4c4c4c4c4c6c6c6c6c6e6e6e6e6e6"
        "0000000000000000000000000000000000000000000000000000000000000000",
    ),
}

READ_ONLY: dict[str, tuple[TensorSpec, str, torch.Tensor]] = {
    "a plane that zstd coded": (
        TensorSpec("f32", (512,), "steps", (22,), 1.0),
        "0128b52ffd6000015d000020000204060100f9ab8e08",
        torch.arange(512).remainder(4).float(),
    ),
    "a raw plane, an lz4 plane": (
        TensorSpec("bf16", (64, 64), "planes", (4096, 27)),
        "00" * 4096 + "001f3f0100fffffffffffffffffffffffffffffff6503f3f3f3f3f",
        torch.full((64, 64), 0.5, dtype=torch.bfloat16),
    ),
}
"""What an encoder here may write otherwise one day, and must always be read."""


@pytest.mark.parametrize("name", EXACT)
def test_a_frame_has_the_bytes_it_always_had(name: str) -> None:
    tensor, wire, options, spec, golden = EXACT[name]
    found, frame = encode_tensor(tensor, wire, "test", **options)
    assert found == spec
    assert bytes(frame).hex() == golden


@pytest.mark.parametrize("name", EXACT)
def test_a_frame_is_read_as_it_always_was(name: str) -> None:
    tensor, wire, _, spec, golden = EXACT[name]
    frame = bytes.fromhex(golden)
    check_specs([spec], [len(frame)])
    (found,) = decode_tensors([spec], [frame], boundary="test")
    expected = tensor.to(found.dtype)
    if wire == "q4":
        expected = (tensor / 9.1875).round() * 9.1875
    elif wire == "steps":
        expected = (tensor / spec.step).round() * spec.step
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", READ_ONLY)
def test_what_any_encoder_may_send_is_read(name: str) -> None:
    spec, golden, expected = READ_ONLY[name]
    frame = bytes.fromhex(golden)
    check_specs([spec], [len(frame)])
    assert torch.equal(decode_tensors([spec], [frame], boundary="test")[0], expected)
