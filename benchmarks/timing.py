"""How long encoding and decoding take, on one core, beside plain copies of the same bytes.

Every round takes another copy of the tensor, so that nothing is found in a cache that would not be
there in use; all that is compared is timed side by side in the same rounds, and medians are told.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import lz4.block
import msgspec
import torch
from torch import Tensor

from broker.parcel import Parcel
from codec.messages import Extend, Wire
from codec.tensors import decode_tensors, encode_tensor, encode_tensors

_ELEMENTS = 1 << 20
_COPIES = 24
_ROUNDS = 48
_SMALL_ROUNDS = 1000


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds for 4 MiB of fp32; `copies` is encoding and decoding in units of a plain copy."""

    encode_ms: float
    decode_ms: float
    memcpy_ms: float
    copies: float


@contextmanager
def one_core() -> Iterator[None]:
    """torch computes on one thread meanwhile."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def codec_times(tensor: Tensor, wire: Wire, *, step: float, stochastic: bool) -> Times:
    """Times for `tensor` `[T, hidden]`, repeated or cut to 4 MiB."""
    rows = -(-_ELEMENTS // tensor.shape[1])
    full = tensor.repeat(-(-rows // len(tensor)), 1)[:rows]
    copies = [full.clone() for _ in range(_COPIES)]
    spare = [torch.empty_like(full) for _ in range(_COPIES)]
    spec, frame = encode_tensor(full, wire, "timed", step=step, stochastic=stochastic)
    frames = [bytearray(frame) for _ in range(_COPIES)]
    with one_core():
        found = _medians(
            {
                "memcpy": lambda i: spare[i].copy_(copies[i]),
                "encode": lambda i: encode_tensor(copies[i], wire, "timed", step=step, stochastic=stochastic),
                "decode": lambda i: decode_tensors([spec], [memoryview(frames[i])], boundary="timed"),
            }
        )
    scale = _ELEMENTS / full.numel()
    encode, decode, memcpy = (found[name] * 1e3 * scale for name in ("encode", "decode", "memcpy"))
    return Times(encode, decode, memcpy, (encode + decode) / memcpy)


def plain_lz4_ms(tensor: Tensor) -> tuple[float, float]:
    """What lz4 of the plain fp32 bytes takes, and back, in milliseconds for 4 MiB."""
    data = tensor.reshape(-1)[:_ELEMENTS].contiguous().numpy()
    packed = lz4.block.compress(data, store_size=False)
    found = _medians(
        {
            "encode": lambda _: lz4.block.compress(data, store_size=False),
            "decode": lambda _: lz4.block.decompress(packed, uncompressed_size=data.nbytes),
        }
    )
    scale = _ELEMENTS / data.size
    return found["encode"] * 1e3 * scale, found["decode"] * 1e3 * scale


def one_token_us(hidden: int, wire: Wire, step: float) -> dict[str, float]:
    """Microseconds a side for one token's message, header and frame: median and 99th percentile."""
    tensor = torch.randn(1, hidden)
    header = Extend(session="0123456789abcdef", rows=(0,), starts=(300,), lengths=(1,))

    def send() -> Parcel:
        specs, frames = encode_tensors([tensor], wire, "timed", step=step)
        return Parcel.of(msgspec.structs.replace(header, id=7, tensors=specs), frames)

    sent = [bytes(frame) for frame in send().frames()]

    def receive() -> list[Tensor]:
        parcel = Parcel.read(sent)
        return decode_tensors(parcel.header.tensors, parcel.buffers(), boundary="timed")

    found: dict[str, float] = {"bytes": sum(map(len, sent))}
    with one_core():
        for name, work in (("send", send), ("receive", receive)):
            times = sorted(_seconds(work) for _ in range(_SMALL_ROUNDS))
            found[f"{name}_us"] = times[_SMALL_ROUNDS // 2] * 1e6
            found[f"{name}_p99_us"] = times[_SMALL_ROUNDS * 99 // 100] * 1e6
    return found


def _medians(works: Mapping[str, Callable[[int], Any]]) -> dict[str, float]:
    """Median seconds of each, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for i in islice(cycle(range(_COPIES)), _ROUNDS):
        for name, work in works.items():
            times[name].append(_seconds(work, i))
    return {name: statistics.median(values) for name, values in times.items()}


def _seconds(work: Callable[..., Any], *arguments: int) -> float:
    begun = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - begun
