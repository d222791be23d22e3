"""Requests with different partitions, adapters and masks in one pass: each as if the whole model ran it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from codec.errors import LimitError, MismatchError
from codec.partition import Partition
from codec.partition import Span as Blocks
from codec.plan import LoraPlan
from workers.families import FAMILIES, lora_targets
from workers.kv import KVMemory, RowCache
from workers.lora import adapter_tensors, add_adapter, load_adapter
from workers.parts import Part, stretches
from workers.span import Span

TOLERANCE = 3e-5

# --- who is in which blocks ----------------------------------------------------------------------------

SPANS = st.tuples(st.integers(0, 9), st.integers(0, 9)).map(lambda edges: Blocks(min(edges), max(edges)))


@given(st.lists(SPANS, min_size=1, max_size=6))
def test_each_range_goes_through_its_blocks_in_order_and_no_others(ranges: list[Blocks]) -> None:
    walked: list[list[int]] = [[] for _ in ranges]
    found = stretches(ranges)
    for blocks, members in found:
        assert members == tuple(sorted(set(members)))
        for index in members:
            walked[index] += range(blocks.start, blocks.stop)
    assert walked == [list(range(span.start, span.stop)) for span in ranges]
    # Never cut without need: who is in changes at every cut.
    for (before, some), (after, others) in pairwise(found):
        assert before.stop < after.start or some != others


@given(SPANS, st.integers(1, 5))
def test_equal_ranges_are_one_stretch(span: Blocks, number: int) -> None:
    assert stretches([span] * number) == [(span, tuple(range(number)))]


# --- against PEFT on the whole model ---------------------------------------------------------------------


@dataclass(frozen=True)
class Silo:
    """A partition, an adapter and sequences."""

    cut: tuple[int, int]
    adapter: str | None
    lengths: tuple[int, ...]

    @property
    def trunk(self) -> Blocks:
        return Partition(*self.cut).spans(4)[1]


SILOS = (
    Silo((1, 1), "one", (5, 9)),
    Silo((0, 2), "two", (8,)),
    Silo((2, 1), None, (3,)),
    Silo((1, 1), "two", (1, 7)),
    Silo((3, 0), "one", (4,)),
    Silo((0, 3), "one", (4,)),
)
RANKS = {"one": 3, "two": 5}


def plan(model: Any, key: str) -> LoraPlan:
    targets = lora_targets(model.checkpoint.config, "all")
    return LoraPlan(rank=RANKS[key], alpha=7.0, targets=targets)


def peft_of(model: Any) -> PeftModel:
    """The whole model with random adapters `one` and `two`, by PEFT's own front door."""
    whole = AutoModelForCausalLM.from_pretrained(model.path, attn_implementation="eager").eval()
    configs = {
        key: LoraConfig(r=rank, lora_alpha=7, target_modules=list(plan(model, key).targets))
        for key, rank in RANKS.items()
    }
    peft = get_peft_model(whole, configs["one"], adapter_name="one")
    peft.add_adapter("two", configs["two"])
    generator = torch.Generator().manual_seed(3)
    for name, weight in sorted(peft.named_parameters()):
        if "lora_" in name:
            weight.data = 0.2 * torch.randn(weight.shape, generator=generator)
    return peft


def tensors(peft: PeftModel, key: str) -> dict[str, Any]:
    return {
        name.removeprefix("base_model.model.").replace(f".{key}.", "."): weight
        for name, weight in peft.named_parameters()
        if f".{key}." in name
    }


def whole_logits(peft: PeftModel, silo: Silo, ids: Tensor) -> Tensor:
    def run() -> Tensor:
        return torch.cat([peft(row[None]).logits[0] for row in ids.split(list(silo.lengths))])

    if silo.adapter is None:
        with peft.disable_adapter():
            return run()
    peft.set_adapter(silo.adapter)
    return run()


def texts(silos: Sequence[Silo]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(1, 97, (sum(silo.lengths),), generator=generator) for silo in silos]


class Split:
    """One worker that hosts every block, and each silo's own head and tail."""

    def __init__(self, model: Any, peft: PeftModel, silos: Sequence[Silo], split: Callable[..., Any]) -> None:
        self.silos = silos
        self.host = Span(model.checkpoint, Blocks(0, 4))
        self.ends = []
        for silo in silos:
            front, _, back = split(model.checkpoint, *silo.cut)
            if silo.adapter is not None:
                for span in (front, back):
                    self._adapt(span, model, peft, silo.adapter)
            self.ends.append((front, back))
        for key in RANKS:
            self._adapt(self.host, model, peft, key)

    def _adapt(self, span: Span, model: Any, peft: PeftModel, key: str) -> None:
        add_adapter(span, key, plan(model, key), seed=0)
        load_adapter(span, key, {name: weight.data for name, weight in tensors(peft, key).items()})

    def through(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """Logits of every silo's texts, the trunk in one pass."""
        parts = []
        for silo, (front, _), text in zip(self.silos, self.ends, ids, strict=True):
            hidden = front.run(text, silo.lengths, adapter=silo.adapter)
            parts.append(Part(hidden, silo.lengths, silo.trunk, silo.adapter))
        outputs = self.host.run_parts(parts)
        return [
            back.run(output, silo.lengths, adapter=silo.adapter)
            for silo, (_, back), output in zip(self.silos, self.ends, outputs, strict=True)
        ]

    def gradient(self, key: str) -> dict[str, Tensor]:
        """Of each of an adapter's tensors, summed over the spans that hold it."""
        sums: dict[str, Tensor] = {}
        spans = [self.host, *(end for pair in self.ends for end in pair)]
        for name, weight in ((n, w) for span in spans for n, w in adapter_tensors(span, key).items()):
            if weight.grad is not None:
                sums[name] = sums.get(name, torch.zeros_like(weight)) + weight.grad
        return sums


@pytest.mark.parametrize("name", FAMILIES)
def test_mixed_parts_have_the_logits_and_gradients_of_each_alone_on_the_whole_model(
    tiny_model: Callable[[str], Any], split: Callable[..., Any], name: str
) -> None:
    model = tiny_model(name)
    peft, ids = peft_of(model), texts(SILOS)
    built = Split(model, peft, SILOS, split)
    found = built.through(ids)
    scales = [torch.linspace(-1, 1, logits.numel()).reshape(logits.shape) for logits in found]
    sum((logits * scale).sum() for logits, scale in zip(found, scales, strict=True)).backward()  # type: ignore[union-attr]
    for silo, text, logits, scale in zip(SILOS, ids, found, scales, strict=True):
        expected = whole_logits(peft, silo, text)
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
        if silo.adapter is not None:
            (expected * scale).sum().backward()
    for key in RANKS:
        wanted = {tensor: weight.grad for tensor, weight in tensors(peft, key).items()}
        unit = 0.1 / max(float(gradient.abs().max()) for gradient in wanted.values())
        gradients = built.gradient(key)
        assert gradients.keys() == wanted.keys()
        for tensor, gradient in gradients.items():
            torch.testing.assert_close(gradient * unit, wanted[tensor] * unit, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text", "granite"])
def test_sessions_with_different_partitions_and_adapters_prefill_and_decode_in_one_pass(
    tiny_model: Callable[[str], Any], split: Callable[..., Any], name: str
) -> None:
    """Ten sessions: some bring a piece of their prompt while others bring a token each."""
    model = tiny_model(name)
    peft = peft_of(model)
    cuts = [(1, 1), (0, 2), (2, 1), (1, 1), (3, 0), (0, 3), (1, 2), (2, 0), (1, 0), (0, 1)]
    silos = [
        Silo(cut, None if i == 4 else ("one", "two")[i % 2 and i < 4], (12 + i,))
        for i, cut in enumerate(cuts)
    ]
    ids = texts(silos)
    with torch.no_grad():
        built = Split(model, peft, silos, split)
        expected = [whole_logits(peft, silo, text) for silo, text in zip(silos, ids, strict=True)]
        spans = [(front, built.host, back) for front, back in built.ends]
        memory = KVMemory()
        caches = [
            [
                RowCache(shape, 24, memory)
                for shape in (front.kv_shape(), host.kv_shape(silo.trunk), back.kv_shape())
            ]
            for silo, (front, host, back) in zip(silos, spans, strict=True)
        ]
        chunks = [[6 + i, 1, 1, 1, 1, 1, 1] if i % 3 else [0, 0, 9 + i, 1, 1, 1] for i in range(len(silos))]
        found: list[list[Tensor]] = [[] for _ in silos]
        for step in range(6):
            here = [i for i, own in enumerate(chunks) if own[step]]
            parts = []
            for i in here:
                new, at = chunks[i][step], caches[i][0].length
                hidden = spans[i][0].run(
                    ids[i][at : at + new], [new], adapter=silos[i].adapter, caches=caches[i][:1]
                )
                parts.append(Part(hidden, [new], silos[i].trunk, silos[i].adapter, caches[i][1:2]))
            for i, part, output in zip(here, parts, built.host.run_parts(parts), strict=True):
                found[i].append(
                    spans[i][2].run(output, part.lengths, adapter=silos[i].adapter, caches=caches[i][2:])
                )
    for logits, whole, own in zip(found, expected, caches, strict=True):
        assert len({cache.length for cache in own}) == 1
        torch.testing.assert_close(torch.cat(logits), whole[: own[0].length], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_masked_and_causal_parts_share_a_pass(
    tiny_model: Callable[[str], Any], split: Callable[..., Any], name: str
) -> None:
    """Two sequences whose first tokens see each other both ways, between causal ones."""
    model = tiny_model(name)
    silos = [Silo((1, 1), None, (6,)), Silo((0, 1), None, (5, 4)), Silo((1, 2), None, (3,))]
    ids = texts(silos)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    mask[:3, :3] = True
    mask[5:7, 5:7] = True
    masks = [None, mask, None]
    host = Span(model.checkpoint, Blocks(0, 4))
    parts = []
    with torch.no_grad():
        for silo, text, own in zip(silos, ids, masks, strict=True):
            front, _, _ = split(model.checkpoint, *silo.cut)
            parts.append(Part(front.run(text, silo.lengths, mask=own), silo.lengths, silo.trunk, mask=own))
        outputs = host.run_parts(parts)
        for silo, text, own, output in zip(silos, ids, masks, outputs, strict=True):
            _, _, back = split(model.checkpoint, *silo.cut)
            logits = back.run(output, silo.lengths, mask=own)
            at = 0
            for length in silo.lengths:
                here = slice(at, at + length)
                seen = torch.ones(length, length, dtype=torch.bool).tril() if own is None else own[here, here]
                dense = torch.zeros(1, 1, length, length).masked_fill(~seen, torch.finfo(torch.float32).min)
                kinds = {"full_attention": dense, "sliding_attention": dense}
                whole = model.whole(
                    text[here][None], attention_mask=kinds if name == "gemma2" else dense
                ).logits[0]
                torch.testing.assert_close(logits[here], whole, atol=TOLERANCE, rtol=0)
                at += length


def test_logits_of_kept_positions_of_several_parts(
    tiny_model: Callable[[str], Any], split: Callable[..., Any]
) -> None:
    _, _, back = split(tiny_model("llama").checkpoint, 1, 1)
    hidden = [torch.randn(n, 32, generator=torch.Generator().manual_seed(n)) for n in (4, 6)]
    keep = [torch.tensor([3, 1]), None]
    parts = [Part(h, [len(h)], keep=k) for h, k in zip(hidden, keep, strict=True)]
    with torch.no_grad():
        found = back.run_parts(parts)
        for part, logits in zip(parts, found, strict=True):
            alone = back.run(part.packed, part.lengths)
            expected = alone if part.keep is None else alone[part.keep]
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


# --- errors --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def host(tiny_model: Callable[[str], Any]) -> Span:
    return Span(tiny_model("llama").checkpoint, Blocks(0, 4))


def test_parts_with_and_without_caches_are_not_mixed(host: Span) -> None:
    cache = RowCache(host.kv_shape(), 4)
    parts = [Part(torch.randn(2, 32), [2], caches=[cache]), Part(torch.randn(2, 32), [2])]
    with pytest.raises(ValueError, match="cannot share a pass"):
        host.run_parts(parts)
    assert cache.length == 0


def test_an_adapter_that_the_span_does_not_have_is_an_error_and_not_the_base_model(host: Span) -> None:
    with pytest.raises(ValueError, match="no adapter 'x'"):
        host.run(torch.randn(2, 32), [2], adapter="x")


def test_one_full_cache_stops_the_pass_before_anything_happens(host: Span) -> None:
    caches = [RowCache(host.kv_shape(), capacity) for capacity in (4, 1)]
    with pytest.raises(LimitError, match="2 tokens do not fit a session row of 1"):
        host.run_parts([Part(torch.randn(2, 32), [2], caches=[cache]) for cache in caches])
    assert [cache.length for cache in caches] == [0, 0]


def test_the_ends_of_a_model_run_whole(tiny_model: Callable[[str], Any]) -> None:
    """Part of a tail would be given the final norm in the middle of the model."""
    tail = Span(tiny_model("llama").checkpoint, Blocks(2, 4), predicts=True)
    with pytest.raises(MismatchError, match="run whole"):
        tail.run(torch.randn(2, 32), [2], blocks=Blocks(2, 3))
