"""Ways to damage a message. Each takes a generator, a message and another one, and returns a new message,
or None where it has nothing to work on."""

from collections.abc import Callable
from random import Random

from fuzzing.fields import MUTATORS as FIELDS
from fuzzing.message import MAX_SIZE, Message

Mutator = Callable[[Random, Message, Message], Message | None]

_BYTES = [0x00, 0x01, 0x7F, 0x80, 0x90, 0x91, 0xC0, 0xCB, 0xCF, 0xDD, 0xDF, 0xFE, 0xFF]
"""Edges of integers, and the bytes that open msgpack's numbers, arrays and maps."""
_WORDS = [0, 1, 127, 128, 255, 256, 4096, 1 << 15, 1 << 16, 1 << 20, 1 << 28, 1 << 31, 1 << 32, 1 << 63]


def damage(rng: Random, message: Message, other: Message) -> Message:
    """`message` after one or a few mutations."""
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        (mutator,) = rng.choices(_MUTATORS, cum_weights=_WEIGHTS)
        message = mutator(rng, message, other) or message
        if message.size > MAX_SIZE:
            break
    return message


def flip(rng: Random, message: Message, other: Message) -> Message | None:
    """Turn a few bits."""
    at = _any_frame(rng, message)
    data = bytearray(message.frames[at])
    if not data:
        return None
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return message.put(at, bytes(data))


def poke(rng: Random, message: Message, other: Message) -> Message | None:
    """Set a byte, or a number of up to eight."""
    at = _any_frame(rng, message)
    data = bytearray(message.frames[at])
    if not data:
        return None
    where, width = rng.randrange(len(data)), rng.choice((1, 1, 2, 4, 8))
    if width == 1:
        data[where] = rng.choice(_BYTES)
    else:
        word = (rng.choice(_WORDS) - rng.randrange(2)) % (1 << 8 * width)
        data[where : where + width] = word.to_bytes(width, rng.choice(("little", "big")))
    return message.put(at, bytes(data))


def cut(rng: Random, message: Message, other: Message) -> Message | None:
    """Drop the end of a frame, or a piece from within."""
    at = _any_frame(rng, message)
    data = message.frames[at]
    start = rng.randrange(len(data) + 1)
    end = len(data) if rng.random() < 0.5 else min(len(data), start + rng.randrange(1, 20))
    return message.put(at, data[:start] + data[end:])


def grow(rng: Random, message: Message, other: Message) -> Message | None:
    """Put bytes into a frame, or at its end: noise, and runs."""
    at = _any_frame(rng, message)
    data = message.frames[at]
    where = len(data) if rng.random() < 0.5 else rng.randrange(len(data) + 1)
    size = rng.choice((1, 2, 8, 64, 2000))
    more = rng.randbytes(size) if rng.random() < 0.5 else bytes([rng.choice(_BYTES)]) * size
    return message.put(at, data[:where] + more + data[where:])


def nest(rng: Random, message: Message, other: Message) -> Message | None:
    """Give the header a first field that no kind has, of arrays within arrays within arrays."""
    data = message.frames[message.head]
    if len(data) < 2 or not 0x80 <= data[1] < 0x8F:
        return None
    depth = rng.choice((10, 500, 2000, 30_000))
    inner = rng.choice((b"\x91", b"\x81\xa1x")) * depth + b"\xc0"
    return message.put(message.head, data[:1] + bytes([data[1] + 1]) + b"\xa1x" + inner + data[2:])


def graft(rng: Random, message: Message, other: Message) -> Message | None:
    """Lay a piece of another message's frame over a frame."""
    at = _any_frame(rng, message)
    data, donor = message.frames[at], rng.choice(other.frames)
    size = 1 + rng.randrange(64)
    source, where = rng.randrange(len(donor) + 1), rng.randrange(len(data) + 1)
    return message.put(at, data[:where] + donor[source : source + size] + data[where + size :])


def shuffle(rng: Random, message: Message, other: Message) -> Message | None:
    """Send a frame twice, not at all, or in another's place."""
    frames = list(message.frames)
    if not frames:
        return None
    at, to = rng.randrange(len(frames)), rng.randrange(len(frames))
    match rng.randrange(3):
        case 0:
            frames.insert(to, frames[at])
        case 1:
            del frames[at]
        case _:
            frames[at], frames[to] = frames[to], frames[at]
    return Message(message.kind, tuple(frames)) if frames else None


def splice(rng: Random, message: Message, other: Message) -> Message | None:
    """The first frames of one and the last of another."""
    keep, skip = rng.randrange(len(message.frames) + 1), rng.randrange(len(other.frames) + 1)
    frames = message.frames[:keep] + other.frames[skip:]
    return Message(message.kind, frames) if frames else None


def _any_frame(rng: Random, message: Message) -> int:
    """What a frame says of others is little beside them, and most of what there is to get wrong."""
    return message.head if rng.random() < 0.25 else rng.randrange(len(message.frames))


_CHOICES: list[tuple[Mutator, int]] = [
    (flip, 2),
    (poke, 2),
    (cut, 1),
    (grow, 1),
    (nest, 1),
    (graft, 1),
    (shuffle, 1),
    (splice, 1),
    *FIELDS,
]
_MUTATORS = [mutator for mutator, _ in _CHOICES]
_WEIGHTS = [sum(weight for _, weight in _CHOICES[: at + 1]) for at in range(len(_CHOICES))]
