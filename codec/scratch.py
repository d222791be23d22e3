"""Scratch memory that every encoding on a thread uses again.

Fresh memory of a few megabytes comes from the operating system page by page, and taking it for each
pass over a tensor costs more than the pass.
"""

import threading

import torch
from torch import Tensor

_KEEP_BYTES = 64 << 20
"""All of a thread's together. What goes beyond is rare enough to be given back."""


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.by_use: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}


_buffers = _Buffers()


def scratch(use: str, elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory `[elements]` with anything in it, until this thread asks again for the same use."""
    key = use, dtype, device
    held = _buffers.by_use.get(key)
    if held is None or len(held) < elements:
        held = torch.empty(elements, dtype=dtype, device=device)
        others = sum(kept.nbytes for use_key, kept in _buffers.by_use.items() if use_key != key)
        if others + held.nbytes <= _KEEP_BYTES:
            _buffers.by_use[key] = held
    return held[:elements]
