"""Nibbles: bytes split into two planes of half bytes, and joined again, on the bytes' own device.

The low nibbles of zigzagged codes are as good as random and are stored as they are; the high ones
are mostly small, and only they are worth an entropy coder. Byte `i` shares its planes' byte with byte
`i + ceil(n / 2)`, so that every operation runs over contiguous memory.
"""

import torch
from torch import Tensor

from codec.scratch import scratch


def split(body: Tensor) -> Tensor:
    """uint8 `[n]` to uint8 `[2, ceil(n / 2)]`, low and high nibbles; an odd byte's partner is 0.

    What is returned is scratch memory (`codec.scratch`).
    """
    if len(body) % 2:
        body = torch.nn.functional.pad(body, (0, 1))
    first, second = body.view(2, -1)
    planes = scratch("planes", len(body), torch.uint8, body.device).view(2, -1)
    part = scratch("part", len(first), torch.uint8, body.device)
    low, high = planes
    torch.bitwise_left_shift(second, 4, out=low).bitwise_or_(torch.bitwise_and(first, 15, out=part))
    torch.bitwise_right_shift(first, 4, out=high).bitwise_or_(torch.bitwise_and(second, 0xF0, out=part))
    return planes


def join(low: Tensor, high: Tensor, elements: int) -> Tensor:
    """The bytes, uint8 `[elements]`, from planes uint8 `[ceil(elements / 2)]` each, in scratch memory."""
    body = scratch("planes", 2 * len(low), torch.uint8, low.device)
    part = scratch("part", len(low), torch.uint8, low.device)
    first, second = body.view(2, -1)
    torch.bitwise_left_shift(high, 4, out=first).bitwise_or_(torch.bitwise_and(low, 15, out=part))
    torch.bitwise_right_shift(low, 4, out=second).bitwise_or_(torch.bitwise_and(high, 0xF0, out=part))
    return body[:elements]
