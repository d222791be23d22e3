"""Requests and answers: order, deadlines, repeats, and whose error it was."""

import queue
import threading
import time
from typing import Any

import pytest
import torch

from broker.parcel import Parcel
from codec.errors import (
    DeadlineError,
    FrameError,
    LimitError,
    LinkError,
    ProtocolError,
    UnavailableError,
    UnknownNameError,
)
from codec.messages import CloseSession, Done, Error, Extend, OpenSession, Result
from codec.tensors import encode_tensors
from silo_agent.packed import pack
from silo_agent.remote import Remote, expect

ASK = CloseSession(session="s")


class Cable:
    """A link whose other end is the test."""

    def __init__(self) -> None:
        self.sent: list[Parcel] = []
        self.inbox: queue.SimpleQueue[Parcel] = queue.SimpleQueue()
        self.failure: Exception | None = None

    def send(self, parcel: Parcel) -> None:
        if self.failure:
            raise self.failure
        self.sent.append(parcel)

    def receive(self, timeout: float) -> Parcel | None:
        if self.failure:
            raise self.failure
        try:
            return self.inbox.get(timeout=timeout)
        except queue.Empty:
            return None

    def close(self) -> None: ...

    def answer(self, number: int, *tensors: torch.Tensor) -> None:
        specs, frames = encode_tensors(tensors, "exact", "test")
        header = Result(id=number, tensors=specs) if tensors else Done(id=number)
        self.inbox.put(Parcel.of(header, frames))


@pytest.fixture
def cable() -> Cable:
    return Cable()


@pytest.fixture
def remote(cable: Cable) -> Remote:
    return Remote(cable, deadline=20.0)


def test_answers_may_come_in_any_order(cable: Cable, remote: Remote) -> None:
    numbers = [remote.submit(ASK) for _ in range(3)]
    assert len(set(numbers)) == 3
    assert [parcel.header.id for parcel in cable.sent] == numbers
    for number in reversed(numbers):
        cable.answer(number)
    taken = [remote.take() for _ in numbers]
    assert [arrival.header.id for arrival in taken if arrival] == numbers[::-1]
    assert remote.take(block=False) is None


def test_a_call_keeps_what_comes_for_others(cable: Cable, remote: Remote) -> None:
    others = [remote.submit(ASK), remote.submit(ASK)]
    for number in (*others, max(others) + 1):
        cable.answer(number)
    assert remote.call(ASK).header.id == max(others) + 1
    assert [remote.take().header.id for _ in others] == others  # type: ignore[union-attr]
    assert remote.take(block=False) is None


def test_a_deadline_names_the_request(cable: Cable, remote: Remote) -> None:
    remote.submit(ASK, deadline=5.0)
    begun = time.monotonic()
    with pytest.raises(DeadlineError, match=r"no answer to close-session \(request 2\) in time") as caught:
        remote.call(ASK, deadline=0.1)
    assert 0.1 <= time.monotonic() - begun < 4
    assert caught.value.at == "worker"
    assert "--deadline" in caught.value.hint
    cable.answer(1)
    assert remote.take() is not None, "the other request still waits"


def test_late_and_repeated_answers_are_ignored(cable: Cable, remote: Remote) -> None:
    with pytest.raises(DeadlineError):
        remote.call(ASK, deadline=0.05)
    cable.answer(1)
    cable.answer(2)
    assert remote.call(ASK).header.id == 2
    for number in (1, 2, 2, 77):
        cable.answer(number)
    cable.inbox.put(Parcel.of(Error(id=2, code="limit", what="too late", side="worker")))
    cable.inbox.put(Parcel.of(ASK))  # No answer at all.
    cable.answer(3, torch.ones(2, 3))
    (tensor,) = expect(remote.call(ASK), 1)
    assert torch.equal(tensor, torch.ones(2, 3))


def test_an_error_rises_with_its_side_and_hint(cable: Cable, remote: Remote) -> None:
    cable.inbox.put(Parcel.of(Error(id=1, code="limit", what="no room", side="worker", hint="Wait.")))
    with pytest.raises(LimitError, match=r"^no room \[worker\] Wait\.$") as caught:
        remote.call(ASK)
    assert (caught.value.at, caught.value.hint) == ("worker", "Wait.")


def test_the_workers_own_errors_rise_as_what_they_are(pool: Any) -> None:
    remote = pool.remote()
    with pytest.raises(UnknownNameError, match="no session or run 'nonsense' open"):
        remote.call(CloseSession(session="nonsense"))
    ends = pool.ends()
    facts = {"model": ends.card, "start": 2, "stop": 4, "rows": 1, "session": "s"}
    with pytest.raises(LimitError, match="KV cache") as caught:
        remote.open(OpenSession(**facts, capacity=1 << 20), [], wait=5)
    assert caught.value.at == "worker"
    assert "--kv-memory" in caught.value.hint
    remote.open(OpenSession(**facts, capacity=9), [], wait=5)
    with pytest.raises(Exception, match="the lengths sum to 3, the tensor holds 2 tokens"):
        remote.call(Extend(session="s", rows=(0,), starts=(0,), lengths=(3,)), [torch.ones(2, 64)])


def opening(pool: Any) -> OpenSession:
    card = pool.ends().card
    return OpenSession(model=card, start=2, stop=4, rows=1, session="s", capacity=9)


def test_open_waits_for_a_worker_that_comes_later(bare_pool: Any) -> None:
    timer = threading.Timer(0.7, bare_pool.start_worker)
    timer.start()
    begun = time.monotonic()
    arrival = bare_pool.remote().open(opening(bare_pool), [], wait=30)
    timer.join()
    assert time.monotonic() - begun >= 0.7
    assert type(arrival.header).__name__ == "Opened"


def test_open_gives_up_in_time(bare_pool: Any) -> None:
    for wait in (0.0, 0.8):
        begun = time.monotonic()
        with pytest.raises(UnavailableError, match="no worker is attached"):
            bare_pool.remote().open(opening(bare_pool), [], wait=wait)
        assert time.monotonic() - begun < wait + 5


def test_a_failed_link_is_heard_of(cable: Cable, remote: Remote) -> None:
    remote.submit(ASK)
    cable.failure = LinkError("the broker is gone")
    with pytest.raises(LinkError):
        remote.take()
    with pytest.raises(LinkError):
        remote.submit(ASK)
    remote.tell(ASK)  # Nobody waits for this one: nobody is told.


def test_what_is_told_is_sent_and_its_answer_reaches_nobody(cable: Cable, remote: Remote) -> None:
    remote.tell(ASK)
    assert [parcel.header.id for parcel in cable.sent] == [1]
    cable.inbox.put(Parcel.of(Error(id=1, code="unknown-name", what="no such session", side="silo")))
    cable.answer(2)
    assert remote.call(ASK).header.id == 2


def test_waiting_for_nothing_is_an_error_and_not_for_ever(remote: Remote) -> None:
    with pytest.raises(DeadlineError, match="any request"):
        remote.take()


def test_tensors_that_cannot_cross_or_are_too_few(cable: Cable, remote: Remote) -> None:
    with pytest.raises(FrameError, match="close-session: NaN"):
        remote.submit(ASK, [torch.tensor([[float("nan")]])])
    with pytest.raises(FrameError, match=r"torch\.int64 does not cross"):
        remote.submit(ASK, [torch.tensor([[7]])])
    assert cable.sent == []
    number = remote.submit(ASK)
    cable.answer(number)
    arrival = remote.take()
    assert arrival is not None
    with pytest.raises(ProtocolError, match="0 tensors came, 1 were asked for"):
        expect(arrival, 1)


def test_what_a_broker_would_drop_is_not_sent(
    cable: Cable, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("codec.frames.MAX_FRAME_BYTES", 1000)
    with pytest.raises(
        FrameError, match=r"close-session: a tensor of shape \(4, 64\) is over 1000"
    ) as caught:
        remote.submit(ASK, [torch.ones(4, 64)])
    assert "--batch" in caught.value.hint
    assert cable.sent == []
    assert remote.take(block=False) is None


def test_traffic_counts_what_crossed_each_way(cable: Cable, remote: Remote) -> None:
    for tokens in (5, 1):
        number = remote.send(pack(ASK, [torch.ones(tokens, 64)], wire="bf16"))
        cable.answer(number, torch.ones(tokens, 64))
        remote.take()
    assert remote.traffic.bytes == {"close-session up": 6 * 64 * 2, "close-session down": 6 * 64 * 4}
    assert remote.traffic.tokens == {"close-session up": 6, "close-session down": 6}
