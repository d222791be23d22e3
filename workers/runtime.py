"""How torch is set up in a process: quiet, and without idle threads that spin.

With several processes on the same cores an OpenMP thread that spins while it waits takes the core
from the one that has work: a matmul went from 0.7 to 15 ms. Import this before torch.
"""

import os
from typing import TYPE_CHECKING

from codec.errors import UsageError

if TYPE_CHECKING:
    import torch

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("KMP_BLOCKTIME", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# oneDNN compiles a kernel of half a megabyte for every shape, torch keeps another handle on it, and
# the number of packed tokens is new in nearly every pass: with their defaults a worker grew to a gigabyte.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")

DTYPES = ("auto", "fp32", "bf16", "fp16")


def choose_device(name: str) -> "torch.device":
    """`auto` is the first GPU, or the CPU. Raises `UsageError` for a device that is not there."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def choose_dtype(name: str, device: "torch.device") -> "torch.dtype":
    """`auto` is bf16 on a GPU and fp32 on the CPU, where bf16 is the slower one in batches."""
    import torch

    table = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return table[name] if name in table else table["fp32" if device.type == "cpu" else "bf16"]


def quiet_libraries() -> None:
    """Keep transformers' own progress bars and notes off the terminal: ours say what matters."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
