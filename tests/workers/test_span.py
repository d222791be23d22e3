"""Head, trunk and tail together are the whole model, for every family and every partition."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from codec.errors import LimitError, MismatchError, ModelError
from codec.lengths import lengths_of, pack, unpack
from codec.partition import Partition
from codec.partition import Span as Blocks
from workers.checkpoint import Checkpoint
from workers.families import FAMILIES
from workers.kv import KVMemory, RowCache
from workers.span import Span

MODELS = [*FAMILIES, "llama-tied"]
PARTITIONS = [(head, tail) for head in range(4) for tail in range(4 - head)]
LENGTHS = (13, 5, 1, 20)
NEW_TOKENS = 64
TOLERANCE = 2e-5
"""Of logits with a standard deviation up to 1.6; the two ways to compute differ by up to 6e-6."""

every_split = pytest.mark.parametrize(
    ("name", "head", "tail"),
    [pytest.param(name, *cut, id=f"{name}-{cut[0]}-{cut[1]}") for name in MODELS for cut in PARTITIONS],
)


@dataclass(frozen=True)
class Reference:
    """What transformers' whole model makes of four sequences of different lengths."""

    sequences: list[Tensor]
    logits: list[Tensor]
    generated: list[list[int]]
    left: tuple[Tensor, Tensor, Tensor]
    right: tuple[Tensor, Tensor, Tensor]
    """The same as one padded batch: ids, mask and logits, padding on the left or on the right."""


def padded_batch(whole: Any, sequences: list[Tensor], side: str) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.zeros(len(sequences), max(LENGTHS), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        place = slice(0, len(sequence)) if side == "right" else slice(-len(sequence), None)
        ids[row, place], mask[row, place] = sequence, 1
    order = (mask.cumsum(1) - 1).clamp(min=0)
    return ids, mask, whole(ids, attention_mask=mask, position_ids=order).logits


@pytest.fixture(scope="module")
def reference(tiny_model: Callable[[str], Any]) -> Callable[[str], Reference]:
    known: dict[str, Reference] = {}

    def get(name: str) -> Reference:
        if name not in known:
            whole = tiny_model(name).whole
            generator = torch.Generator().manual_seed(7)
            sequences = [torch.randint(1, 97, (n,), generator=generator) for n in LENGTHS]
            generated = [
                whole.generate(
                    ids[None],
                    attention_mask=torch.ones_like(ids)[None],
                    do_sample=False,
                    max_new_tokens=NEW_TOKENS,
                )[0, len(ids) :].tolist()
                for ids in sequences
            ]
            logits = [whole(ids[None]).logits[0] for ids in sequences]
            left, right = (padded_batch(whole, sequences, side) for side in ("left", "right"))
            known[name] = Reference(sequences, logits, generated, left, right)
        return known[name]

    return get


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def new_caches(parts: tuple[Span, ...], rows: int, capacity: int = 96) -> list[list[RowCache]]:
    """One list of row caches for each span, in one memory as a worker's."""
    memory = KVMemory()
    return [[RowCache(part.kv_shape(), capacity, memory) for _ in range(rows)] for part in parts]


def through(
    parts: tuple[Span, ...],
    ids: Tensor,
    lengths: list[int],
    caches: list[list[RowCache]] | None = None,
    rows: list[int] | None = None,
) -> Tensor:
    """Logits of packed token ids run through all parts."""
    values = ids
    for index, part in enumerate(parts):
        own = None if caches is None else caches[index]
        values = part.run(
            values, lengths, caches=own if own is None or rows is None else [own[r] for r in rows]
        )
    return values


@every_split
def test_packed_logits_equal_a_padded_batch_of_the_whole_model(
    tiny_model: Callable[[str], Any],
    reference: Callable[[str], Reference],
    split: Callable[..., Any],
    name: str,
    head: int,
    tail: int,
) -> None:
    expected = reference(name)
    parts = split(tiny_model(name).checkpoint, head, tail)
    for ids, mask, padded in (expected.left, expected.right):
        lengths = list(lengths_of(mask))
        assert lengths == list(LENGTHS)
        packed = through(parts, pack(ids, mask), lengths)
        close(packed, pack(padded, mask))
        close(packed, torch.cat(expected.logits))
        close(unpack(packed, mask), padded * mask[..., None])


@every_split
def test_prefill_chunks_and_single_tokens_equal_one_pass(
    tiny_model: Callable[[str], Any],
    reference: Callable[[str], Reference],
    split: Callable[..., Any],
    name: str,
    head: int,
    tail: int,
) -> None:
    """Rows at different positions and with different chunks share every pass."""
    expected = reference(name)
    parts = split(tiny_model(name).checkpoint, head, tail)
    caches = new_caches(parts, len(LENGTHS), max(LENGTHS))
    found: list[list[Tensor]] = [[] for _ in LENGTHS]
    passes: list[dict[int, int]] = [{0: 6, 3: 9}, {1: 3, 0: 1, 3: 4}, {2: 1, 0: 1, 1: 1, 3: 1}]
    passes += [{0: 4, 3: 2}, {3: 1, 1: 1, 0: 1}, {3: 3}]
    for chunks in passes:
        rows, lengths = list(chunks), list(chunks.values())
        starts = [caches[0][row].length for row in rows]
        ids = torch.cat(
            [expected.sequences[r][s : s + n] for r, s, n in zip(rows, starts, lengths, strict=True)]
        )
        logits = through(parts, ids, lengths, caches, rows)
        for row, part in zip(rows, logits.split(lengths), strict=True):
            found[row].append(part)
    assert [cache.length for cache in caches[1]] == list(LENGTHS)
    for row, whole in enumerate(expected.logits):
        close(torch.cat(found[row]), whole)


@every_split
def test_greedy_generation_equals_transformers(
    tiny_model: Callable[[str], Any],
    reference: Callable[[str], Reference],
    split: Callable[..., Any],
    name: str,
    head: int,
    tail: int,
) -> None:
    expected = reference(name)
    parts = split(tiny_model(name).checkpoint, head, tail)
    front, trunk, back = parts
    caches = new_caches(parts, len(LENGTHS))
    ids, lengths = torch.cat(expected.sequences), list(LENGTHS)
    tokens: list[list[int]] = [[] for _ in LENGTHS]
    for _ in range(NEW_TOKENS):
        last = torch.tensor(lengths).cumsum(0) - 1
        hidden = front.run(ids, lengths, caches=caches[0])
        hidden = trunk.run(hidden, lengths, caches=caches[1])
        ids = back.run(hidden, lengths, caches=caches[2], keep=last).argmax(-1)
        for row, token in zip(tokens, ids.tolist(), strict=True):
            row.append(token)
        lengths = [1] * len(LENGTHS)
    assert tokens == expected.generated
    # A model that repeats one token would agree with anything.
    assert len({token for row in tokens for token in row}) > 20


@pytest.mark.parametrize("first_block", [0, 1])
@pytest.mark.parametrize("name", MODELS)
def test_a_wide_trunk_serves_every_narrower_one(
    tiny_model: Callable[[str], Any],
    reference: Callable[[str], Reference],
    split: Callable[..., Any],
    name: str,
    first_block: int,
) -> None:
    """One hosted span, each partition a part of it: without and with KV caches, in any order."""
    expected = reference(name)
    checkpoint = tiny_model(name).checkpoint
    host = Span(checkpoint, Blocks(first_block, 4))
    served = [cut for cut in PARTITIONS if cut[0] >= first_block]
    lengths = list(LENGTHS)
    for cut in [*served, served[0]]:
        part = Partition(*cut).spans(4)[1]
        front, _, back = split(checkpoint, *cut)
        before = front.run(torch.cat(expected.sequences), lengths)
        after = host.run(before, lengths, blocks=part)
        close(back.run(after, lengths), torch.cat(expected.logits))

        # Caches of the part alone, or of all that is hosted: both must do.
        shape = host.kv_shape(part if cut[0] > first_block else None)
        caches = [RowCache(shape, max(LENGTHS)) for _ in lengths]
        first = [max(1, n // 2) for n in lengths]
        pieces = [row.split([n, len(row) - n]) for row, n in zip(before.split(lengths), first, strict=True)]
        some = host.run(torch.cat([a for a, _ in pieces]), first, caches=caches, blocks=part)
        rest = [len(b) for _, b in pieces]
        rows = [row for row, n in enumerate(rest) if n]
        more = host.run(
            torch.cat([b for _, b in pieces]),
            [rest[r] for r in rows],
            caches=[caches[r] for r in rows],
            blocks=part,
        )
        joined = [torch.cat(pair) for pair in zip(some.split(first), more.split(rest), strict=True)]
        close(torch.cat(joined), after)


def test_a_part_caches_its_own_blocks_and_no_more(tiny_model: Callable[[str], Any]) -> None:
    host = Span(tiny_model("llama").checkpoint, Blocks(1, 4))
    one_block = host.kv_shape(Blocks(2, 3)).bytes_for(10)
    assert host.kv_shape().bytes_for(10) == host.kv_shape(Blocks(1, 4)).bytes_for(10) == 3 * one_block
    assert host.kv_shape(Blocks(2, 4)).bytes_for(10) == 2 * one_block
    assert host.kv_shape(Blocks(2, 2)).bytes_for(10) == 0
    assert host.kv_shape(Blocks(2, 3)).first == 1
    assert host.kv_shape().first == 0


@pytest.mark.parametrize("name", ["gemma3_text", "llama-tied"])
def test_two_workers_can_share_a_trunk(
    tiny_model: Callable[[str], Any], reference: Callable[[str], Reference], name: str
) -> None:
    expected = reference(name)
    checkpoint = tiny_model(name).checkpoint
    front = Span(checkpoint, Blocks(0, 1), embeds=True)
    middle = [Span(checkpoint, Blocks(1, 2)), Span(checkpoint, Blocks(2, 3))]
    back = Span(checkpoint, Blocks(3, 4), predicts=True)
    logits = through((front, *middle, back), torch.cat(expected.sequences), list(LENGTHS))
    close(logits, torch.cat(expected.logits))


@pytest.mark.parametrize("name", ["llama-tied", "llama-untied", "gemma2"])
def test_one_span_can_be_the_whole_model(
    tiny_model: Callable[[str], Any], reference: Callable[[str], Reference], name: str
) -> None:
    whole = Span(tiny_model(name).checkpoint, Blocks(0, 4), embeds=True, predicts=True)
    expected = reference(name)
    close(whole.run(torch.cat(expected.sequences), list(LENGTHS)), torch.cat(expected.logits))
    assert whole.weight_bytes == sum(p.nbytes for p in tiny_model(name).whole.parameters())


def test_keep_chooses_the_packed_positions_that_get_logits(
    tiny_model: Callable[[str], Any], reference: Callable[[str], Reference], split: Callable[..., Any]
) -> None:
    front, trunk, back = split(tiny_model("qwen2").checkpoint, 1, 1)
    lengths = list(LENGTHS)
    hidden = trunk.run(front.run(torch.cat(reference("qwen2").sequences), lengths), lengths)
    keep = torch.tensor([38, 0, 12])
    some = back.run(hidden, lengths, keep=keep)
    assert some.shape == (3, 97)
    close(some, torch.cat(reference("qwen2").logits)[keep])


def test_a_rewound_row_continues_as_if_the_rest_had_never_been(
    tiny_model: Callable[[str], Any], reference: Callable[[str], Reference], split: Callable[..., Any]
) -> None:
    expected = reference("mistral")
    parts = split(tiny_model("mistral").checkpoint, 1, 1)
    caches = new_caches(parts, 1)
    right, wrong = expected.sequences[3], expected.sequences[0]
    through(parts, torch.cat([right[:9], wrong]), [22], caches)
    for (cache,) in caches:
        cache.rewind(9)
    close(through(parts, right[9:], [11], caches), expected.logits[3][9:])


def test_a_pass_that_does_not_fit_leaves_every_row_as_it_was(
    tiny_model: Callable[[str], Any], reference: Callable[[str], Reference]
) -> None:
    """The last row is full; a write there would be silently cut off, and the first row be ahead."""
    span = Span(tiny_model("llama").checkpoint, Blocks(0, 4), embeds=True)
    ids = reference("llama").sequences[3]
    caches = [RowCache(span.kv_shape(), 20), RowCache(span.kv_shape(), 4)]
    first = span.run(torch.cat([ids[:4], ids[:4]]), [4, 4], caches=caches)
    with pytest.raises(LimitError, match="5 tokens do not fit a session row of 4"):
        span.run(torch.cat([ids[4:5], ids[4:5]]), [1, 1], caches=caches)
    assert [cache.length for cache in caches] == [4, 4]
    rest = span.run(ids[4:], [16], caches=caches[:1])
    close(torch.cat([first[:4], rest]), span.run(ids, [20]))


class StopError(Exception):
    """Raised in the middle of a pass."""


def test_a_pass_that_fails_half_way_leaves_the_caches_as_they_were(
    tiny_model: Callable[[str], Any], reference: Callable[[str], Reference]
) -> None:
    span = Span(tiny_model("llama").checkpoint, Blocks(0, 4), embeds=True)
    ids = reference("llama").sequences[3]
    caches = [RowCache(span.kv_shape(), 20)]
    first = span.run(ids[:8], [8], caches=caches)

    def stop(*_: object) -> None:
        raise StopError

    third = span.model.get_submodule("layers.2")
    handle = third.register_forward_pre_hook(stop)
    with pytest.raises(StopError):
        span.run(ids[8:12].flip(0), [4], caches=caches)
    handle.remove()
    assert caches[0].length == 8
    rest = span.run(ids[8:], [12], caches=caches)
    close(torch.cat([first, rest]), span.run(ids, [20]))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_computes_in_half_precision(
    tiny_model: Callable[[str], Any],
    reference: Callable[[str], Reference],
    split: Callable[..., Any],
    name: str,
    dtype: torch.dtype,
) -> None:
    """No coarser than the whole model in that dtype; rotary tables stay fp32 as there."""
    model, exact = tiny_model(name), torch.cat(reference(name).logits)
    whole = AutoModelForCausalLM.from_pretrained(model.path, dtype=dtype, attn_implementation="eager").eval()
    theirs = torch.cat([whole(ids[None]).logits[0] for ids in reference(name).sequences])
    parts = split(model.checkpoint, 1, 1, dtype=dtype)
    ours = through(parts, torch.cat(reference(name).sequences), list(LENGTHS))
    assert ours.dtype == theirs.dtype == parts[1].kv_shape().dtype == dtype
    error, allowed = (ours.float() - exact).std(), (theirs.float() - exact).std()
    assert 0 < error < 1.25 * allowed
    tables = {key: value for key, value in whole.named_buffers() if "inv_freq" in key}
    for part in parts:
        found = {key: value for key, value in part.model.named_buffers() if "inv_freq" in key}
        assert found  # Gemma 3 has one table for each type of layer that the span holds
        for key, value in found.items():
            expected = tables[key if key in tables else f"model.{key}"]
            assert value.dtype == torch.float32
            assert torch.equal(value, expected)


@pytest.mark.parametrize("name", ["llama-tied", "llama-untied", "gemma2", "phi3"])
def test_a_span_holds_its_own_weights_and_no_more(
    tiny_model: Callable[[str], Any], split: Callable[..., Any], name: str
) -> None:
    model = tiny_model(name)
    sizes = {key: weight.nbytes for key, weight in model.whole.named_parameters()}
    embeddings, norm = sizes["model.embed_tokens.weight"], sizes["model.norm.weight"]
    head_size = sizes.get("lm_head.weight", 0)
    blocks = [
        sum(size for key, size in sizes.items() if key.startswith(f"model.layers.{i}.")) for i in range(4)
    ]
    front, trunk, back = split(model.checkpoint, 1, 1)
    assert front.weight_bytes == blocks[0] + embeddings
    assert trunk.weight_bytes == blocks[1] + blocks[2]
    assert back.weight_bytes == blocks[3] + norm + (head_size or embeddings)
    tied = back.model.get_parameter("lm_head.weight").data_ptr() == front.embeddings.data_ptr()
    assert tied is (head_size == 0)
    for part in (front, trunk, back):
        assert part.kv_shape().layers == len(part.blocks)
        assert not any(p.requires_grad for p in part.model.parameters())
        assert not any(p.is_meta for p in part.model.parameters())
        assert not any(b.is_meta for b in part.model.buffers())


def test_a_tied_tail_alone_reads_the_embeddings_itself(
    tiny_model: Callable[[str], Any], split: Callable[..., Any]
) -> None:
    checkpoint = tiny_model("llama-tied").checkpoint
    front, trunk, _ = split(checkpoint, 1, 1)
    alone = Span(checkpoint, Blocks(3, 4), predicts=True)
    ids = torch.arange(5)
    logits = alone.run(trunk.run(front.run(ids, [5]), [5]), [5])
    close(logits, tiny_model("llama-tied").whole(ids[None]).logits[0])


def test_an_untied_model_without_its_lm_head_is_incomplete(
    tmp_path: Any, tiny_config: Callable[..., Any], random_model: Callable[..., Any]
) -> None:
    random_model(tiny_config("llama-tied")).save_pretrained(tmp_path)
    tiny_config("llama-untied").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"has no tensor 'lm_head\.weight'"):
        Span(Checkpoint(str(tmp_path)), Blocks(3, 4), predicts=True)


def test_gradients_reach_a_spans_input_through_frozen_weights(
    tiny_model: Callable[[str], Any],
) -> None:
    span = Span(tiny_model("gemma3_text").checkpoint, Blocks(1, 3))
    hidden = torch.randn(7, 32, requires_grad=True)
    span.run(hidden, [4, 3])[:4].sum().backward()
    assert hidden.grad is not None
    assert bool((hidden.grad[:4].abs().sum(1) > 0).all())
    assert not hidden.grad[4:].any()


def test_blocks_that_the_model_or_the_host_lacks_are_refused(
    tiny_model: Callable[[str], Any],
) -> None:
    checkpoint = tiny_model("llama").checkpoint
    with pytest.raises(MismatchError, match="has 4 blocks, not 5"):
        Span(checkpoint, Blocks(2, 5))
    host = Span(checkpoint, Blocks(1, 3))
    for part in (Blocks(0, 2), Blocks(2, 4), Blocks(0, 4)):
        with pytest.raises(MismatchError, match=f"blocks {part} are not within the hosted 1:3"):
            host.run(torch.zeros(1, 32), [1], blocks=part)


def test_weights_that_do_not_fit_the_configuration_are_named(
    tmp_path: Any, tiny_config: Callable[..., Any], random_model: Callable[..., Any]
) -> None:
    random_model(tiny_config("llama-untied")).save_pretrained(tmp_path)
    tiny_config("llama-untied", intermediate_size=40).save_pretrained(tmp_path)
    checkpoint = Checkpoint(str(tmp_path))
    with pytest.raises(ModelError, match=r"does not fit its own configuration.*(?s:.*)gate_proj"):
        Span(checkpoint, Blocks(0, 2))


@pytest.fixture(autouse=True)
def no_grad_where_nothing_trains(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.set_grad_enabled("gradients" in request.node.name):
        yield
