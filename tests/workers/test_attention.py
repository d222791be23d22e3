"""Packed attention against a plain double-precision one that knows only a dense mask."""

from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from workers.attention import Packing, packed_attention
from workers.kv import PAGE, KVMemory, KVShape, RowCache

DIM = 8


def draw(heads: int, tokens: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, heads, tokens, DIM, generator=generator)


def plain(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None, cap: float | None
) -> Tensor:
    """Every query of one whole sequence against a dense mask, in double precision: `[1, T, H, D]`."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query.double() @ key.double().transpose(2, 3) * scaling
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    width = query.shape[2]
    for i in range(width):
        for j in range(width):
            if j > i or (window is not None and i - j >= window):
                scores[..., i, j] = -torch.inf
    return (scores.softmax(-1) @ value.double()).transpose(1, 2).float()


def module(layer: int = 0) -> nn.Module:
    """What transformers' attention layers pass as the first argument."""
    found = nn.Module()
    found.layer_idx = layer
    return found


def rows(groups: int, capacities: Sequence[int], layers: int = 1) -> list[RowCache]:
    shape, memory = KVShape(layers, groups, DIM, torch.float32, torch.device("cpu")), KVMemory()
    made = [RowCache(shape, capacity, memory) for capacity in capacities]
    for row in made:
        row.check_room(row.capacity)
    return made


HEADS = st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 2), (4, 1)])
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=4)
WINDOWS = st.sampled_from([None, 1, 2, 3, 5, 8, 64])
CAPS = st.sampled_from([None, 0.5, 3.0])


@settings(max_examples=150)
@given(HEADS, LENGTHS, WINDOWS, CAPS, st.floats(0.05, 1.0), st.integers(0, 1000))
def test_each_sequence_attends_to_itself(
    heads: tuple[int, int],
    lengths: list[int],
    window: int | None,
    cap: float | None,
    scaling: float,
    seed: int,
) -> None:
    query, total = draw(heads[0], sum(lengths), seed), sum(lengths)
    key, value = draw(heads[1], total, seed + 1), draw(heads[1], total, seed + 2)
    found, weights = packed_attention(
        module(),
        query,
        key,
        value,
        None,
        packing=Packing(tuple(lengths)),
        scaling=scaling,
        sliding_window=window,
        softcap=cap,
    )
    assert weights is None
    parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    expected = torch.cat([plain(q, k, v, scaling, window, cap) for q, k, v in parts], dim=1)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


@settings(max_examples=150)
@given(
    HEADS,
    st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=3),
    WINDOWS,
    CAPS,
    st.integers(0, 1000),
)
def test_chunks_over_caches_equal_whole_sequences(
    heads: tuple[int, int],
    chunks: list[list[int]],
    window: int | None,
    cap: float | None,
    seed: int,
) -> None:
    """Each row's tokens come in three passes; rows join the passes in which they have tokens."""
    totals = [sum(row) for row in chunks]
    sequences = [
        tuple(draw(n, total, seed + 10 * i + k) for k, n in enumerate((heads[0], *heads[1:] * 2)))
        for i, total in enumerate(totals)
    ]
    caches = rows(heads[1], totals)
    found: list[list[Tensor]] = [[] for _ in chunks]
    for step in range(3):
        present = [i for i, row in enumerate(chunks) if row[step]]
        if not present:
            continue
        lengths = [chunks[i][step] for i in present]
        new = [
            [t[:, :, caches[i].length : caches[i].length + chunks[i][step]] for t in sequences[i]]
            for i in present
        ]
        query, key, value = (torch.cat(parts, dim=2) for parts in zip(*new, strict=True))
        packing = Packing(tuple(lengths), [caches[i] for i in present])
        out, _ = packed_attention(
            module(), query, key, value, None,
            packing=packing, scaling=0.3, sliding_window=window, softcap=cap,
        )  # fmt: skip
        for i, part in zip(present, out.split(lengths, 1), strict=True):
            caches[i].advance(part.shape[1])
            found[i].append(part)
    for (query, key, value), parts in zip(sequences, found, strict=True):
        if parts:
            expected = plain(query, key, value, 0.3, window, cap)
            torch.testing.assert_close(torch.cat(parts, 1), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_each_block_has_keys_of_its_own(cap: float | None) -> None:
    caches = rows(2, [5], layers=3)
    prefill = [[draw(n, 4, 10 * layer + n) for n in (4, 2, 2)] for layer in range(3)]
    newest = [[draw(n, 1, 10 * layer + n + 5) for n in (4, 2, 2)] for layer in range(3)]
    for tensors, length in ((prefill, 4), (newest, 1)):
        outs = [
            packed_attention(
                module(layer), *tensors[layer], None,
                packing=Packing((length,), caches), scaling=0.4, softcap=cap,
            )[0]
            for layer in range(3)
        ]  # fmt: skip
        caches[0].advance(length)
    for layer, out in enumerate(outs):
        query, key, value = (torch.cat(pair, 2) for pair in zip(prefill[layer], newest[layer], strict=True))
        expected = plain(query, key, value, 0.4, None, cap)[:, -1:]
        torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)


@settings(max_examples=60)
@given(
    HEADS,
    st.lists(st.integers(0, 150), min_size=2, max_size=9),
    st.sets(st.integers(0, 8)),
    st.integers(1, 4),
    WINDOWS,
    CAPS,
    st.randoms(use_true_random=False),
)
def test_rows_that_decode_together_equal_whole_sequences(
    heads: tuple[int, int],
    before: list[int],
    absent: set[int],
    chunk: int,
    window: int | None,
    cap: float | None,
    random: Random,
) -> None:
    """Rows of very different lengths, in any order, some of them absent, beside a part of a prompt.

    What absent rows hold, and what was forgotten beyond a row's end, is not a number.
    """
    caches = rows(heads[1], [max(length, 100) + 50 for length in before], layers=2)
    sequences, spoilt = [], torch.full((1, heads[1], 30, DIM), torch.nan)
    for seed, (cache, length) in enumerate(zip(caches, before, strict=True)):
        new = chunk if seed == 0 else 1
        query, key, value = (
            draw(n, length + new, 3 * seed + k) for k, n in enumerate((heads[0], *heads[1:] * 2))
        )
        cache.append(1, key[:, :, :length], value[:, :, :length])
        cache.advance(length)
        cache.append(1, spoilt, spoilt)
        if seed in absent:
            cache.advance(30)
        sequences.append((query, key, value, new))
    present = [index for index in range(len(before)) if index not in absent]
    random.shuffle(present)
    if not present:
        return
    last = [[tensor[:, :, -sequences[i][3] :] for tensor in sequences[i][:3]] for i in present]
    packing = Packing(tuple(sequences[i][3] for i in present), [caches[i] for i in present])
    out, _ = packed_attention(
        module(1), *(torch.cat(parts, dim=2) for parts in zip(*last, strict=True)), None,
        packing=packing, scaling=0.3, sliding_window=window, softcap=cap,
    )  # fmt: skip
    for i, part in zip(present, out.split([sequences[i][3] for i in present], 1), strict=True):
        query, key, value, new = sequences[i]
        expected = plain(query, key, value, 0.3, window, cap)[:, -new:]
        torch.testing.assert_close(part, expected, atol=2e-6, rtol=1e-5)


def test_sixteen_rows_attend_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    caches = rows(2, [PAGE] * 16)
    calls, attend = [], functional.scaled_dot_product_attention

    def count(*arguments: Any, **options: Any) -> Tensor:
        calls.append(arguments[0].shape)
        return attend(*arguments, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", count)
    tensors = [draw(n, 16, seed) for seed, n in enumerate((4, 2, 2))]
    packed_attention(module(), *tensors, None, packing=Packing((1,) * 16, caches), scaling=0.4)
    assert calls == [(16, 2, 2, DIM)]


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 2])
def test_no_sequence_sees_another(cap: float | None, window: int | None) -> None:
    lengths = (3, 4, 2)
    query, key, value = draw(4, 9, 1), draw(2, 9, 2), draw(2, 9, 3)

    def attend(key: Tensor, value: Tensor) -> Tensor:
        return packed_attention(
            module(), query, key, value, None,
            packing=Packing(lengths), scaling=0.5, sliding_window=window, softcap=cap,
        )[0]  # fmt: skip

    before = attend(key, value)
    key[:, :, 3:7] += 1e4
    value[:, :, 3:7] = torch.nan
    after = attend(key, value)
    assert torch.equal(after[:, :3], before[:, :3])
    assert torch.equal(after[:, 7:], before[:, 7:])
    assert bool(after[:, 3:7].isnan().all())


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 2])
def test_gradients_equal_those_of_plain_attention(cap: float | None, window: int | None) -> None:
    lengths = [1, 5, 3]
    tensors = [draw(n, 9, seed).requires_grad_() for seed, n in enumerate((4, 2, 2))]
    weights = torch.randn(1, 9, 4, DIM)
    out, _ = packed_attention(
        module(), *tensors, None,
        packing=Packing(tuple(lengths)), scaling=0.4, sliding_window=window, softcap=cap,
    )  # fmt: skip
    found = torch.autograd.grad((out * weights).sum(), tensors)
    parts = zip(*(t.split(lengths, 2) for t in tensors), strict=True)
    expected_out = torch.cat([plain(q, k, v, 0.4, window, cap) for q, k, v in parts], dim=1)
    expected = torch.autograd.grad((expected_out * weights).sum(), tensors)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_dropout_drops(cap: float | None) -> None:
    tensors = [draw(2, 6, seed) for seed in range(3)]

    def attend(dropout: float) -> Tensor:
        return packed_attention(
            module(), *tensors, None,
            packing=Packing((6,)), scaling=0.4, dropout=dropout, softcap=cap,
        )[0]  # fmt: skip

    kept = attend(0.0)
    dropped = torch.stack([attend(0.5) for _ in range(400)])
    assert not torch.allclose(dropped[0], kept)
    assert (dropped.mean(0) - kept).abs().mean() < 0.1
