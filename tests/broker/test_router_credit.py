"""When the broker sends on: credit over the lives of silos and workers, and workers that drain."""

from typing import Any

from codec.messages import (
    CloseRun,
    CloseSession,
    Done,
    Drain,
    Error,
    Extend,
    Forward,
    Gone,
    OpenRun,
    OpenSession,
    Result,
)


def prefill(name: str, number: int, tokens: int = 10) -> Extend:
    return Extend(id=number, session=name, rows=(0,), starts=(0,), lengths=(tokens,))


def numbers(party: Any) -> list[int]:
    return [header.id for header in party.read()]


def under_way(desk: Any, worker: Any) -> tuple[int, int]:
    """Tokens under way to the worker, and requests that wait for it."""
    inbox = desk.router.peers[worker.route].inbox
    return inbox.tokens_under_way, inbox.waiting


def with_session(desk: Any, credit: int = 10) -> tuple[Any, Any]:
    """A worker of little credit and a silo with session "s"; its next number is 2."""
    worker, silo = desk.worker(credit=credit), desk.silo()
    silo.opens("s", 1)
    worker.says(Result(id=1), peer=silo.alias)
    worker.read(), silo.read()
    return worker, silo


def test_a_request_waits_for_credit_and_an_answer_of_any_kind_gives_it_back(desk: Any) -> None:
    worker, silo = with_session(desk)
    for number in (2, 3, 4):
        silo.says(prefill("s", number), [b"x" * number])
    assert numbers(worker) == [2]
    worker.says(Result(id=2), peer=silo.alias)
    (sent,) = worker.inbox
    assert (sent.header, sent.tensors, sent.peer) == (prefill("s", 3), [b"xxx"], silo.alias)
    worker.says(Error(id=3, code="limit", what="no", side="worker"), peer=silo.alias)
    assert numbers(worker) == [3, 4]
    worker.says(Result(id=4), peer=silo.alias)
    assert numbers(silo) == [2, 3, 4]
    assert under_way(desk, worker) == (0, 0)


def test_a_decode_step_overtakes_other_sessions_prompts(desk: Any) -> None:
    worker, silo = with_session(desk)
    silo.opens("t", 2)
    silo.says(prefill("s", 3))
    silo.says(prefill("s", 4))
    silo.extends("t", 5)
    worker.says(Result(id=3), peer=silo.alias)
    assert numbers(worker) == [2, 3, 5]
    worker.says(Result(id=5), peer=silo.alias)
    assert numbers(worker) == [4]


def test_closing_keeps_its_place_and_the_name_is_free_meanwhile(desk: Any) -> None:
    worker, silo = with_session(desk)
    silo.says(prefill("s", 2))
    silo.says(prefill("s", 3))
    silo.says(CloseSession(id=4, session="s"))
    silo.extends("s", 5)
    assert silo.reads_error().code == "unknown-name"
    silo.opens("s", 6)
    assert numbers(worker) == [2]
    worker.says(Result(id=2), peer=silo.alias)
    assert numbers(worker) == [3, 4, 6]


def test_a_worker_that_dies_is_told_to_those_whose_requests_wait(desk: Any) -> None:
    worker, silo = with_session(desk)
    silo.says(prefill("s", 2))
    silo.says(prefill("s", 3))
    worker.leaves()
    assert [(header.id, header.code) for header in silo.read()] == [(2, "unavailable"), (3, "unavailable")]
    assert not desk.router.registry.silos[silo.alias].pending


def test_the_credit_of_a_silo_that_left_comes_back_with_the_answers(desk: Any) -> None:
    worker, silo = with_session(desk)
    other = desk.silo("other")
    other.opens("o", 1)
    silo.says(prefill("s", 2))
    silo.says(prefill("s", 3))
    other.says(prefill("o", 2))
    worker.read()
    silo.leaves()
    assert worker.read() == [Gone(name="north")], "what waited is not sent any more"
    assert under_way(desk, worker) == (10, 1)
    worker.says(Error(id=2, code="unknown-name", what="gone", side="worker"), peer=silo.alias)
    assert numbers(worker) == [2]
    assert under_way(desk, worker) == (10, 0)


def test_a_silo_that_comes_back_is_not_given_answers_of_its_former_life(desk: Any) -> None:
    worker, silo = with_session(desk)
    silo.says(prefill("s", 2))
    silo.leaves()
    silo.says(silo.attach)
    silo.opens("s", 1)
    silo.read(), worker.read()
    silo.says(prefill("s", 2, tokens=3))
    error = silo.reads_error()
    assert (error.id, error.code) == (2, "protocol")
    worker.says(Result(id=2), peer=silo.alias)
    assert silo.read() == []
    assert under_way(desk, worker) == (0, 0)
    silo.says(prefill("s", 2, tokens=3))
    assert numbers(worker) == [2]
    worker.says(Result(id=2), peer=silo.alias)
    assert numbers(silo) == [2]
    assert under_way(desk, worker) == (0, 0)


def test_a_number_that_a_dead_worker_owed_is_free_again(desk: Any) -> None:
    worker, silo = with_session(desk)
    silo.says(prefill("s", 2))
    silo.leaves()
    silo.says(silo.attach)
    worker.leaves()
    second = desk.worker("second")
    silo.opens("s", 2)
    assert numbers(second) == [2]


def test_closing_that_still_waited_when_the_silo_left_is_made_good(desk: Any) -> None:
    """Its name is free already, and the worker would keep the session for ever."""
    worker, silo = with_session(desk)
    silo.says(prefill("s", 2))
    silo.says(prefill("s", 3))
    silo.says(CloseSession(id=4, session="s"))
    worker.read()
    silo.leaves()
    assert worker.read() == [Gone(name="north")]
    assert desk.load(worker) == 0


def test_a_worker_on_a_new_connection_starts_with_all_its_credit(desk: Any) -> None:
    worker, silo = with_session(desk)
    silo.says(prefill("s", 2))
    silo.says(prefill("s", 3))
    worker.read()
    worker.reattaches()
    assert numbers(worker) == [0, 3], "a welcome first"
    worker.says(Result(id=2), peer=silo.alias)
    assert under_way(desk, worker) == (10, 0)
    worker.says(Result(id=3), peer=silo.alias)
    assert under_way(desk, worker) == (0, 0)
    error, answer = silo.read()
    assert (error.id, error.code) == (2, "unavailable"), "it may have been lost"
    assert answer == Result(id=3)


def test_a_worker_that_attaches_twice_on_one_connection_has_what_it_had(desk: Any) -> None:
    worker, silo = with_session(desk)
    silo.says(prefill("s", 2))
    silo.says(prefill("s", 3))
    worker.says(worker.attach)
    assert under_way(desk, worker) == (10, 1)


def test_answers_twice_or_too_early_give_nothing(desk: Any) -> None:
    worker, silo = with_session(desk)
    silo.says(prefill("s", 2))
    silo.says(prefill("s", 3, tokens=4))
    worker.says(Result(id=3), peer=silo.alias)  # It has not been asked yet.
    assert silo.read() == []
    assert under_way(desk, worker) == (10, 1)
    worker.says(Result(id=2), peer=silo.alias)
    worker.says(Result(id=2), peer=silo.alias)
    assert numbers(silo) == [2]
    assert under_way(desk, worker) == (4, 0)


def test_a_worker_that_drains_gets_nothing_new_and_keeps_what_it_has(desk: Any) -> None:
    leaving, silo, other = desk.worker("leaving"), desk.silo(), desk.silo("other")
    silo.opens("s", 1)
    silo.joins("r", 2)
    leaving.read()
    leaving.says(Drain(id=7))
    assert leaving.read() == [Drain(id=7)]
    silo.opens("t", 3)
    error = silo.reads_error()
    assert (error.id, error.code, error.side) == (3, "unavailable", "worker")
    assert "trunkline worker" in error.hint
    staying = desk.worker("staying")
    for number, name in enumerate("tuv", 4):
        silo.opens(name, number)
    other.joins("q", 1)
    assert {type(header) for header in staying.read()} == {OpenSession, OpenRun}
    silo.extends("s", 8)
    other.joins("r", 2)
    other.says(Forward(id=3, run="r", microbatch=0, lengths=(1,)))
    assert numbers(leaving) == [8, 2, 3], "a run that it has is not a new one"
    assert staying.read() == []


def test_draining_ends_when_all_is_closed(desk: Any) -> None:
    leaving, silo = desk.worker("leaving"), desk.silo()
    silo.opens("s", 1)
    silo.joins("r", 2)
    leaving.says(Drain())
    leaving.reattaches()
    silo.read()
    silo.says(CloseSession(id=3, session="s"))
    silo.says(CloseRun(id=4, run="r"))
    assert desk.load(leaving) == 0
    leaving.says(Done(id=3), peer=silo.alias)
    silo.opens("s", 5)
    assert [header.id for header in silo.read()] == [3, 5], "it still drains, on a new connection too"
    leaving.leaves()
    leaving.says(leaving.attach)
    silo.opens("s", 6)
    assert desk.load(leaving) == 1


def test_a_silo_does_not_drain(desk: Any) -> None:
    silo = desk.silo()
    silo.says(Drain(id=3))
    error = silo.reads_error()
    assert (error.id, error.code) == (3, "protocol")
