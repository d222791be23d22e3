"""Which models can be split, which cannot and why, and the configuration of a slice."""

from collections.abc import Callable
from typing import Any

import pytest
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from codec.errors import ModelError
from codec.partition import Span
from workers.attention import IMPLEMENTATION
from workers.families import FAMILIES, check_targets, family_of, lora_targets, span_config


@pytest.mark.parametrize("name", FAMILIES)
def test_every_familys_names_are_its_blocks_linear_layers(
    tiny_model: Callable[[str], Any], name: str
) -> None:
    """`all` adapts every linear layer of a block, `attention` those of its attention."""
    whole, config = tiny_model(name).whole, tiny_model(name).checkpoint.config
    block = whole.model.layers[0]
    linear = {key: type(part).__name__ for key, part in block.named_modules()}
    linear = {key for key, kind in linear.items() if kind == "Linear"}
    attention = {key.split(".")[-1] for key in linear if key.startswith("self_attn.")}
    assert set(lora_targets(config, "attention")) == attention
    assert set(lora_targets(config, "all")) == {key.split(".")[-1] for key in linear}
    assert family_of(config) is FAMILIES[name]


@pytest.mark.parametrize("kind", ["gpt2", "mamba", "gpt_neox", "t5", "qwen2_moe", "gemma3"])
def test_another_architecture_is_named_beside_those_that_work(kind: str) -> None:
    with pytest.raises(ModelError, match=f"architecture '{kind}' cannot be split yet") as caught:
        family_of(AutoConfig.for_model(kind))
    for name in FAMILIES:
        assert name in caught.value.hint


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_rope_that_depends_on_the_batch_is_refused(kind: str, nested: bool) -> None:
    """One silo's long sequence would change another silo's results."""
    config = LlamaConfig()
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4}
    plain = {"rope_type": "default", "rope_theta": 1e4}
    config.rope_parameters = {"sliding_attention": plain, "full_attention": rope} if nested else rope
    with pytest.raises(ModelError, match=f"rope type '{kind}'"):
        family_of(config)


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_a_rope_that_depends_on_the_position_alone_is_not(kind: str) -> None:
    config = LlamaConfig()
    config.rope_parameters = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4}
    assert family_of(config) is FAMILIES["llama"]


def test_quantised_weights_are_refused() -> None:
    """fp8 tensors have the right names and shapes: read without their scales they are silently wrong."""
    with pytest.raises(ModelError, match=r"quantised \(fp8\)"):
        family_of(LlamaConfig(quantization_config={"quant_method": "fp8"}))


def test_a_list_of_layers_is_taken_as_written(tiny_config: Callable[..., PreTrainedConfig]) -> None:
    config = tiny_config("llama")
    assert lora_targets(config, "v_proj, up_proj") == ("v_proj", "up_proj")
    assert lora_targets(tiny_config("phi3"), "qkv_proj") == ("qkv_proj",)


@pytest.mark.parametrize(
    ("name", "choice", "wrong"),
    [
        ("llama", "q_proj,qkv_proj", "qkv_proj"),
        ("phi3", "q_proj", "q_proj"),
        ("llama", "lm_head", "lm_head"),
        ("llama", "embed_tokens", "embed_tokens"),
        ("llama", "", ""),
    ],
)
def test_a_layer_the_blocks_lack_is_named(
    tiny_config: Callable[..., PreTrainedConfig], name: str, choice: str, wrong: str
) -> None:
    with pytest.raises(ModelError, match=f"{name} has no linear layer '{wrong}'") as caught:
        lora_targets(tiny_config(name), choice)
    assert "down_proj" in caught.value.hint


def test_an_adapter_of_nothing_is_refused(tiny_config: Callable[..., PreTrainedConfig]) -> None:
    with pytest.raises(ModelError, match="at least one linear layer"):
        check_targets(tiny_config("llama"), ())


def test_a_slice_has_its_own_blocks_layer_types(tiny_config: Callable[..., PreTrainedConfig]) -> None:
    config = tiny_config("gemma3_text")
    kinds = list(config.layer_types)
    for start in range(5):
        for stop in range(start, 5):
            sliced = span_config(config, Span(start, stop), embeds=start == 0)
            assert sliced.num_hidden_layers == stop - start
            assert sliced.layer_types == kinds[start:stop]
            assert sliced._attn_implementation == IMPLEMENTATION
    assert config.layer_types == kinds
    assert config.num_hidden_layers == 4
    assert config._attn_implementation != IMPLEMENTATION


def test_only_the_embeddings_scale_granites_input(tiny_config: Callable[..., PreTrainedConfig]) -> None:
    config = tiny_config("granite")
    assert span_config(config, Span(0, 2), embeds=True).embedding_multiplier == 12.0
    assert span_config(config, Span(0, 2), embeds=False).embedding_multiplier == 1.0
    assert span_config(config, Span(2, 4), embeds=False).embedding_multiplier == 1.0
    assert config.embedding_multiplier == 12.0
