"""Is `auto` ever slower than sending the plain bytes? Over links of several rates, side by side.

A real broker, a relay before it that makes the silo's link as slow as it should be, and a worker that
computes nothing: what is timed is encoding, the way there, decoding, and the same back. `raw` and
`auto` take turns on links of their own, so that both meet the same machine.
"""

import math
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from benchmarks.echo import echo_card, serve_echo
from benchmarks.progress import Progress
from broker.link import ZmqLink
from codec.messages import Backward, Extend, Forward, OpenRun, OpenSession
from codec.plan import RunPlan
from silo_agent.packed import pack
from silo_agent.processes import Processes
from silo_agent.remote import Remote, expect, silo_attach
from silo_agent.wires import Boundary, Choice, Wires

_TOKENS_IN_ONE_STEP = 1
_WARMUP_S = 1.5
"""Until a heartbeat has measured the round trip."""

_DEADLINE_S = 300.0


class _Client:
    """A silo on a link of its own, with one wire."""

    def __init__(self, endpoint: str, wire: Choice, hidden: int, noise: float) -> None:
        link = ZmqLink(endpoint, silo_attach(wire))
        self.wire, self.link, self.remote = wire, link, Remote(link, deadline=_DEADLINE_S)
        self.wires = Wires(wire, speed=lambda: link.speed, encodings=lambda: link.encodings, noise=noise)
        card = echo_card(hidden)
        self.remote.open(OpenRun(run=wire, model=card, start=0, stop=3, plan=RunPlan()), [], wait=20)
        opening = OpenSession(session="s", model=card, start=0, stop=3, rows=1, capacity=8)
        self.remote.open(opening, [], wait=20)

    def train(self, sent: Tensor, gradient: Tensor, sigma: float) -> float:
        """Seconds of one micro-batch: two tensors there and two back."""
        begun = time.perf_counter()
        shape = tuple(sent.shape)
        forward = Forward(
            run=self.wire, microbatch=0, lengths=(len(sent),), wire=self.wires.pick("trunk → tail", *shape)
        )
        wire = self.wires.pick("head → trunk", *shape)
        expect(self.remote.wait(self.remote.send(pack(forward, [sent], wire=wire, step=sigma))), 1)
        backward = Backward(
            run=self.wire, microbatch=0, wire=self.wires.pick("trunk → head (gradient)", *shape)
        )
        wire = self.wires.pick("tail → trunk (gradient)", *shape)
        number = self.remote.send(pack(backward, [gradient], wire=wire, stochastic=True))
        arrival = self.remote.take()
        assert arrival is not None
        assert arrival.header.id == number
        return time.perf_counter() - begun

    def decode(self, sent: Tensor, sigma: float) -> float:
        """Seconds of one token's way there and back."""
        begun = time.perf_counter()
        shape = tuple(sent.shape)
        extend = Extend(
            session="s", rows=(0,), starts=(0,), lengths=(1,), wire=self.wires.pick("trunk → tail", *shape)
        )
        wire = self.wires.pick("head → trunk", *shape)
        expect(self.remote.wait(self.remote.send(pack(extend, [sent], wire=wire, step=sigma))), 1)
        return time.perf_counter() - begun


def measure(
    sent: Tensor,
    gradient: Tensor,
    *,
    noise: float,
    rates: Sequence[float],
    rtt_ms: float,
    rounds: int,
    progress: Progress,
) -> dict[str, Any]:
    """Round trips of a micro-batch and of one token under `raw` and `auto`.

    `sent` and `gradient` `[T, hidden]` are boundary tensors; `rates` are in Mbit/s, 0 for plain
    loopback without a relay.
    """
    sigma = noise * float(sent.std())
    noisy = sent + torch.randn_like(sent) * sigma
    stop = threading.Event()
    with tempfile.TemporaryDirectory() as logs, Processes(Path(logs)) as processes:
        broker = processes.broker()
        worker = threading.Thread(target=serve_echo, args=(broker, sent.shape[1], stop))
        worker.start()
        try:
            rows = []
            for mbit in rates:
                progress(f"{mbit:g} Mbit/s" if mbit else "loopback")
                endpoint = _relay(processes, broker, rtt_ms, mbit) if mbit else broker
                rows.append(_row(endpoint, mbit, noisy, gradient, sigma, noise, rounds))
        finally:
            stop.set()
            worker.join(5)
    return {"tokens": len(sent), "hidden": sent.shape[1], "rows": rows}


def _relay(processes: Processes, broker: str, rtt_ms: float, mbit: float) -> str:
    listen = ("relay", "--listen", "tcp://127.0.0.1:0", "--to", broker)
    shape = ("--rtt-ms", f"{rtt_ms:g}", "--mbit", f"{mbit:g}")
    return processes.listener(f"relay-{mbit:g}", "relaying ", *listen, *shape)


def _row(
    endpoint: str, mbit: float, noisy: Tensor, gradient: Tensor, sigma: float, noise: float, rounds: int
) -> dict[str, Any]:
    choices: tuple[Choice, ...] = ("raw", "auto")
    clients = {wire: _Client(endpoint, wire, noisy.shape[1], noise) for wire in choices}
    try:
        time.sleep(_WARMUP_S)
        token = noisy[:_TOKENS_IN_ONE_STEP]
        for client in clients.values():  # What is measured once, and the first picks before it.
            client.train(noisy, gradient, sigma)
            client.decode(token, sigma)
        train: dict[Choice, list[float]] = {wire: [] for wire in choices}
        decode: dict[Choice, list[float]] = {wire: [] for wire in choices}
        for _ in range(rounds):
            for wire, client in clients.items():
                train[wire].append(client.train(noisy, gradient, sigma))
        picks = _picks(clients["auto"].wires)
        for _ in range(10 * rounds):
            for wire, client in clients.items():
                decode[wire].append(client.decode(token, sigma))
        speed = clients["auto"].link.speed
        return {
            "mbit": mbit,
            "measured_rtt_ms": speed.rtt * 1e3 if speed else None,
            "measured_mbit": speed.rate * 8e-6 if speed and math.isfinite(speed.rate) else None,
            "train": _compared(train) | {"picks": picks},
            "decode": _compared(decode) | {"picks": _picks(clients["auto"].wires)[:2]},
        }
    finally:
        for client in clients.values():
            client.remote.close()


def _picks(wires: Wires) -> list[str]:
    """What was picked last, in the order in which a micro-batch crosses the boundaries."""
    return [wires.picks[boundary].wire for boundary in get_args(Boundary)]


def _compared(times: dict[Choice, list[float]]) -> dict[str, Any]:
    """Medians in milliseconds, and the median of the ratios round by round."""
    ratios = [auto / raw for auto, raw in zip(times["auto"], times["raw"], strict=True)]
    return {
        "raw_ms": statistics.median(times["raw"]) * 1e3,
        "auto_ms": statistics.median(times["auto"]) * 1e3,
        "ratio": statistics.median(ratios),
    }
