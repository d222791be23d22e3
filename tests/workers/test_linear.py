"""Fused and frozen linear layers against torch's own, called in any order and however often."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from workers.linear import freeze_linears

SIZES = {"q_proj": 6, "k_proj": 2, "v_proj": 4, "o_proj": 5}


class Attention(nn.Module):
    def __init__(self, bias: dict[str, bool], inputs: dict[str, int]) -> None:
        super().__init__()
        for name, size in SIZES.items():
            setattr(self, name, nn.Linear(inputs.get(name, 5), size, bias=bias.get(name, False)))


def built(
    bias: Any = (), inputs: dict[str, int] | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """The layers, their weights by name, and the room that fusing made."""
    with torch.device("meta"):
        model = nn.Sequential(Attention(dict.fromkeys(bias, True), inputs or {}))
    room = freeze_linears(model, dtype, torch.device("cpu"))
    torch.manual_seed(0)
    values = {name: torch.randn(like.shape).to(dtype) for name, like in model.state_dict().items()}
    state = {name: room[name].copy_(value) if name in room else value for name, value in values.items()}
    model.load_state_dict(state, assign=True)
    model.requires_grad_(False)
    return model[0], {name.removeprefix("0."): value for name, value in values.items()}, room


def expected(values: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, values[f"{name}.weight"], values.get(f"{name}.bias"))


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.sampled_from(list(SIZES)), st.integers(0, 2)), max_size=12),
    st.booleans(),
    st.booleans(),
)
def test_any_order_of_calls_and_inputs_gives_each_layer_its_own(
    calls: list[tuple[str, int]], bias: bool, trains: bool
) -> None:
    layers, values, _ = built(SIZES if bias else ())
    inputs = [torch.randn(1, 3, 5, requires_grad=trains) for _ in range(3)]
    found = [getattr(layers, name)(inputs[i]) for name, i in calls]
    wanted = [expected(values, name, inputs[i]) for name, i in calls]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    if trains and calls:
        grads = [
            torch.autograd.grad(sum(o.square().sum() for o in outs), inputs, allow_unused=True)  # type: ignore[arg-type]
            for outs in (found, wanted)
        ]
        for one, other in zip(*grads, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 40])
def test_dtypes_and_numbers_of_rows(dtype: torch.dtype, rows: int) -> None:
    layers, values, _ = built(SIZES, dtype=dtype)
    x = torch.randn(rows, 5).to(dtype).requires_grad_()
    for name in SIZES:
        found, wanted = getattr(layers, name)(x), expected(values, name, x)
        assert found.dtype == dtype
        torch.testing.assert_close(found, wanted, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=0)


def test_neighbours_are_views_of_one_buffer_and_forget_what_they_gave() -> None:
    layers, values, room = built(SIZES)
    assert set(room) == {
        f"0.{name}.{kind}" for name in ("q_proj", "k_proj", "v_proj") for kind in ("weight", "bias")
    }
    assert {name: list(value.shape) for name, value in layers.state_dict().items()} == {
        name: list(value.shape) for name, value in values.items()
    }
    storages = {
        getattr(layers, name).weight.untyped_storage().data_ptr() for name in ("q_proj", "k_proj", "v_proj")
    }
    assert len(storages) == 1
    assert layers.q_proj.weight.untyped_storage().nbytes() == 4 * 5 * 12
    x = torch.randn(2, 5)
    for name in ("v_proj", "q_proj", "k_proj"):
        getattr(layers, name)(x)
    kept = vars(layers.q_proj.neighbours)
    assert kept["_input"] is None
    assert kept["_shares"] == {}


@pytest.mark.parametrize(
    ("bias", "inputs"), [(["q_proj"], {}), ((), {"k_proj": 4})], ids=["one bias of three", "other inputs"]
)
def test_layers_that_do_not_fit_together_are_left_apart(bias: Any, inputs: dict[str, int]) -> None:
    layers, values, room = built(bias, inputs)
    assert room == {}
    for name in SIZES:
        x = torch.randn(2, inputs.get(name, 5), requires_grad=True)
        torch.testing.assert_close(getattr(layers, name)(x), expected(values, name, x))
