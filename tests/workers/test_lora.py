"""LoRA on the parts of a model is LoRA on the whole model, as PEFT does it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from codec.errors import MismatchError, ModelError
from codec.partition import Span as Blocks
from codec.plan import LoraPlan
from workers.families import FAMILIES, lora_targets
from workers.lora import (
    adapter_tensors,
    add_adapter,
    drop_adapter,
    load_adapter,
)
from workers.span import Span

# PEFT's front door asks transformers by an older name; Trunkline does not go through it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PARTITIONS = [(head, tail) for head in range(4) for tail in range(4 - head)]
LENGTHS = [13, 5, 1, 20]
IDS = torch.randint(1, 97, (sum(LENGTHS),), generator=torch.Generator().manual_seed(7))
PLAN = LoraPlan(rank=3, alpha=7.0)

Parts = tuple[Span, Span, Span]


def plan_for(tiny_model: Callable[[str], Any], name: str) -> LoraPlan:
    targets = lora_targets(tiny_model(name).checkpoint.config, "all")
    return LoraPlan(rank=3, alpha=7.0, targets=targets)


def tensors_of(parts: Parts, key: str = "one") -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for part in parts:
        mine = adapter_tensors(part, key)
        assert not found.keys() & mine.keys()
        found |= mine
    return found


def randomised(tensors: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """New values for an adapter, B no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    return {key: 0.2 * torch.randn(tensors[key].shape, generator=generator) for key in sorted(tensors)}


def adapted(tiny_model: Callable[[str], Any], split: Any, name: str, cut: tuple[int, int]) -> Parts:
    parts: Parts = split(tiny_model(name).checkpoint, *cut)
    for part in parts:
        add_adapter(part, "one", plan_for(tiny_model, name), seed=5)
    return parts


def logits(parts: Parts) -> Tensor:
    values = IDS
    for part in parts:
        values = part.run(values, LENGTHS, adapter="one" if part.adapters else None)
    return values


@pytest.fixture(scope="module")
def peft_model(tiny_model: Callable[[str], Any]) -> Callable[[str], PeftModel]:
    """The whole model with an adapter `one` on every linear layer, by PEFT's own front door."""
    built: dict[str, PeftModel] = {}

    def get(name: str) -> PeftModel:
        if name not in built:
            from transformers import AutoModelForCausalLM

            whole = AutoModelForCausalLM.from_pretrained(
                tiny_model(name).path, attn_implementation="eager"
            ).eval()
            plan = plan_for(tiny_model, name)
            config = LoraConfig(
                r=plan.rank, lora_alpha=plan.alpha, target_modules=list(plan.targets), task_type="CAUSAL_LM"
            )
            built[name] = get_peft_model(whole, config, adapter_name="one")
            values = randomised(peft_tensors(built[name]))
            for key, weight in peft_tensors(built[name]).items():
                weight.data.copy_(values[key])
        return built[name]

    return get


def peft_tensors(model: PeftModel) -> dict[str, Tensor]:
    """The trainable parameters, named as in the unsplit model."""
    return {
        key.removeprefix("base_model.model.").replace(".one.", "."): weight
        for key, weight in model.named_parameters()
        if weight.requires_grad
    }


def peft_logits(model: PeftModel) -> Tensor:
    return torch.cat([model(row[None]).logits[0] for row in IDS.split(LENGTHS)])


# --- names and first values --------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_names_and_shapes_are_pefts_on_the_whole_model(
    tiny_model: Callable[[str], Any], split: Any, peft_model: Callable[[str], PeftModel], name: str
) -> None:
    expected = {key: weight.shape for key, weight in peft_tensors(peft_model(name)).items()}
    assert expected
    for cut in PARTITIONS:
        found = tensors_of(adapted(tiny_model, split, name, cut))
        assert {key: weight.shape for key, weight in found.items()} == expected


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_first_values_do_not_depend_on_the_partition(
    tiny_model: Callable[[str], Any], split: Any, name: str
) -> None:
    first = tensors_of(adapted(tiny_model, split, name, (0, 0)))
    for cut in PARTITIONS:
        for key, weight in tensors_of(adapted(tiny_model, split, name, cut)).items():
            assert torch.equal(weight, first[key])


def test_first_values_are_drawn_as_peft_draws_them(tiny_model: Callable[[str], Any], split: Any) -> None:
    """Kaiming uniform with a = sqrt(5): uniform within 1/sqrt(inputs). B is zero."""
    found = tensors_of(adapted(tiny_model, split, "llama", (1, 1)))
    a_s = {key: weight for key, weight in found.items() if key.endswith("lora_A.weight")}
    for weight in (weight for key, weight in found.items() if key not in a_s):
        assert not weight.any()
    for weight in a_s.values():
        bound = weight.shape[1] ** -0.5
        assert 0.8 * bound < weight.abs().max() <= bound
        assert abs(weight.std() - bound / 3**0.5) < 0.2 * bound
    values = [tuple(weight.flatten()[:8].tolist()) for weight in a_s.values()]
    assert len(set(values)) == len(values) == 4 * 7


def test_another_seed_is_another_adapter(tiny_model: Callable[[str], Any]) -> None:
    span = Span(tiny_model("llama").checkpoint, Blocks(1, 3))
    add_adapter(span, "one", PLAN, seed=5)
    add_adapter(span, "same", PLAN, seed=5)
    add_adapter(span, "other", PLAN, seed=6)
    one, same, other = (adapter_tensors(span, key) for key in ("one", "same", "other"))
    assert one.keys() == same.keys() == other.keys()
    for key, weight in one.items():
        assert torch.equal(weight, same[key])
        assert weight.data_ptr() != same[key].data_ptr()
        assert torch.equal(weight, other[key]) is key.endswith("lora_B.weight")


def test_drawing_first_values_leaves_torchs_own_generator_alone(tiny_model: Callable[[str], Any]) -> None:
    values = []
    for draw in (False, True):
        span = Span(tiny_model("llama").checkpoint, Blocks(1, 3))
        add_adapter(span, "one", PLAN, seed=5)
        if draw:
            torch.manual_seed(0)
        values.append({key: weight.clone() for key, weight in adapter_tensors(span, "one").items()})
    assert all(torch.equal(values[0][key], values[1][key]) for key in values[0])


# --- values and gradients ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_new_adapter_changes_nothing(tiny_model: Callable[[str], Any], split: Any, name: str) -> None:
    before = logits(split(tiny_model(name).checkpoint, 1, 1))
    # Fused products leave their columns in one buffer, a sum with zero moves them: kernels see other strides.
    torch.testing.assert_close(logits(adapted(tiny_model, split, name, (1, 1))), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients_equal_pefts_on_the_whole_model(
    tiny_model: Callable[[str], Any], split: Any, peft_model: Callable[[str], PeftModel], name: str
) -> None:
    """Gradients are compared within 1e-6 where the largest of the model is 0.1."""
    model = peft_model(name)
    values = {key: weight.data for key, weight in peft_tensors(model).items()}
    whole = peft_logits(model)
    scale = torch.linspace(-1, 1, whole.numel()).reshape(whole.shape)
    model.zero_grad()  # also of what an earlier test left behind
    (whole * scale).sum().backward()
    gradients = {key: weight.grad for key, weight in peft_tensors(model).items()}
    unit = 0.1 / max(float(g.abs().max()) for g in gradients.values() if g is not None)
    base = torch.cat([tiny_model(name).whole(row[None]).logits[0] for row in IDS.split(LENGTHS)])
    assert (base - whole).abs().mean() > 0.02
    for cut in PARTITIONS:
        parts = adapted(tiny_model, split, name, cut)
        for part in parts:
            load_adapter(part, "one", values)
        found = logits(parts)
        torch.testing.assert_close(found, whole, atol=3e-5, rtol=0)
        (found * scale).sum().backward()
        for key, weight in tensors_of(parts).items():
            gradient = gradients[key]
            assert weight.grad is not None
            assert gradient is not None
            assert (gradient * unit).abs().max() > 1e-4
            torch.testing.assert_close(weight.grad * unit, gradient * unit, atol=1e-6, rtol=0)
        for part in parts:
            frozen = [p for n, p in part.model.named_parameters() if "lora_" not in n]
            assert all(p.grad is None and not p.requires_grad for p in frozen)


def test_a_boundary_cut_in_the_graph_passes_the_gradient_on(
    tiny_model: Callable[[str], Any], split: Any, peft_model: Callable[[str], PeftModel]
) -> None:
    """Each part differentiates alone, from the gradient at its output, as processes apart do."""
    model = peft_model("gemma2")
    values = {key: weight.data for key, weight in peft_tensors(model).items()}
    model.zero_grad()
    peft_logits(model).square().sum().mul(1e-3).backward()
    parts = adapted(tiny_model, split, "gemma2", (1, 1))
    for part in parts:
        load_adapter(part, "one", values)
    inputs: list[Tensor] = [IDS]
    outputs: list[Tensor] = []
    for part in parts:
        outputs.append(part.run(inputs[-1], LENGTHS, adapter="one"))
        inputs.append(outputs[-1].detach().requires_grad_())
    outputs[2].square().sum().mul(1e-3).backward()
    for index in (1, 0):
        outputs[index].backward(inputs[index + 1].grad)
    for key, weight in tensors_of(parts).items():
        expected = peft_tensors(model)[key].grad
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, expected, atol=1e-6, rtol=1e-5)


def test_an_adapter_stays_fp32_on_a_bf16_model(tiny_model: Callable[[str], Any], split: Any) -> None:
    """Small steps would be lost in bf16."""
    parts: Parts = split(tiny_model("llama").checkpoint, 1, 1, dtype=torch.bfloat16)
    for part in parts:
        add_adapter(part, "one", PLAN, seed=5)
        load_adapter(part, "one", randomised(adapter_tensors(part, "one")))
    found = logits(parts)
    assert found.dtype == torch.bfloat16
    found.float().sum().backward()
    for weight in tensors_of(parts).values():
        assert weight.dtype == torch.float32
        assert weight.grad is not None
        assert weight.grad.dtype == torch.float32
    assert {p.dtype for n, p in parts[1].model.named_parameters() if "lora_" not in n} == {torch.bfloat16}


# --- several adapters ----------------------------------------------------------------------------------


@pytest.fixture
def trunk(tiny_model: Callable[[str], Any]) -> Span:
    """Blocks 1 and 2 with adapters `a`, `b` and `c`, all of them random and used in that order."""
    span = Span(tiny_model("llama").checkpoint, Blocks(1, 3))
    for seed, key in enumerate("abc"):
        add_adapter(span, key, PLAN, seed)
        load_adapter(span, key, randomised(adapter_tensors(span, key), seed))
    return span


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(sum(LENGTHS), 32, generator=torch.Generator().manual_seed(1))


def run_with(span: Span, key: str | None, values: Tensor) -> Tensor:
    return span.run(values, LENGTHS, adapter=key)


def test_each_adapter_runs_alone(trunk: Span, hidden: Tensor, tiny_model: Callable[[str], Any]) -> None:
    found = {key: run_with(trunk, key, hidden) for key in "cabbac"}
    for seed, key in enumerate("abc"):
        alone = Span(tiny_model("llama").checkpoint, Blocks(1, 3))
        add_adapter(alone, "only", PLAN, seed=9)
        load_adapter(alone, "only", randomised(adapter_tensors(alone, "only"), seed))
        assert torch.equal(run_with(alone, "only", hidden), found[key])
    assert not torch.allclose(found["a"], found["b"])


def test_no_adapter_is_the_base_model(trunk: Span, hidden: Tensor, tiny_model: Callable[[str], Any]) -> None:
    base = Span(tiny_model("llama").checkpoint, Blocks(1, 3)).run(hidden, LENGTHS)
    before = run_with(trunk, "a", hidden)
    assert torch.equal(run_with(trunk, None, hidden), base)
    assert torch.equal(run_with(trunk, "a", hidden), before)
    assert not torch.allclose(before, base)


@pytest.mark.parametrize("between", ["b", None, "drop b", "drop a used", "add", "load"])
def test_what_happens_between_forward_and_backward_loses_no_gradient(
    trunk: Span, hidden: Tensor, between: str | None
) -> None:
    """Micro-batches of several runs are in flight at once."""
    run_with(trunk, "c", hidden).square().sum().backward()
    expected = {key: weight.grad for key, weight in adapter_tensors(trunk, "c").items()}
    assert all(gradient is not None and gradient.any() for gradient in expected.values())
    for weight in adapter_tensors(trunk, "c").values():
        weight.grad = None

    loss = run_with(trunk, "c", hidden).square().sum()
    if between == "drop b":
        drop_adapter(trunk, "b")
    elif between == "drop a used":
        run_with(trunk, "a", hidden)
        drop_adapter(trunk, "a")
    elif between == "add":
        add_adapter(trunk, "d", PLAN, seed=1)
    elif between == "load":
        load_adapter(trunk, "b", randomised(adapter_tensors(trunk, "b"), 77))
    else:
        run_with(trunk, between, hidden)
    loss.backward()
    for key, weight in adapter_tensors(trunk, "c").items():
        assert weight.grad is not None
        assert torch.equal(weight.grad, expected[key])
    assert all(w.grad is None for key in "ab" for w in adapter_tensors(trunk, key).values())


@pytest.mark.parametrize("used", ["a", "b", None])
def test_a_dropped_adapter_is_gone_and_the_others_stay(trunk: Span, hidden: Tensor, used: str | None) -> None:
    """Dropping the adapter in use warns of nothing and puts no other silo's adapter in its place."""
    others = {key: run_with(trunk, key, hidden) for key in "bc"}
    base = run_with(trunk, None, hidden)
    before = trunk.weight_bytes
    size = sum(weight.nbytes for weight in adapter_tensors(trunk, "a").values())
    run_with(trunk, used, hidden)
    drop_adapter(trunk, "a")
    assert adapter_tensors(trunk, "a") == {}
    assert trunk.weight_bytes == before - size
    assert torch.equal(trunk.run(hidden, LENGTHS), base)
    for key, expected in others.items():
        assert torch.equal(run_with(trunk, key, hidden), expected)
    add_adapter(trunk, "a", PLAN, seed=0)
    assert torch.equal(run_with(trunk, "a", hidden), base)
    for key in "abc":
        drop_adapter(trunk, key)
    assert torch.equal(trunk.run(hidden, LENGTHS), base)


def test_adapters_may_differ_in_rank_and_layers(tiny_model: Callable[[str], Any], hidden: Tensor) -> None:
    plans = {
        "small": LoraPlan(rank=1, alpha=1.0, targets=("q_proj",)),
        "large": LoraPlan(rank=5, alpha=3.0, targets=("q_proj", "down_proj")),
    }
    together = Span(tiny_model("llama").checkpoint, Blocks(1, 3))
    for key, plan in plans.items():
        add_adapter(together, key, plan, seed=3)
        load_adapter(together, key, randomised(adapter_tensors(together, key)))
    for key, plan in plans.items():
        alone = Span(tiny_model("llama").checkpoint, Blocks(1, 3))
        add_adapter(alone, key, plan, seed=3)
        load_adapter(alone, key, randomised(adapter_tensors(alone, key)))
        assert torch.equal(run_with(together, key, hidden), run_with(alone, key, hidden))
        assert adapter_tensors(together, key).keys() == adapter_tensors(alone, key).keys()


@pytest.mark.parametrize("key", ["0", "1", "lora_A", "lora_B", "weight", "layers", "q_proj", "default"])
def test_no_name_of_an_adapter_is_mistaken_for_a_part_of_the_model(
    tiny_model: Callable[[str], Any], key: str
) -> None:
    span = Span(tiny_model("llama").checkpoint, Blocks(1, 3))
    add_adapter(span, "x", PLAN, seed=3)
    add_adapter(span, key, PLAN, seed=3)
    one, other = adapter_tensors(span, "x"), adapter_tensors(span, key)
    assert other.keys() == one.keys()
    assert all(torch.equal(one[name], other[name]) and one[name] is not other[name] for name in one)


def test_a_part_of_a_span_runs_with_the_adapter(trunk: Span, hidden: Tensor) -> None:
    whole = run_with(trunk, "b", hidden)
    first = trunk.run(hidden, LENGTHS, blocks=Blocks(1, 2), adapter="b")
    assert torch.equal(trunk.run(first, LENGTHS, blocks=Blocks(2, 3), adapter="b"), whole)


def test_an_adapter_may_be_of_a_part_of_the_hosted_blocks(
    tiny_model: Callable[[str], Any], hidden: Tensor
) -> None:
    """A session or a run adapts its own trunk, not all that its worker hosts."""
    checkpoint = tiny_model("llama").checkpoint
    host, alone = Span(checkpoint, Blocks(0, 4)), Span(checkpoint, Blocks(1, 3))
    base = host.run(hidden, LENGTHS)
    add_adapter(host, "part", PLAN, 5, Blocks(1, 3))
    add_adapter(alone, "part", PLAN, 5)
    found, expected = adapter_tensors(host, "part"), adapter_tensors(alone, "part")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    values = randomised(found)
    load_adapter(host, "part", values)
    load_adapter(alone, "part", values)
    found = host.run(hidden, LENGTHS, blocks=Blocks(1, 3), adapter="part")
    assert torch.equal(found, run_with(alone, "part", hidden))
    drop_adapter(host, "part")
    assert torch.equal(host.run(hidden, LENGTHS), base)
    add_adapter(host, "nothing", PLAN, 5, Blocks(2, 2))
    assert adapter_tensors(host, "nothing") == {}


# --- errors --------------------------------------------------------------------------------------------


def test_a_missing_tensor_is_named(trunk: Span) -> None:
    values = {key: weight.clone() for key, weight in adapter_tensors(trunk, "a").items()}
    gone = "model.layers.2.self_attn.k_proj.lora_B.weight"
    del values[gone]
    with pytest.raises(MismatchError, match=f"{gone} is missing"):
        load_adapter(trunk, "a", values)


@pytest.mark.parametrize("shape", [(4, 32), (3, 31), (32, 3), (3,)])
def test_a_tensor_of_another_shape_is_named(trunk: Span, shape: tuple[int, ...]) -> None:
    values = {key: weight.clone() for key, weight in adapter_tensors(trunk, "a").items()}
    wrong = "model.layers.2.self_attn.k_proj.lora_A.weight"
    values[wrong] = torch.zeros(shape)
    with pytest.raises(MismatchError, match=rf"{wrong} is \({', ?'.join(map(str, shape))},?\), \(3, 32\)"):
        load_adapter(trunk, "a", values)


def test_an_adapter_that_does_not_fit_is_not_loaded_in_part(trunk: Span, hidden: Tensor) -> None:
    before = run_with(trunk, "a", hidden)
    values = randomised(adapter_tensors(trunk, "a"), 5)
    values.pop(list(adapter_tensors(trunk, "a"))[-1])
    with pytest.raises(MismatchError):
        load_adapter(trunk, "a", values)
    assert torch.equal(run_with(trunk, "a", hidden), before)


@pytest.mark.parametrize(
    "targets",
    [("nonsense",), ("q_proj", "lm_head"), ("self_attn",), ("input_layernorm",), ("0.self_attn.q_proj",)],
)
@pytest.mark.parametrize("blocks", [Blocks(1, 3), Blocks(1, 1)])
def test_layers_that_no_adapter_can_have_are_refused(
    tiny_model: Callable[[str], Any], targets: tuple[str, ...], blocks: Blocks
) -> None:
    """A plan comes from a peer: it is held against the family before PEFT sees it."""
    span = Span(tiny_model("llama").checkpoint, blocks)
    with pytest.raises(ModelError, match="llama has no linear layer"):
        add_adapter(span, "one", LoraPlan(targets=targets), seed=0)
    assert not any("lora_" in name for name, _ in span.model.named_parameters())


def test_a_part_without_blocks_has_an_adapter_without_tensors(
    tiny_model: Callable[[str], Any], split: Any
) -> None:
    head, _, tail = split(tiny_model("llama").checkpoint, 0, 0)
    for part in (head, tail):
        add_adapter(part, "one", PLAN, seed=0)
        load_adapter(part, "one", {})
        assert adapter_tensors(part, "one") == {}
        drop_adapter(part, "one")
