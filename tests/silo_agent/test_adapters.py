"""Adapters in PEFT's format: PEFT reads what is written, and what PEFT wrote can be split."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from codec.errors import MismatchError, ModelError
from codec.partition import Span
from codec.plan import LoraPlan
from silo_agent.adapters import SavedAdapter, read_adapter, write_adapter

PLAN = LoraPlan(rank=3, alpha=5.0, targets=("q_proj", "v_proj", "down_proj"))
IDS = list(range(40, 70))
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning:transformers"
)
"""PEFT 0.21 asks transformers 5 for it."""


def random_adapter(pool: Any, plan: LoraPlan) -> dict[str, Tensor]:
    """An adapter of the whole model whose every weight matters."""
    ends = pool.ends(3, 3 - 1)  # A trunk of one block: its names are those of the third.
    ends.adapt(plan, seed=0)
    tensors = {name: tensor.detach().clone() for name, tensor in ends.adapter().items()}
    for name in [name for name in tensors if ".layers.2." in name]:
        tensors[name.replace(".layers.2.", ".layers.3.")] = tensors[name].clone()
    generator = torch.Generator().manual_seed(1)
    return {name: 0.3 * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}


def split_logits(pool: Any, saved: SavedAdapter, partition: tuple[int, int]) -> Tensor:
    ends = pool.ends(*partition)
    ends.adapt(saved.plan, 0, saved.tensors)
    with pool.session(ends=ends, adapter=(saved.plan, saved.within(ends.trunk))) as session:
        prompt = session.extend([0], [IDS[:20]], keep=torch.arange(20))
        return torch.cat([prompt, *(session.extend([0], [[token]]) for token in IDS[20:])])


@torch.no_grad()
def whole_logits(model: Any) -> Tensor:
    return model(torch.tensor([IDS])).logits[0]


def test_what_is_written_reads_back(pool: Any, tmp_path: Path) -> None:
    tensors = random_adapter(pool, PLAN)
    write_adapter(tmp_path / "a", PLAN, tensors, "the/base")
    saved = read_adapter(tmp_path / "a")
    assert (saved.plan.rank, saved.plan.alpha, set(saved.plan.targets)) == (3, 5.0, set(PLAN.targets))
    assert saved.tensors.keys() == tensors.keys()
    assert all(torch.equal(saved.tensors[name], tensors[name]) for name in tensors)
    assert (
        json.loads((tmp_path / "a/adapter_config.json").read_text())["base_model_name_or_path"] == "the/base"
    )


def test_a_span_gets_its_own_blocks_in_the_order_of_names(pool: Any) -> None:
    tensors = {f"model.layers.{i}.mlp.up_proj.lora_A.weight": torch.full((1,), i) for i in (10, 1, 2, 9)}
    saved = SavedAdapter(PLAN, tensors)
    within = saved.within(Span(2, 10))
    assert [int(tensor) for tensor in within.values()] == [2, 9]
    assert list(within) == sorted(within)


@pytest.mark.parametrize("partition", [(2, 2), (0, 1), (3, 0)])
def test_plain_peft_gives_the_split_models_logits(
    pool: Any, tiny: Any, tmp_path: Path, partition: tuple[int, int]
) -> None:
    write_adapter(tmp_path / "a", PLAN, random_adapter(pool, PLAN), str(tiny.path))
    theirs = whole_logits(PeftModel.from_pretrained(copy.deepcopy(tiny.whole), str(tmp_path / "a")).eval())
    ours = split_logits(pool, read_adapter(tmp_path / "a"), partition)
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)
    assert float((theirs - tiny.logits(IDS)).abs().max()) > 1, "the adapter changes nothing"


@pytest.mark.parametrize("settings", [{}, {"lora_alpha": 7, "init_lora_weights": "gaussian"}])
def test_what_peft_trained_on_the_whole_model_can_be_split(
    pool: Any, tiny: Any, tmp_path: Path, settings: dict[str, Any]
) -> None:
    options = {"r": 4, "target_modules": ["k_proj", "gate_proj"], "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(copy.deepcopy(tiny.whole), LoraConfig(**options)).train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    for _ in range(3):
        model(torch.tensor([IDS]), labels=torch.tensor([IDS])).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "a")
    saved = read_adapter(tmp_path / "a")
    assert saved.plan == LoraPlan(4, settings.get("lora_alpha", 8), ("gate_proj", "k_proj"))
    theirs = whole_logits(model.eval())
    torch.testing.assert_close(split_logits(pool, saved, (1, 2)), theirs, atol=5e-5, rtol=0)
    assert float((theirs - tiny.logits(IDS)).abs().max()) > 0.1, "the adapter changes nothing"


@pytest.fixture
def written(pool: Any, tmp_path: Path) -> Path:
    write_adapter(tmp_path / "a", PLAN, random_adapter(pool, PLAN), "base")
    return tmp_path / "a"


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"bias": "all"},
        {"lora_bias": True},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 2}},
        {"modules_to_save": ["lm_head"]},
        {"layer_replication": [[0, 3], [2, 6]]},
        {"init_lora_weights": "pissa"},
    ],
)
def test_what_a_split_model_would_get_wrong_is_refused(written: Path, change: dict[str, object]) -> None:
    config = written / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(ModelError, match=f"uses .*{next(iter(change))}.*cannot be split"):
        read_adapter(written)


@pytest.mark.parametrize(
    "name",
    ["lm_head.lora_A.weight", "model.layers.0.q_proj.lora_B.bias", "model.layers.x.q_proj.lora_A.weight"],
)
def test_a_tensor_that_no_block_has_is_refused(written: Path, name: str) -> None:
    tensors = load_file(written / "adapter_model.safetensors")
    save_file(
        {**tensors, f"base_model.model.{name}": torch.zeros(2, 2)}, written / "adapter_model.safetensors"
    )
    with pytest.raises(ModelError, match=f"adapts {name}"):
        read_adapter(written)


def test_a_tensor_that_is_missing_is_named_when_it_is_needed(pool: Any, written: Path) -> None:
    saved = read_adapter(written)
    name = next(name for name in saved.tensors if ".layers.3." in name)
    del saved.tensors[name]
    with pytest.raises(MismatchError, match=f"{name} is missing"):
        split_logits(pool, saved, (2, 2))


def test_what_is_no_adapter_says_so_at_once(written: Path, tmp_path: Path, tiny: Any) -> None:
    for path in (tmp_path / "missing", Path("owner/name"), tiny.path, written / "adapter_config.json"):
        # Never looked up on the hub: a mistyped path would be told to it, and take half a minute.
        with pytest.raises(ModelError, match=r"not a PEFT LoRA adapter: it has no adapter_config\.json"):
            read_adapter(path)
    (written / "adapter_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(ModelError, match="it holds no tensor"):
        read_adapter(written)
    (written / "adapter_model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="not a PEFT LoRA adapter"):
        read_adapter(written)
    (written / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"it has no adapter_model\.safetensors"):
        read_adapter(written)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"peft_type": "LORA", "r": 0}', '{"r": "many"}'])
def test_a_configuration_that_makes_no_sense(written: Path, text: str) -> None:
    (written / "adapter_config.json").write_text(text)
    with pytest.raises(ModelError, match="not a PEFT LoRA adapter") as caught:
        read_adapter(written)
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_kind(written: Path) -> None:
    PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM").save_pretrained(str(written))
    with pytest.raises(ModelError, match="not a PEFT LoRA adapter: it is of another kind"):
        read_adapter(written)
