"""What mutations start from: valid messages of every kind, and tensors and masks of every encoding."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, get_args

import msgspec
import numpy as np
import torch
from fuzzing.examples import example
from fuzzing.hostile import bomb
from fuzzing.message import MAX_SIZE, Message

from codec.frames import ITEM_SIZES, encode_blocks, encode_planes
from codec.limits import MAX_MASK, MAX_TENSORS
from codec.masks import Mask, encode_mask
from codec.messages import AnyHeader, Encoding, Header, TensorSpec, Wire, encode_header
from codec.quantise import quantise_blocks
from codec.tensors import TORCH_DTYPES, encode_tensor

HEADERS: tuple[type[Header], ...] = get_args(AnyHeader)
MASKED = [header for header in HEADERS if "mask" in header.__struct_fields__]
SHAPES = [(), (0, 3), (1,), (1, 7), (3, 5, 2), (33, 65), (64, 64)]
"""Empty, without dimensions, one element, one row, odd; the last is large enough for planes to shrink."""

Pair = tuple[TensorSpec, bytes]


@dataclass(frozen=True, slots=True)
class Corpus:
    """`groups` of messages, one for each encoding and a few more; `heavy` are right and dear."""

    groups: tuple[tuple[Message, ...], ...]
    heavy: tuple[Message, ...]


def corpus() -> Corpus:
    """A few hundred messages, the same in every process."""
    # How many threads add up a tensor's norm decides its last bits, and those the step of its codes.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        dear = tuple(dataclasses.replace(message, dear=True) for message in _heavy(Random(0)))
        return Corpus(tuple(map(tuple, _groups(Random(0)))), dear)
    finally:
        torch.set_num_threads(threads)


def _groups(rng: Random) -> list[list[Message]]:
    tensors, headers = list(_tensors()), len(HEADERS)
    small = [pair for pair in tensors if len(pair[1]) < 4000]
    alone = [_message(header, rng, []) for header in HEADERS for _ in range(3)]
    several = [_message(header, rng, rng.sample(small, 3)) for header in HEADERS]
    several += [_message(header, rng, rng.sample(tensors, 2)) for header in HEADERS]
    masks = [_message(rng.choice(MASKED), rng, [rng.choice(small)], mask) for mask in _masks()]
    groups: dict[str, list[Message]] = {}
    for at, pair in enumerate(tensors):
        groups.setdefault(pair[0].encoding, []).append(_message(HEADERS[at % headers], rng, [pair]))
    return [alone, several, *groups.values(), masks]


def _heavy(rng: Random) -> Iterator[Message]:
    """The most tensors of a message, the most that `MAX_SIZE` bytes may become, the largest masks."""
    header = HEADERS[0]
    yield _message(header, rng, [_pair(*encode_tensor(torch.zeros(0), "raw", "corpus"))] * MAX_TENSORS)
    for dtype in TORCH_DTYPES:
        for encoding in get_args(Encoding):
            # Elements of a byte, and an odd number of them; blocks keep two bytes for every 64.
            grows = {"raw": 1 / ITEM_SIZES[dtype], "planes": 250 / ITEM_SIZES[dtype], "blocks": 28}
            elements = int((MAX_SIZE - 4000) * grows.get(encoding, 250)) | 1
            spec, frame = bomb(dtype, encoding, elements)
            yield _message(header, rng, [(msgspec.convert(spec, TensorSpec), frame)])
    side = int(MAX_MASK**0.5)
    stripes = np.zeros((side, side), dtype=np.bool_)
    stripes[:, ::64] = True
    for mask in (np.ones_like(stripes), stripes):
        yield _message(MASKED[0], rng, [], mask)


def _message(header: type[Header], rng: Random, pairs: list[Pair], mask: Mask | None = None) -> Message:
    given: dict[str, Any] = {"tensors": tuple(spec for spec, _ in pairs)}
    frames = [frame for _, frame in pairs]
    if header in MASKED:
        given["mask"] = None
    if mask is not None:
        given["mask"], frame = encode_mask(mask)
        frames.append(frame)
    peer = rng.choice([b"", b"silo", rng.randbytes(16)])
    made = encode_header(example(header, rng, **given))
    return Message(str(header.__struct_config__.tag), (peer, made, *frames))


def _tensors() -> Iterator[Pair]:
    generator = torch.Generator().manual_seed(0)
    for dtype in TORCH_DTYPES.values():
        for shape in SHAPES:
            tensor = (torch.randn(shape, generator=generator) * 3).to(dtype)
            for wire in get_args(Wire):
                yield _pair(*encode_tensor(tensor, wire, "corpus"))
        flat = torch.randn(4096 + 7, generator=generator).to(dtype)
        spiked = flat.clone()
        spiked[::997] = 200  # So few that bytes are still the way for steps of 1.
        for tensor in (flat, spiked, spiked[:50], torch.zeros_like(flat)):
            for step in (0.02, 1.0):  # Codes in nibbles, and in bytes.
                yield _pair(*encode_tensor(tensor, "steps", "corpus", step=step))
        yield _pair(*encode_tensor(torch.zeros(64, 65, dtype=dtype), "exact", "corpus"))
        yield _pair(*encode_tensor(flat.abs().clamp(1, 1.2), "exact", "corpus"))
        for tensor in (flat, flat[:100]):  # The encoder always splits blocks; a peer need not.
            steps, body = quantise_blocks(tensor.float(), 6, stochastic=False)
            name = next(name for name, known in TORCH_DTYPES.items() if known == dtype)
            planes, widths = body[None].numpy(), steps.view(torch.uint8).numpy()
            yield _pair(*encode_blocks(planes, widths, name, tuple(tensor.shape)))
    yield _pair(*encode_planes(np.zeros(1 << 16, dtype=np.uint8), "f32", (1 << 14,)))


def _pair(spec: TensorSpec, frame: Any) -> Pair:
    return spec, bytes(frame)


def _masks() -> Iterator[Mask]:
    numbers = np.random.default_rng(0)
    for width in (1, 5, 64, 200):
        queries, keys = np.arange(width)[:, None], np.arange(width)[None, :]
        yield keys <= queries
        yield (keys <= queries) & (keys > queries - 7)
        yield queries // 9 == keys // 9
        yield np.zeros((width, width), dtype=np.bool_)
        yield np.ones((width, 3), dtype=np.bool_)
        for share in (0.02, 0.5):
            yield numbers.random((width, width)) < share
    yield np.zeros((0, 7), dtype=np.bool_)
    yield np.zeros((3, 0), dtype=np.bool_)
    yield numbers.random((300, 700)) < 0.06  # Bits that zstd shrinks.
