"""Links to a real broker over loopback: nothing is changed, lost or left running."""

import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from itertools import count
from pathlib import Path
from typing import Any

import pytest

import broker.link
from broker.link import ZmqLink
from broker.link_state import LinkState
from broker.parcel import Parcel
from codec.errors import FrameError, LinkError, ProtocolError, UsageError
from codec.messages import Attach, CloseSession, Error, Opened, Result


def test_frames_come_back_bit_for_bit(
    start_broker: Any, start_echo: Any, connect: Any, introduce: Any, opened: Any, ask: Any, extending: Any
) -> None:
    endpoint = start_broker().endpoint
    start_echo(endpoint)
    silo, numbers = connect(endpoint, introduce("silo")), count(1)
    opened(silo, "s", numbers)
    large = os.urandom(8 << 20)
    for frames in ([], [b""], [b"\x00"], [large], [b"", large[:65536], b"", large[:65537], b"abc", b""]):
        back = ask(silo, extending("s", next(numbers)), frames)
        assert isinstance(back.header, Result)
        assert [bytes(buffer) for buffer in back.buffers()] == frames
        assert back.peer == b""


def test_memory_that_is_not_bytes_crosses_too(
    start_broker: Any, start_echo: Any, connect: Any, introduce: Any, opened: Any, ask: Any, extending: Any
) -> None:
    endpoint = start_broker().endpoint
    start_echo(endpoint)
    silo, numbers = connect(endpoint, introduce("silo")), count(1)
    opened(silo, "s", numbers)
    frames = [bytearray(b"x" * 100_000), memoryview(b"yz")]
    back = ask(silo, extending("s", next(numbers)), frames)
    assert [bytes(buffer) for buffer in back.buffers()] == [b"x" * 100_000, b"yz"]


def test_many_requests_at_once_are_each_answered_once(
    start_broker: Any, start_echo: Any, connect: Any, introduce: Any, opened: Any, extending: Any
) -> None:
    """More than a ZeroMQ queue and the quota hold: what is over the quota is told so."""
    endpoint = start_broker(requests=200).endpoint
    start_echo(endpoint)
    silo, numbers = connect(endpoint, introduce("silo")), count(1)
    opened(silo, "s", numbers)
    sent = [next(numbers) for _ in range(3000)]
    for number in sent:
        silo.send(Parcel.of(extending("s", number), [b"x" * 100]))
    answers = [silo.receive(10) for _ in sent]
    assert all(answers)
    assert sorted(parcel.header.id for parcel in answers) == sent
    codes = {parcel.header.code for parcel in answers if isinstance(parcel.header, Error)}
    assert codes <= {"limit"}
    assert silo.receive(0.05) is None


def test_order_is_kept(
    start_broker: Any, start_echo: Any, connect: Any, introduce: Any, opened: Any, extending: Any
) -> None:
    endpoint = start_broker().endpoint
    start_echo(endpoint)
    silo, numbers = connect(endpoint, introduce("silo")), count(1)
    opened(silo, "s", numbers)
    sent = [next(numbers) for _ in range(300)]
    for number in sent:
        silo.send(Parcel.of(extending("s", number)))
    assert [silo.receive(10).header.id for _ in sent] == sent


def test_a_link_may_come_before_its_broker(
    start_broker: Any,
    start_echo: Any,
    connect: Any,
    introduce: Any,
    opened: Any,
    opening: Any,
    answer_to: Any,
) -> None:
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    silo, numbers = connect(endpoint, introduce("silo"), patience=20), count(1)
    silo.send(Parcel.of(opening("early", id=next(numbers))))
    assert silo.receive(0.3) is None
    start_broker(endpoint)
    # What was sent before is delivered: no worker is there yet.
    assert answer_to(silo, 1).header.code == "nobody"
    start_echo(endpoint)
    opened(silo, "s", numbers)


def test_links_survive_a_restart_of_the_broker(
    start_broker: Any,
    start_echo: Any,
    connect: Any,
    introduce: Any,
    opened: Any,
    extending: Any,
    answer_to: Any,
    until: Any,
) -> None:
    first = start_broker(heartbeat=0.1)
    endpoint = first.endpoint
    echo = start_echo(endpoint)
    silo, numbers = connect(endpoint, introduce("silo")), count(1)
    opened(silo, "s", numbers)
    echo.silent.set()
    lost, taken = next(numbers), echo.taken
    silo.send(Parcel.of(extending("s", lost)))
    until(lambda: echo.taken > taken)
    first.stop()
    start_broker(endpoint)
    # The request that was on its way is not forgotten: its silo hears that no answer will come,
    error = answer_to(silo, lost).header
    assert (error.code, error.side) == ("unavailable", "broker")
    # and the worker frees what it held for silos of which the new broker knows nothing.
    until(lambda: echo.gone)
    echo.silent.clear()
    silo.send(Parcel.of(extending("s", number := next(numbers))))
    assert answer_to(silo, number).header.code == "unknown-name"
    opened(silo, "s", numbers)


def test_a_link_gives_up_when_its_patience_ends(connect: Any, introduce: Any) -> None:
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    silo = connect(endpoint, introduce("silo"), patience=0.3)
    begun = time.monotonic()
    with pytest.raises(LinkError, match="no broker answered") as caught:
        silo.receive(10)
    assert 0.2 < time.monotonic() - begun < 5
    assert endpoint in caught.value.what
    assert "trunkline broker --listen" in caught.value.hint
    begun = time.monotonic()
    with pytest.raises(LinkError):
        silo.receive(10)
    assert time.monotonic() - begun < 1, "an error that is known is told at once"
    with pytest.raises(LinkError):
        silo.send(Parcel.of(CloseSession(id=1, session="s")))


def test_an_identity_that_is_refused_ends_the_link(start_broker: Any, connect: Any, introduce: Any) -> None:
    endpoint = start_broker().endpoint
    silo = introduce("silo")
    connect(endpoint, silo)
    time.sleep(0.2)
    impostor = introduce("worker")
    fake = connect(endpoint, Attach(**{**fields(impostor), "peer": silo.peer}))
    with pytest.raises(ProtocolError, match="attached as a silo"):
        fake.receive(10)


@pytest.mark.parametrize("endpoint", ["", "tcp://127.0.0.1:0", "tcp://10.0.0.1:7555", "tcp://127.0.0.1:1/x"])
def test_a_bad_endpoint_is_refused_before_anything_runs(endpoint: str, introduce: Any) -> None:
    threads = threading.active_count()
    with pytest.raises(UsageError):
        ZmqLink(endpoint, introduce("silo"))
    assert threading.active_count() == threads


def test_a_frame_over_the_limit_is_refused(
    connect: Any, introduce: Any, extending: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZeroMQ would cut the connection instead, and nobody would know why."""
    silo = connect(f"tcp://127.0.0.1:{free_port()}", introduce("silo"))
    monkeypatch.setattr(broker.link, "MAX_FRAME_BYTES", 10)
    silo.send(Parcel.of(extending("s", 1), [b"x" * 10]))
    with pytest.raises(FrameError, match="a tensor frame of 11 bytes"):
        silo.send(Parcel.of(extending("s", 1), [b"x", b"x" * 11]))


def test_a_link_that_breaks_tells_its_owner(
    start_broker: Any, connect: Any, introduce: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(broker.link.LinkState, "tick", broken)
    silo = connect(start_broker().endpoint, introduce("silo"))
    with pytest.raises(Exception, match="the link broke: a defect"):
        silo.receive(10)


def test_closing_delivers_what_was_sent_and_ends_the_thread(
    start_broker: Any, start_echo: Any, connect: Any, introduce: Any, opened: Any, extending: Any, until: Any
) -> None:
    endpoint = start_broker().endpoint
    echo = start_echo(endpoint)
    silo, numbers = connect(endpoint, introduce("silo", "leaver")), count(1)
    opened(silo, "s", numbers)
    taken = echo.taken
    for _ in range(500):
        silo.send(Parcel.of(extending("s", next(numbers)), [b"x" * 1000]))
    silo.close()
    assert not silo._thread.is_alive()
    until(lambda: echo.gone == ["leaver"])
    assert echo.taken - taken == 500
    silo.close()
    with pytest.raises(LinkError, match="closed"):
        silo.send(Parcel.of(CloseSession(id=1, session="s")))


def test_closing_is_quick_without_a_broker(connect: Any, introduce: Any) -> None:
    silo = connect(f"tcp://127.0.0.1:{free_port()}", introduce("silo"))
    silo.send(Parcel.of(CloseSession(id=1, session="s")))
    begun = time.monotonic()
    silo.close()
    assert time.monotonic() - begun < 1.5
    assert not silo._thread.is_alive()


@pytest.mark.parametrize("broker_there", [True, False])
@pytest.mark.parametrize("ending", ["link.close()", "pass"], ids=["closed", "not closed"])
def test_a_process_with_a_link_ends(
    broker_there: bool, ending: str, start_broker: Any, repository: Path
) -> None:
    endpoint = start_broker().endpoint if broker_there else f"tcp://127.0.0.1:{free_port()}"
    program = f"""
from broker.link import ZmqLink
from broker.link_state import LinkState
from broker.parcel import Parcel
from codec.messages import Attach, CloseSession
link = ZmqLink({endpoint!r}, Attach(role="silo", name="s", peer=bytes(16)))
link.send(Parcel.of(CloseSession(id=1, session="s"), [bytes(1 << 20)]))
link.receive(0.3)
print("ending", flush=True)
{ending}
"""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", program], cwd=repository, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ending\n"
        try:
            assert process.wait(2) == 0
        finally:
            process.kill()


def test_a_message_wakes_everyone_on_its_way(
    start_broker: Any, start_echo: Any, connect: Any, introduce: Any, opened: Any, ask: Any, extending: Any
) -> None:
    """Silo, broker and worker all sleep when it is sent; none waits for a poll to time out."""
    endpoint = start_broker().endpoint
    start_echo(endpoint)
    silo, numbers = connect(endpoint, introduce("silo")), count(1)
    opened(silo, "s", numbers)
    seconds = []
    for _ in range(50):
        time.sleep(0.01)
        begun = time.perf_counter()
        ask(silo, extending("s", next(numbers)), [b"x" * 2304])
        seconds.append(time.perf_counter() - begun)
    assert statistics.median(seconds) < 0.005


def test_attaching_waits_for_no_timer(
    start_broker: Any, start_echo: Any, connect: Any, introduce: Any, opening: Any, ask: Any, until: Any
) -> None:
    running = start_broker()
    start_echo(running.endpoint)
    until(lambda: running.server.router.peers)
    seconds = []
    for _ in range(3):
        begun = time.monotonic()
        silo = connect(running.endpoint, introduce("silo"))
        assert isinstance(ask(silo, opening("s", id=1)).header, Opened)
        seconds.append(time.monotonic() - begun)
    assert min(seconds) < LinkState.RETRY / 2


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fields(header: Any) -> dict[str, Any]:
    return {name: getattr(header, name) for name in header.__struct_fields__}
