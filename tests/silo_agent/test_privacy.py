"""What an observer of the wire sees: no text, no token ids, and one token's bytes per token."""

import itertools
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from broker.parcel import Parcel
from codec.messages import Backward, Commit, Extend, Forward, OpenRun, OpenSession, Result, Wire
from codec.plan import LoraPlan, RunPlan
from codec.tensors import decode_tensors, encode_tensors
from silo_agent.data import chat_examples, prompt_ids, read_chats
from silo_agent.generation import generate
from silo_agent.microbatch import batches
from silo_agent.noise import Noise, NoiseScale
from silo_agent.wires import Wires

RUN = 8
"""So many bytes, or consecutive token ids, cannot be there by chance."""
HIDDEN = 64


@dataclass(frozen=True)
class Secrets:
    """What must not cross: texts, and sequences of token ids."""

    texts: Sequence[str]
    ids: Sequence[Sequence[int]]

    def needles(self) -> Iterator[bytes]:
        """The secrets in every encoding that a careless program might send them in."""
        for text in self.texts:
            words = text.split()
            # Two at a time: a "heart" alone is in every header's "heartbeat".
            pairs = (" ".join(pair).encode() for pair in itertools.pairwise(words))
            yield from (pair for pair in pairs if len(pair) >= RUN)
        for sequence in self.ids:
            for at in range(0, len(sequence) - RUN + 1, RUN):
                few = sequence[at : at + RUN]
                if len(set(few)) > RUN // 2:
                    for kind in "hiqfd":
                        yield struct.pack(f"<{RUN}{kind}", *few)
                    yield b"".join(msgspec.msgpack.encode(i) for i in few)
                    yield torch.tensor(few).bfloat16().view(torch.uint8).numpy().tobytes()


def tensors(parcel: Parcel) -> list[Tensor]:
    return decode_tensors(parcel.header.tensors, parcel.buffers(), boundary="test")


def leaks(parcels: Sequence[Parcel], secrets: Secrets) -> list[str]:
    """Kinds of the messages in which a secret was found: in headers, frames and decoded tensors."""
    found = []
    needles = set(secrets.needles())
    for parcel in parcels:
        hay = [parcel.raw, *map(bytes, parcel.buffers())]
        hay += [t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors(parcel) if t.numel()]
        if any(needle in straw for straw in hay for needle in needles):
            found.append(type(parcel.header).__name__)
    return found


@pytest.fixture(params=[0.0, 0.1], ids=["without noise", "with noise"])
def observed(pool: Any, tiny: Any, clinics: list[Path], request: Any) -> tuple[list[Parcel], Secrets]:
    """Everything that passed while a silo trained two steps and generated, and what it kept to itself."""
    noise = Noise(NoiseScale(relative=request.param))
    examples = chat_examples(clinics[0], tiny.tokenizer, max_tokens=200)[:6]
    trainer = pool.trainer(RunPlan(steps=2, lora=LoraPlan(rank=2)), noise=noise)
    source = batches(examples, 2, seed=0)
    for _ in range(2):
        trainer.step([next(source), next(source)])
    chats = [messages for _, messages in read_chats(clinics[1])][:2]
    prompts = [prompt_ids(tiny.tokenizer, chat[:1], answer_next=True) for chat in chats]
    with pool.session(rows=2, noise=noise, capacity=250) as session:
        answers = generate(session, tiny.tokenizer, prompts, max_tokens=12, ends=frozenset())
    texts = [m["content"] for _, chat in read_chats(clinics[0]) for m in chat]
    texts += [m["content"] for chat in chats for m in chat] + [answer.text for answer in answers]
    ids = [e.ids for e in examples] + prompts + [answer.tokens for answer in answers]
    return pool.broker.passed, Secrets(texts, ids)


def test_neither_text_nor_token_ids_cross(observed: tuple[list[Parcel], Secrets]) -> None:
    parcels, secrets = observed
    kinds = {type(parcel.header) for parcel in parcels}
    assert {OpenRun, Forward, Backward, Commit, OpenSession, Extend, Result} <= kinds
    assert len(set(secrets.needles())) > 500
    assert leaks(parcels, secrets) == []


def test_only_floating_point_of_the_boundarys_shape_crosses(observed: tuple[list[Parcel], Secrets]) -> None:
    parcels, _ = observed
    for parcel in parcels:
        for tensor in tensors(parcel):
            assert tensor.is_floating_point()
        if isinstance(parcel.header, Forward | Backward | Extend):
            (tensor,) = tensors(parcel)
            assert tensor.shape[1] == HIDDEN
            # One-hot rows would be ids in disguise. Behind the last answer no gradient flows.
            rows = tensor[tensor.any(1)]
            assert len(rows) > 0
            assert int((rows != 0).sum()) > rows.numel() * 0.99


@pytest.mark.parametrize("how", ["text", "name", "int32", "int64", "lengths", "float", "compressed"])
def test_the_search_finds_a_planted_leak(how: str) -> None:
    """The control: were one of these sent, the tests above would fail."""
    ids, text = list(range(300, 340)), "Crushing chest pain since dawn"
    secrets = Secrets([text], [ids])
    few = torch.tensor(ids, dtype=torch.int64)
    specs: Any = ()
    frames: Any = []
    header: Any = Extend(session="s", rows=(0,), starts=(0,), lengths=(1,))
    match how:
        case "text":
            specs, frames = encode_tensors([torch.zeros(16)], "exact", "test")
            frames = [text.ljust(64).encode()]
        case "name":
            header = msgspec.structs.replace(header, session=text)
        case "int32" | "int64":
            raw = few.to(getattr(torch, how)).view(torch.float32)
            specs, frames = encode_tensors([raw], "exact", "test")
        case "lengths":
            header = msgspec.structs.replace(header, lengths=tuple(ids))
        case "float":
            specs, frames = encode_tensors([few.float()], "exact", "test")
        case "compressed":
            specs, frames = encode_tensors([few.float().repeat(200)], "exact", "test")
            assert specs[0].encoding == "planes"
    parcel = Parcel.of(msgspec.structs.replace(header, tensors=specs), frames)
    assert leaks([parcel], secrets) == ["Extend"]


def test_a_tokens_bytes_do_not_grow_with_the_context(
    pool: Any, tiny: Any, random_batches: Callable[..., Any]
) -> None:
    with pool.session(capacity=200, noise=Noise(NoiseScale(relative=0.1))) as session:
        session.extend([0], [random_batches(1)[0].ids.tolist()])
        for token in range(150):
            session.extend([0], [[token + 3]])
    for kind in (Extend, Result):
        steps = pool.sent(kind)[1:]
        assert len(steps) == 150
        assert {parcel.size for parcel in steps} == {HIDDEN * 4}
        # A counter that passes 127 and 255 takes another byte or two in msgpack.
        headers = [len(parcel.raw) for parcel in steps]
        assert max(headers) - min(headers) <= 4
    assert not any(tensors(p) for p in pool.broker.passed if not isinstance(p.header, Extend | Result))


def test_the_wire_says_what_a_token_takes_both_ways(pool: Any) -> None:
    sizes: dict[Wire, set[int]] = {}
    wires: tuple[Wire, ...] = ("raw", "exact", "bf16", "fp16", "steps", "q8")
    for wire in wires:
        pool.broker.passed.clear()
        with pool.session(wires=Wires(wire)) as session:
            session.extend([0], [[5, 6, 7]])
        sizes[wire] = {parcel.size for parcel in [*pool.sent(Extend), *pool.sent(Result)]}
    values = 3 * HIDDEN
    assert sizes["raw"] == sizes["exact"] == {values * 4}
    assert sizes["bf16"] == sizes["fp16"] == {values * 2}
    assert all(size < values * 1.3 for size in sizes["steps"])
    assert sizes["q8"] == {values + 2 * values // 64}
