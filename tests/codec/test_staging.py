"""Copies between host and GPU: none on a CPU; on a GPU the same bytes, whatever the stream is busy with."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from codec.messages import Wire
from codec.staging import download, upload
from codec.tensors import decode_tensors, encode_tensor, encode_tensors

CPU = torch.device("cpu")
WIRES: list[Wire] = ["raw", "exact", "bf16", "steps", "q8", "q4"]
STEP = 0.03
SHAPES = [(40, 512), (1, 64), (7,), (0, 64), (90, 512)]


def tensors() -> list[Tensor]:
    """Of several sizes, with a few outliers that `steps` lists apart."""
    generator = torch.Generator().manual_seed(7)
    made = [torch.randn(shape, generator=generator) for shape in SHAPES]
    made[0][3, 5] = made[4][80, 500] = 3e4
    return made


def address(buffer: Any) -> int:
    found: int = np.frombuffer(buffer, dtype=np.uint8).__array_interface__["data"][0]
    return found


def test_on_a_cpu_nothing_is_copied() -> None:
    tensor = torch.randn(40, 512)
    assert upload(tensor, CPU) is tensor
    assert download(tensor) is tensor
    (spec,), (frame,) = encode_tensors([tensor], "raw", "test")
    assert address(frame) == tensor.data_ptr()
    received = bytearray(frame)
    (found,) = decode_tensors([spec], [received], boundary="test", device=CPU)
    assert found.data_ptr() == address(received)


@pytest.mark.parametrize("wire", WIRES)
def test_tensors_of_one_message_cross_as_each_would_alone(wire: Wire) -> None:
    alone = [encode_tensor(tensor, wire, "test") for tensor in tensors()]
    alone = [(spec, bytes(frame)) for spec, frame in alone]
    specs, frames = encode_tensors(tensors(), wire, "test")
    assert list(zip(specs, map(bytes, frames), strict=True)) == alone


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pinned copies in a busy stream")
@pytest.mark.parametrize("wire", WIRES)
def test_a_gpu_sends_and_receives_what_a_cpu_does(wire: Wire) -> None:
    """In a stream of its own that has a tenth of a second to do first, and with blocks used again."""
    device = torch.device("cuda")
    on_gpu = [tensor.to(device) for tensor in tensors()]
    torch.cuda.synchronize()
    wanted = encode_tensors(tensors(), wire, "test", step=STEP)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        for _ in range(3):
            torch.cuda._sleep(200_000_000)
            specs, frames = encode_tensors(on_gpu, wire, "test", step=STEP)
            assert [spec.shape for spec in specs] == SHAPES
            found = decode_tensors(specs, [bytes(frame) for frame in frames], boundary="test")
            torch.cuda._sleep(200_000_000)
            received = decode_tensors(*wanted, boundary="test", device=device)
            # Not `settle`: what follows in the same stream must see them whole.
            back = [tensor + 0 for tensor in received]
            for ours, theirs, sent in zip(found, back, decode_tensors(*wanted, boundary="test"), strict=True):
                # A GPU multiplies and adds in one rounding: a value half-way may get the next code.
                torch.testing.assert_close(ours, sent, atol=1.1 * STEP if wire == "steps" else 0, rtol=1e-6)
                assert torch.equal(theirs.cpu(), sent)
