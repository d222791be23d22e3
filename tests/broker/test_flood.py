"""One silo floods, at real sockets: it hears that it is over its quota, and the other notices nothing."""

import time
from itertools import count
from statistics import median
from typing import Any

from broker.parcel import Parcel
from codec.messages import Error, Result

FLOOD, ALLOWED = 3000, 100


def test_a_flood_is_told_its_quota_and_the_other_silo_is_served(
    start_broker: Any, connect: Any, start_echo: Any, introduce: Any, extending: Any, opened: Any, ask: Any
) -> None:
    broker = start_broker(requests=ALLOWED)
    echo = start_echo(broker.endpoint, credit=8)
    flooder, calm = (connect(broker.endpoint, introduce("silo", name)) for name in ("flooder", "calm"))
    numbers = count(1), count(1)
    for link, ids in zip((flooder, calm), numbers, strict=True):
        opened(link, "s", ids)
    echo.silent.set()  # What it took first is not answered, so that everything piles up.
    for _ in range(FLOOD):
        flooder.send(Parcel.of(extending("s", next(numbers[0])), [b"x" * 1000]))
    refused = [answer(flooder) for _ in range(FLOOD - ALLOWED)]
    assert {error.code for error in refused} == {"limit"}
    assert all(f"{ALLOWED} (--max-requests)" in error.what for error in refused)

    echo.silent.clear()
    (worker,) = broker.server.router.registry.workers.values()
    assert worker.inbox.waiting, "the flood is still in the way"
    seconds = []
    for number in range(50):
        if number % 5 == 0:
            for _ in range(100):
                flooder.send(Parcel.of(extending("s", next(numbers[0])), [b"x" * 1000]))
        body, begun = f"calm {number}".encode(), time.monotonic()
        if number == 0:  # What the worker took and keeps silent about has its credit: give that back.
            for pending in list(worker.inbox):
                if pending.parcel is None:
                    echo.link.send(Parcel.of(Result(id=pending.number), peer=pending.silo.alias))
        back = ask(calm, extending("s", next(numbers[1])), [body])
        seconds.append(time.monotonic() - begun)
        assert [bytes(buffer) for buffer in back.buffers()] == [body]
    print(f"median {1000 * median(seconds):.1f} ms, longest {1000 * max(seconds):.1f} ms")
    assert median(seconds) < 1.0


def answer(link: Any) -> Error:
    """The next answer that is an error."""
    while True:
        parcel = link.receive(20)
        assert parcel is not None
        if isinstance(parcel.header, Error):
            return parcel.header
