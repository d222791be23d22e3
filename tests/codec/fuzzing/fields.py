"""Mutations that know what a header is: one field changed and the rest right, so that it gets far."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, get_args

import msgspec
from fuzzing.hostile import LARGEST, bomb, brim, mask, plane
from fuzzing.message import MAX_SIZE, Message

from codec.messages import PROTOCOL, DType, Encoding

Tree = Any
"""What msgpack says, as dicts, lists and numbers."""

INTS = [
    *(0, 1, 2, 3, 4, 27, 28, 63, 64, 65, 127, 128, 255, 256, 4095, 4096, 4097, 8192, 8193),
    *(1 << bits for bits in (16, 20, 26, 27, 28, 29, 31, 32, 40, 53, 62, 63)),
    *((1 << bits) + 1 for bits in (20, 26, 28, 62)),
    *((1 << bits) - 1 for bits in (31, 32, 63, 64)),
    *(-1, -2, -128, -(1 << 31), -(1 << 63)),
]
FLOATS = [
    *(math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 0.5),
    *(1e300, 1e-300, 5e-324, 1e-38, 1e-30, 1e19, 1e36, 2.0**-149, 2.0**-150),
    *LARGEST.values(),
]
EMPTY: list[Any] = [None, "", b"", [], {}, [[]], {"": 0}]
ODD: list[Any] = [*EMPTY, True, False, "x", "x" * 200, "raw", b"\xff" * 16, [0] * 5, *INTS, *FLOATS]
DTYPES: list[Any] = [*get_args(DType), "f64", "i64", 0]
ENCODINGS: list[Any] = [*get_args(Encoding), "lz4", 0]
_MOST_ELEMENTS = 1 << 17

_encoder = msgspec.msgpack.Encoder()


def field(rng: Random, message: Message, other: Message) -> Message | None:
    """Change, drop, repeat or rename any one thing that the header says."""
    tree = _open(message)
    if not isinstance(tree, dict | list) or not tree:
        return None
    node: Tree = tree
    while True:
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        below = node[key]
        if not isinstance(below, dict | list) or not below or rng.random() < 0.25:
            break
        node = below
    match rng.randrange(8):
        case 0 if isinstance(node, dict):
            node[rng.choice(["id", "wire", "tensors", "names", "what", 0, ""])] = node.pop(key)
        case 0 | 1:
            del node[key]
        case 2 if isinstance(node, list):
            node.insert(key, below)
        case 3 if isinstance(node, list):
            node *= rng.choice((2, 3, MAX_SIZE // len(message.frames[message.head])))
        case _:
            node[key] = _near(rng, below)
    return _close(message, tree)


def spec(rng: Random, message: Message, other: Message) -> Message | None:
    """Let the entry of one tensor or mask lie, each field in the ways that are its own."""
    place = _place(rng, message)
    if place is None:
        return None
    entry = place.entry
    which = rng.randrange(len(entry))
    elements = place.elements
    match which:
        case _ if place.masks:
            entry[which] = _near(rng, entry[which])
        case 0:
            entry[0] = rng.choice(DTYPES)
        case 1:
            entry[1] = _shape(rng, entry[1], elements)
        case 2:
            entry[2] = rng.choice(ENCODINGS)
            if rng.random() < 0.5 and len(entry) > 4:  # Otherwise the step gives it away.
                entry[4] = 0.5 if entry[2] == "steps" else 0.0
        case 3:
            entry[3] = _sizes(rng, entry[3])
        case 4:
            # Just below and above what makes the largest code of a byte too large.
            edge = rng.choice(list(LARGEST.values())) / rng.choice((126.9999, 127, 128, 128.0001))
            entry[4] = rng.choice((rng.choice(FLOATS), edge, rng.random() * 10.0 ** rng.randint(-40, 38)))
        case _:
            entry[which] = rng.choice((elements, elements + 1, rng.choice(INTS), rng.randrange(elements + 2)))
    return _close(message, place.tree)


def part(rng: Random, message: Message, other: Message) -> Message | None:
    """Replace one part of a frame, or damage what stands in it; its stored size is then right."""
    place = _place(rng, message)
    if place is None:
        return None
    data, entry, elements = message.frames[place.frame], place.entry, place.elements
    if place.masks:
        bits = entry[2] * entry[3] or elements
        return message.put(place.frame, _other(rng, data, [-(-bits // 8)]))
    sizes = entry[3]
    if sum(sizes) != len(data):
        return None
    which = rng.randrange(len(sizes))
    start, end = sum(sizes[:which]), sum(sizes[: which + 1])
    outliers = entry[5] * 4 if len(entry) > 5 else 0
    lengths = [elements, -(-elements // 2), -(-elements // 64) * 2, outliers]
    piece = _other(rng, data[start:end], lengths)
    sizes[which] = len(piece)
    return _close(message.put(place.frame, data[:start] + piece + data[end:]), place.tree)


def replace(rng: Random, message: Message, other: Message) -> Message | None:
    """Another tensor or mask: of far more than its frame has, or of the largest numbers, and right to be."""
    place = _place(rng, message)
    if place is None:
        return None
    if place.masks:
        place.entry[:], data = mask(rng)
    elif rng.random() < 0.5:
        place.entry[:], data = brim(rng)
    else:
        dtype, encoding = rng.choice(get_args(DType)), rng.choice(get_args(Encoding))
        most = 2000 if encoding == "raw" else _MOST_ELEMENTS
        place.entry[:], data = bomb(dtype, encoding, 1 + rng.randrange(most))
    return _close(message.put(place.frame, data), place.tree)


MUTATORS: list[tuple[Callable[[Random, Message, Message], Message | None], int]] = [
    (field, 3),
    (spec, 6),
    (part, 8),
    (replace, 2),
]


def _near(rng: Random, value: Tree) -> Tree:
    if isinstance(value, int) and rng.random() < 0.5:
        found = rng.choice((value + 1, value - 1, value * 2, value // 2, -value))
        return found if -(1 << 63) <= found < 1 << 64 else 0
    if isinstance(value, float) and rng.random() < 0.5:
        return rng.choice(FLOATS)
    return rng.choice(ODD)


def _shape(rng: Random, shape: list[int], elements: int) -> list[int]:
    match rng.randrange(5):
        case 0:
            return [rng.choice(INTS) for _ in range(rng.randrange(6))]
        case 1:
            return [*shape, rng.choice((0, 1, 1, 2, 1 << 63))]
        case 2:
            return [elements]
        case 3:
            return [max(0, elements + rng.choice((-64, -1, 1, 64)))]
    changed = list(shape) or [1]
    changed[rng.randrange(len(changed))] = rng.choice(INTS)
    return changed


def _sizes(rng: Random, sizes: list[int]) -> list[int]:
    changed, at = list(sizes), rng.randrange(len(sizes))
    match rng.randrange(4):
        case 0:
            changed[at] = rng.choice(INTS)
        case 1:  # The sum stays right.
            moved = rng.randrange(changed[at] + 1)
            changed[at] -= moved
            changed[rng.randrange(len(sizes))] += moved
        case 2:
            changed.append(rng.choice((0, 0, changed[at])))
        case _:
            del changed[at]
    return changed


def _other(rng: Random, piece: bytes, lengths: list[int]) -> bytes:
    if len(piece) > 1 and rng.random() < 0.5:
        # Within the coder's own bytes, most of which follow its header.
        damaged = bytearray(piece)
        for _ in range(rng.choice((1, 1, 2, 8))):
            damaged[rng.randrange(min(len(piece), rng.choice((2, 16, 1 << 16))))] = rng.randrange(256)
        return bytes(damaged)
    return plane(rng, rng.choice(lengths))


@dataclass(frozen=True, slots=True)
class _Place:
    """An entry that is still well formed, in a header's `tree`, and the `frame` that it describes."""

    tree: Tree
    entry: list[Any]
    frame: int
    masks: bool

    @property
    def elements(self) -> int:
        extents: list[int] = self.entry[:2] if self.masks else self.entry[1]
        return min(math.prod(extents), 1 << 20)


def _place(rng: Random, message: Message) -> _Place | None:
    """One of a header's entries; None if there is none that is well formed and has a frame."""
    tree = _open(message)
    if not isinstance(tree, dict):
        return None
    masked: Tree = tree.get("mask")
    entries: Tree = tree.get("tensors")
    if _are_ints(masked) and len(masked) == 4 and (not entries or rng.random() < 0.6):
        return _Place(tree, masked, len(message.frames) - 1, True) if len(message.frames) > 2 else None
    if not isinstance(entries, list) or not entries:
        return None
    at = rng.randrange(len(entries))
    entry = entries[at]
    if at + 2 >= len(message.frames) or not isinstance(entry, list) or len(entry) < 4:
        return None
    right = _are_ints(entry[1]) and _are_ints(entry[3]) and entry[3] and _are_ints(entry[5:])
    return _Place(tree, entry, at + 2, False) if right else None


def _are_ints(values: Tree) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 64 for value in values)


def _open(message: Message) -> Tree:
    try:
        return msgspec.msgpack.decode(message.frames[message.head][1:])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _close(message: Message, tree: Tree) -> Message | None:
    try:
        return message.put(message.head, bytes([PROTOCOL]) + _encoder.encode(tree))
    except (OverflowError, RecursionError):
        return None
