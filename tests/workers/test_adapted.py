"""Each range of tokens gets its own adapter, as PEFT's own forward gives it to each range alone."""

from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from workers.adapted import AdaptedLinear
from workers.routing import Routing, Share, shares_of

RANKS = {**{f"k{i}": 4 for i in range(10)}, "other": 2}
KEYS = st.sampled_from([None, "elsewhere", *RANKS])
OWNERS = st.lists(st.tuples(KEYS, st.integers(0, 4)), min_size=1, max_size=12)


@given(OWNERS)
def test_shares_tile_the_pass_and_neighbours_differ(owners: list[tuple[str | None, int]]) -> None:
    expected = [key for key, tokens in owners for _ in range(tokens)]
    shares = shares_of(owners)
    found = [share.adapter for share in shares for _ in range(share.start, share.stop)]
    if shares:
        assert found == expected
        assert [share.start for share in shares] == [0, *(share.stop for share in shares[:-1])]
        assert all(one.adapter != other.adapter for one, other in pairwise(shares))
    else:
        assert set(expected) <= {None}


def test_shares_are_gone_after_the_pass_even_if_it_fails() -> None:
    routing = Routing()
    shares = (Share("a", 0, 1),)
    with suppress(RuntimeError), routing.to(shares):
        assert routing.shares == shares
        raise RuntimeError
    assert routing.shares == ()


def layer(dtype: torch.dtype = torch.float32) -> AdaptedLinear:
    """Adapters of two ranks and of scalings of their own over one layer, all random."""
    torch.manual_seed(1)
    made: Any = None
    for number, (key, rank) in enumerate(RANKS.items()):
        config = LoraConfig(r=rank, lora_alpha=3 + number)
        if made is None:
            made = AdaptedLinear(
                nn.Linear(6, 5, dtype=dtype).requires_grad_(False), key, config, r=rank,
                lora_alpha=3, routing=Routing(),
            )  # fmt: skip
        else:
            made.update_layer(key, rank, lora_alpha=3 + number, config=config)
    for weights in (made.lora_A, made.lora_B):
        weights.requires_grad_(True)
        for one in weights.values():
            one.weight.data = torch.randn_like(one.weight, dtype=torch.float32)
    return made


def by_peft(made: AdaptedLinear, x_1TI: Tensor, owners: list[tuple[str | None, int]]) -> Tensor:
    pieces = []
    for (key, _), piece in zip(owners, x_1TI.split([n for _, n in owners], 1), strict=True):
        made._disable_adapters = key is None
        made._active_adapter = [] if key is None else [key]
        pieces.append(PeftLinear.forward(made, piece))
    made._disable_adapters = False
    return torch.cat(pieces, 1)


@settings(max_examples=60)
@given(OWNERS, st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 99))
def test_values_and_gradients_are_pefts(
    owners: list[tuple[str | None, int]], dtype: torch.dtype, seed: int
) -> None:
    check(owners, dtype, seed)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("number", [2, 7, 8, 10])
def test_equal_shares_batched_are_pefts(number: int, tokens: int) -> None:
    check([(f"k{i}", tokens) for i in range(number)], torch.float32, 0)
    check([*((f"k{i}", tokens) for i in range(number)), (None, 2)], torch.bfloat16, 1)


def check(owners: list[tuple[str | None, int]], dtype: torch.dtype, seed: int) -> None:
    made = layer(dtype)
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(n for _, n in owners)
    results = []
    for ours in (True, False):
        x = torch.randn(1, tokens, 6, generator=generator.manual_seed(seed)).to(dtype).requires_grad_()
        if ours:
            with made._routing.to(shares_of(owners)):
                out = made(x)
        else:
            out = by_peft(made, x, owners)
        assert out.dtype == dtype
        out.float().square().sum().backward()
        weights = {name: weight for name, weight in made.named_parameters() if "lora_" in name}
        grads = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
        results.append((out.detach(), x.grad, grads))
        made.zero_grad()
    (out, x_grad, grads), (expected, x_expected, grads_expected) = results
    close = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.3, "rtol": 0.02}
    torch.testing.assert_close(out, expected, **close)
    torch.testing.assert_close(x_grad, x_expected, **close)
    used = {key for key, n in owners if n}
    moved = {name for name, grad in grads.items() if grad.any()}
    assert {name.split(".")[1] for name in grads} == used & RANKS.keys()
    assert moved == {name for name, grad in grads_expected.items() if grad.any()}
    for name in moved:
        torch.testing.assert_close(grads[name], grads_expected[name], **close)
