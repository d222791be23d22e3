"""Masks as lengths, packing and positions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from codec.errors import UsageError
from codec.lengths import lengths_of, pack, positions, unpack

CPU = torch.device("cpu")

ROWS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=5)
"""Length, padding left and padding right of each row, the width being what the widest needs."""


def mask_of(rows: list[tuple[int, int, int]], dtype: torch.dtype) -> torch.Tensor:
    width = max(sum(row) for row in rows)
    mask = torch.zeros(len(rows), width, dtype=dtype)
    for line, (length, left, _) in zip(mask, rows, strict=True):
        line[left : left + length] = 1
    return mask


@given(ROWS, st.sampled_from([torch.int64, torch.bool, torch.float32, torch.uint8]))
def test_a_padding_mask_becomes_its_lengths(rows: list[tuple[int, int, int]], dtype: torch.dtype) -> None:
    assert lengths_of(mask_of(rows, dtype)) == tuple(length for length, _, _ in rows)


@given(ROWS, st.sampled_from([(), (3,), (2, 2)]))
def test_packing_drops_the_padding_and_unpacking_restores_it(
    rows: list[tuple[int, int, int]], rest: tuple[int, ...]
) -> None:
    mask = mask_of(rows, torch.int64)
    padded = torch.randn(*mask.shape, *rest)
    packed = pack(padded, mask)
    assert packed.shape == (sum(length for length, _, _ in rows), *rest)
    expected = torch.cat([padded[i, left : left + n] for i, (n, left, _) in enumerate(rows)])
    assert torch.equal(packed, expected)
    restored = unpack(packed, mask)
    assert restored.dtype == packed.dtype
    assert torch.equal(restored, padded * mask.reshape(*mask.shape, *(1 for _ in rest)))
    assert torch.equal(pack(restored, mask), packed)


def test_packing_and_unpacking_pass_gradients() -> None:
    mask = torch.tensor([[0, 1, 1], [1, 0, 0]])
    padded = torch.randn(2, 3, 4, requires_grad=True)
    unpack(pack(padded, mask) * 3, mask).sum().backward()
    assert padded.grad is not None
    assert torch.equal(padded.grad, 3.0 * mask[..., None].expand(2, 3, 4))


@pytest.mark.parametrize(
    ("mask", "row"),
    [
        ([[1, 0, 1]], 0),
        ([[1, 1, 1], [0, 0, 0]], 1),
        ([[1, 1, 1, 1, 0], [0, 1, 0, 1, 0]], 1),
        ([[0], [1]], 0),
    ],
)
def test_a_mask_that_lengths_cannot_say_is_refused(mask: list[list[int]], row: int) -> None:
    with pytest.raises(UsageError, match=f"row {row} of the mask is not one unbroken sequence"):
        lengths_of(torch.tensor(mask))


@pytest.mark.parametrize("shape", [(3,), (1, 2, 2), (), (2, 0)])
def test_only_a_batch_of_rows_is_a_padding_mask(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"a padding mask is \[batch, width\]"):
        lengths_of(torch.ones(shape))


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9)), min_size=1, max_size=5))
def test_each_row_counts_up_from_its_start(rows: list[tuple[int, int]]) -> None:
    found = positions([start for start, _ in rows], [length for _, length in rows], CPU)
    assert found.dtype == torch.int64
    assert found.tolist() == [i for start, length in rows for i in range(start, start + length)]
