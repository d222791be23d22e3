"""Quotas of a silo: who is over one is told which, and nobody else notices."""

from collections.abc import Callable
from typing import Any

import pytest

from broker.quota import Attaches, Limits
from codec.errors import LimitError
from codec.messages import CloseRun, CloseSession, Opened, OpenSession, Result, Welcome

Desks = Callable[..., Any]


@pytest.fixture
def keyed(new_desk: Desks) -> Desks:
    """`keyed(requests=2)`: a desk at which who has the same name has the same key."""

    def make(**limits: Any) -> Any:
        desk = new_desk(**limits)
        desk.router.registry.keyed = True
        return desk

    return make


@pytest.mark.parametrize("what", ["sessions", "runs"])
def test_open_names_are_counted_until_they_are_closed(new_desk: Desks, what: str) -> None:
    desk = new_desk(**{what: 2})
    worker, silo, other = desk.worker(), desk.silo(), desk.silo("other")
    opens = {"sessions": type(silo).opens, "runs": type(silo).joins}[what]
    for number in (1, 2):
        opens(silo, f"n{number}", number)
        worker.says(Opened(id=number), peer=silo.alias)
    opens(silo, "n1", 3)  # Opened again, it is none more.
    worker.says(Opened(id=3), peer=silo.alias)
    silo.read()
    opens(silo, "n3", 4)
    error = silo.reads_error()
    assert (error.id, error.code, error.side) == (4, "limit", "silo")
    assert f"2 {what}" in error.what
    assert f"--max-{what}" in error.what
    assert "Close some" in error.hint
    opens(other, "n3", 1)
    assert worker.inbox[-1].peer == other.alias
    worker.read()
    close = CloseSession(id=5, session="n1") if what == "sessions" else CloseRun(id=5, run="n1")
    silo.says(close)
    opens(silo, "n3", 6)
    assert [header.id for header in worker.read()] == [5, 6]


def test_the_peers_of_one_key_share_its_quotas(keyed: Desks) -> None:
    desk = keyed(requests=2, sessions=1)
    worker, one, twin, other = (desk.worker(), *(desk.silo(name) for name in ("a", "a", "b")))
    one.opens("s", 1)
    worker.says(Opened(id=1), peer=one.alias)
    one.read()
    twin.opens("t", 1)
    assert "1 sessions" in twin.reads_error().what
    one.extends("s", 2)
    one.extends("s", 3)
    one.extends("s", 4)
    assert one.reads_error().code == "limit"
    other.opens("s", 1)
    assert [(p.peer, p.header.id) for p in worker.inbox[-3:]] == [
        (one.alias, 2),
        (one.alias, 3),
        (other.alias, 1),
    ]


def test_without_keys_names_are_nobodys_and_shared_by_nobody(new_desk: Desks) -> None:
    desk = new_desk(sessions=1)
    worker, one, twin = desk.worker(), desk.silo("a"), desk.silo("a")
    one.opens("s", 1)
    twin.opens("s", 1)
    assert len(worker.read()) == 2


@pytest.mark.parametrize("ends", ["answered", "worker gone", "worker moves"])
def test_who_leaves_and_comes_back_is_still_charged_for_what_workers_have(keyed: Desks, ends: str) -> None:
    """Or a silo could fill a worker's memory by leaving after each request."""
    desk = keyed(bytes=100)
    worker, silo = desk.worker(), desk.silo("a")
    silo.says(OpenSession(**opening(1)), [b"x" * 80])
    silo.leaves()
    again = desk.silo("a")
    again.says(OpenSession(**opening(1)), [b"x" * 80])
    assert "80 bytes" in again.reads_error().what
    if ends == "answered":
        worker.says(Opened(id=1), peer=silo.alias)
    elif ends == "worker gone":
        worker.leaves()
        worker = desk.worker()
    else:
        worker.reattaches()
    worker.read()
    again.says(OpenSession(**opening(2)), [b"x" * 80])
    assert [header.id for header in worker.read()] == [2]


def test_what_waits_for_credit_is_not_charged_for_once_its_silo_is_gone(keyed: Desks) -> None:
    desk = keyed(requests=3)
    worker, silo = desk.worker(credit=1), desk.silo("a")
    silo.opens("s", 1)
    worker.says(Opened(id=1), peer=silo.alias)
    for number in (2, 3, 4):
        silo.extends("s", number)
    silo.leaves()
    account = desk.silo("a") and next(iter(desk.router.registry.silos.values())).account
    assert account.requests == 1, "the one that the worker has"
    worker.says(Result(id=2), peer=silo.alias)
    assert account.requests == 0


def test_who_attaches_too_often_is_told_so_and_others_get_in(keyed: Desks, introduce: Any) -> None:
    desk = keyed(attaches=3)
    for _ in range(3):
        assert isinstance(desk.party(introduce("silo", "a")).inbox[0].header, Welcome)
    error = desk.party(introduce("silo", "a")).reads_error()
    assert (error.id, error.code) == (0, "limit")
    assert "3 attaches" in error.what
    assert "--max-attaches" in error.what
    assert isinstance(desk.party(introduce("silo", "b")).inbox[0].header, Welcome)
    desk.passes(9.0)
    desk.passes(11.1)  # A third of a minute: one more.
    assert isinstance(desk.party(introduce("silo", "a")).inbox[0].header, Welcome)
    assert desk.party(introduce("silo", "a")).reads_error().code == "limit"


def test_attaches_are_remembered_for_a_minute_and_no_longer() -> None:
    attaches, limits = Attaches(), Limits(attaches=2)
    for second in range(1000):
        attaches.check(f"peer {second}", limits, now=float(second))
        attaches.forget_full(float(second))
    assert len(attaches._buckets) <= 61


def test_a_bucket_is_as_slow_as_it_says() -> None:
    """Against a count of the last minutes: never more than two minutes' worth in any minute."""
    attaches, limits, got = Attaches(), Limits(attaches=30), []
    for tick in range(3000):
        now = tick / 10
        try:
            attaches.check("a", limits, now)
            got.append(now)
        except LimitError:
            pass
    assert 175 <= len(got) <= 30 + 150
    assert all(sum(t <= other < t + 60 for other in got) <= 60 for t in got)


def opening(number: int) -> dict[str, Any]:
    from codec.plan import ModelCard

    card = ModelCard(name="m", fingerprint="f", blocks=6, hidden=4)
    return {"id": number, "session": "s", "model": card, "start": 2, "stop": 4, "rows": 1, "capacity": 8}
