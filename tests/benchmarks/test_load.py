"""Replay silos in a process of their own against a real broker, and what becomes of errors."""

import resource
import threading
from collections.abc import Iterator

import msgspec
import pytest

from benchmarks import driver, load
from benchmarks.echo import echo_card, serve_echo
from benchmarks.load import Load
from benchmarks.recording import crossing, made_up
from benchmarks.replay import Generation, Replay, Trunk
from broker.router import Router
from broker.server import Server
from codec.errors import TrunklineError, UsageError
from codec.partition import Span

pytestmark = pytest.mark.timeout(60)

HIDDEN = 8


@pytest.fixture
def broker() -> Iterator[str]:
    """A broker with an echo for a worker."""
    stop = threading.Event()
    server = Server("tcp://127.0.0.1:0", Router())
    threads = [
        threading.Thread(target=server.serve, args=(stop,)),
        threading.Thread(target=serve_echo, args=(server.endpoint, HIDDEN, stop)),
    ]
    for thread in threads:
        thread.start()
    yield server.endpoint
    stop.set()
    for thread in threads:
        thread.join(10)


def silo(trunk: Trunk | None = None) -> Replay:
    sent = made_up([6], HIDDEN).sent
    here = trunk or Trunk(echo_card(HIDDEN), Span(0, 3), "raw")
    return Generation(here, crossing(sent, "raw"), crossing(sent[:1], "raw"), 2)


def test_many_silos_are_measured_in_several_processes(broker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_SILOS_A_PROCESS", 2)
    with Load(broker, [silo() for _ in range(3)]) as silos:
        silos.warm_up()
        first, second = silos.measure(0.3), silos.measure(0.3)
    for served in (first, second):
        assert not served.errors
        assert len(served.rates) == 3
        assert all(rate > 0 for rate in served.rates)
        # Three requests for two tokens: of 6, 1 and 1 rows, there and back.
        requests = len(served.waits["extend"])
        assert requests == pytest.approx(1.5 * served.tokens, abs=9)
        assert served.size > 2 * 16 * served.tokens * 4
        assert 0 < served.cpu < 2
        assert served.ended - served.begun >= 0.3
    assert second.begun >= first.begun + 0.3  # One window follows the other, in each process.


def test_a_silo_that_is_refused_is_told_and_the_others_go_on(broker: str) -> None:
    card = msgspec.structs.replace(echo_card(HIDDEN), name="other", fingerprint="other")
    other = Trunk(card, Span(0, 3), "raw")
    with Load(broker, [silo(), silo(other)]) as silos:
        silos.warm_up()
        served = silos.measure(0.1)
    assert served.rates[0] > 0
    assert served.rates[1] == 0
    (error,) = served.errors
    assert "the silo holds other" in error


def test_a_load_that_is_never_served_ends_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_START_S", 0.2)
    with pytest.raises(TrunklineError, match="said nothing"), Load("tcp://127.0.0.1:1", [silo()]) as silos:
        silos.warm_up()


def test_too_few_open_files_are_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"soft": 256, "hard": 1000}
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limits["soft"], limits["hard"]))
    monkeypatch.setattr(resource, "setrlimit", lambda _, wanted: limits.update(soft=wanted[0]))
    driver.allow_files(200)
    assert limits["soft"] == 256
    driver.allow_files(900)
    assert limits["soft"] == 900
    with pytest.raises(UsageError, match="1600 open files are needed for so many silos, the system allows"):
        driver.allow_files(1600)
