"""The worker's three threads: one opens up what comes, one computes, one packs up what goes.

Sockets and codec work overlap the passes through the trunk: torch, zstd and lz4 let go of the
interpreter's lock while they work. The order of a silo's messages is kept: each thread is alone.
"""

import contextlib
import queue
import secrets
import threading
import time
from collections.abc import Callable
from threading import Event

import torch

from broker.link import Link
from broker.parcel import Parcel
from codec.errors import TrunklineError
from codec.logs import Log
from codec.messages import Attach, Drain
from codec.plan import ModelCard
from codec.staging import settle
from workers.inbound import Work, open_up
from workers.replies import Reply, encoded, unexpected
from workers.service import TrunkService
from workers.span import Span

_WAIT_S = 0.25
_MAX_TAKEN = 256
"""Requests put on the agenda at once, so that under a flood passes go on."""
_JOIN_S = 5.0
_MAX_OPEN_BYTES = 2 << 30
"""Decoded tensors that may wait; beyond, requests are left as they came."""
_FULL_S = 0.01


_CREDIT = 8
"""Passes' worth of tokens that a broker may have under way to a worker: what computes now and what fills
the next pass while it does, with room for micro-batches that are larger than that."""


def worker_attach(span: Span, card: ModelCard, name: str) -> Attach:
    """The introduction of a worker called `name` that hosts `span`, with a fresh secret identity."""
    return Attach(
        role="worker",
        name=name,
        peer=secrets.token_bytes(16),
        model=card,
        start=span.blocks.start,
        stop=span.blocks.stop,
        credit=_CREDIT * span.filling,
    )


def serve(link: Link, service: TrunkService, stop: Event, *, drain_s: float = 0.0) -> None:
    """Serve until `stop` is set, and then for up to `drain_s` seconds what is still open.

    Raises the link's error if it fails for good.
    """
    device = service.trunk.device
    ended = Event()
    inbox: queue.SimpleQueue[Work | TrunklineError | None] = queue.SimpleQueue()
    service.runs.saver.wake = lambda: inbox.put(None)
    outbox: queue.SimpleQueue[Reply | None] = queue.SimpleQueue()
    threads = [
        threading.Thread(target=_open, args=(link, service, inbox, ended), name="open", daemon=True),
        threading.Thread(target=_pack, args=(link, outbox, device), name="pack", daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        _compute(service, inbox, outbox, stop.is_set)
        if drain_s and not service.idle:
            link.send(Parcel.of(Drain()))
            until = time.monotonic() + drain_s
            _compute(service, inbox, outbox, lambda: service.idle or time.monotonic() > until)
    finally:
        service.runs.saver.close(_JOIN_S)
        ended.set()
        outbox.put(None)
        for thread in threads:
            thread.join(_JOIN_S)


def _compute(
    service: TrunkService,
    inbox: "queue.SimpleQueue[Work | TrunklineError | None]",
    outbox: "queue.SimpleQueue[Reply | None]",
    ended: Callable[[], bool],
) -> None:
    patience: float | None = None
    while not ended():
        for _ in range(_MAX_TAKEN):
            try:
                work = inbox.get(timeout=patience) if patience else inbox.get_nowait()
            except queue.Empty:
                break
            if isinstance(work, TrunklineError):
                raise work
            patience = 0.0
            if work is not None:
                service.add(work)
        replies = service.next_pass(time.monotonic())
        patience = 0.0
        if replies is None:
            due = service.wait(time.monotonic())
            patience = _WAIT_S if due is None else min(_WAIT_S, max(due, 1e-3))
        for reply in replies or ():
            outbox.put(reply)


def _open(
    link: Link,
    service: TrunkService,
    inbox: "queue.SimpleQueue[Work | TrunklineError | None]",
    ended: Event,
) -> None:
    trunk, opened = service.trunk, 0
    with _lane(trunk.device):
        while not ended.is_set():
            if opened - service.answered_bytes > _MAX_OPEN_BYTES:
                time.sleep(_FULL_S)  # What waits encoded takes less, and the broker's quotas bound it.
                continue
            try:
                parcel = link.receive(_WAIT_S)
                if parcel is None:
                    continue
                work = open_up(parcel, trunk)
                # What the computing thread takes is there. It ends a pass before it lets go of it.
                settle(trunk.device)
                opened += work.bytes
                inbox.put(work)
            except TrunklineError as error:
                inbox.put(error)
                return
            except Exception as error:  # Without this thread the worker would take all and answer nothing.
                Log("worker").failed("requests cannot be opened up any more")
                inbox.put(unexpected(error))
                return


def _pack(link: Link, outbox: "queue.SimpleQueue[Reply | None]", device: torch.device) -> None:
    with _lane(device):
        while (reply := outbox.get()) is not None:
            try:
                link.send(encoded(reply))
            except TrunklineError as error:  # The receiving thread hears of it too, and ends the worker.
                Log("worker").warn("answer not sent", why=str(error))


def _lane(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A GPU stream for this thread's copies and codec kernels, beside that of the passes."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))
