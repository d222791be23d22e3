"""The router's decisions, one by one, without sockets. `test_router_machine.py` mixes them."""

from collections.abc import Callable
from typing import Any

import pytest

from broker.parcel import Parcel
from codec.errors import LinkError
from codec.messages import (
    Attach,
    CloseRun,
    CloseSession,
    Done,
    Error,
    Extend,
    Forward,
    GetAdapter,
    Gone,
    Heartbeat,
    Leave,
    Opened,
    Result,
    Welcome,
)
from codec.plan import ModelCard

OTHER_MODEL = ModelCard(name="other", fingerprint="g", blocks=6, hidden=4)


def test_attach_is_answered_with_a_welcome(new_desk: Callable[..., Any], introduce: Any) -> None:
    desk = new_desk(heartbeat=0.25)
    party = desk.party(introduce("silo"))
    assert party.read() == [Welcome(heartbeat=0.25)]
    assert desk.router.peers[party.route].name == "north"


def test_a_stranger_is_told_to_attach(desk: Any, introduce: Any) -> None:
    party = desk.silo()
    party.leaves()
    for header in (Heartbeat(), Leave(), Result(id=3)):
        party.says(header)
        error = party.reads_error()
        assert (error.id, error.code, error.side) == (0, "link", "broker")
        assert "not attached" in error.what


def test_a_strangers_request_is_answered_too(desk: Any) -> None:
    """Else the silo would wait for it until its deadline."""
    party = desk.silo()
    party.leaves()
    party.extends("s", 7)
    link, request = party.read()
    assert (link.id, link.code) == (0, "link")
    assert (request.id, request.code, request.side) == (7, "unavailable", "broker")


def test_a_goodbye_is_answered_last(desk: Any) -> None:
    """So that whoever says it knows that all it said before was read."""
    silo = desk.silo()
    silo.opens("s", 1)
    silo.says(Leave())
    error, leave = silo.read()
    assert (error.id, error.code) == (1, "nobody")
    assert leave == Leave()
    assert not desk.router.peers


def test_a_heartbeat_is_answered(desk: Any) -> None:
    party = desk.silo()
    party.says(Heartbeat())
    assert party.read() == [Heartbeat()]


@pytest.mark.parametrize(
    "header", [Result(id=4), Opened(id=4), Gone(id=4, name="x"), Welcome(id=4, heartbeat=1.0)]
)
def test_a_silo_may_not_speak_as_worker_or_broker(desk: Any, header: Any) -> None:
    silo = desk.silo()
    silo.says(header)
    error = silo.reads_error()
    assert (error.id, error.code, error.side) == (4, "protocol", "silo")
    assert "a silo may not" in error.what


def test_a_worker_may_not_speak_as_silo(desk: Any) -> None:
    worker, other = desk.worker("w"), desk.worker("v")
    worker.extends("s", 4)
    error = worker.reads_error()
    assert (error.id, error.code, error.side) == (4, "protocol", "worker")
    assert other.read() == []


@pytest.mark.parametrize("fields", [{"model": None}, {"start": 3, "stop": 3}, {"stop": 7}])
def test_a_worker_without_a_span_is_refused(desk: Any, introduce: Any, fields: dict[str, Any]) -> None:
    party = desk.party(introduce("worker", **fields))
    error = party.reads_error()
    assert (error.code, error.side) == ("mismatch", "worker")
    assert not desk.router.peers


def test_a_silo_hears_what_workers_read_and_gets_one_that_reads_what_it_sends(
    desk: Any, introduce: Any
) -> None:
    old, new = desk.worker("old", encodings=("raw", "planes")), desk.worker("new")
    silo = desk.party(introduce("silo"))
    (welcome,) = silo.read()
    assert welcome.encodings == ("raw", "planes")
    silo.opens("s", 1, encodings=("raw", "steps"))
    silo.joins("r", 2, encodings=("raw", "blocks"))
    assert [header.id for header in new.read()] == [1, 2]
    assert old.read() == []
    new.leaves()
    silo.read()
    silo.opens("t", 3, encodings=("raw", "steps"))
    error = silo.reads_error()
    assert (error.id, error.code, error.side) == (3, "mismatch", "worker")
    assert "reads all of raw, steps" in error.what


@pytest.mark.parametrize("role", ["silo", "worker"])
def test_who_does_not_read_the_plain_encodings_is_refused(desk: Any, introduce: Any, role: str) -> None:
    party = desk.party(introduce(role, encodings=("steps",)))
    error = party.reads_error()
    assert (error.code, error.side) == ("mismatch", role)
    assert not desk.router.peers


def test_a_session_stays_with_its_worker(desk: Any) -> None:
    workers, silo = [desk.worker("a"), desk.worker("b")], desk.silo()
    for number, name in enumerate("stuv", 1):
        silo.opens(name, number)
    opened_at = {h.session: w for w in workers for h in w.read()}
    assert [desk.load(worker) for worker in workers] == [2, 2]
    for number, name in enumerate("stuv" * 3, 10):
        silo.extends(name, number)
        ((header,),) = [headers for w in workers if (headers := w.read())]
        assert (header.id, header.session) == (number, name)
        silo.extends(name, number + 100)
        assert [h.id for h in opened_at[name].read()] == [number + 100]


def test_a_run_has_one_home_for_all_silos(desk: Any) -> None:
    workers = [desk.worker("a"), desk.worker("b")]
    silos = [desk.silo("north"), desk.silo("south")]
    for number, silo in enumerate(silos, 1):
        silo.joins("r", number)
    assert sorted(len(worker.inbox) for worker in workers) == [0, 2]
    assert sorted(map(desk.load, workers)) == [0, 1]
    home = next(worker for worker in workers if worker.inbox)
    assert [parcel.peer for parcel in home.inbox] == [silo.alias for silo in silos]
    home.read()
    for silo in silos:
        silo.says(Forward(id=9, run="r", microbatch=0, lengths=(1,)))
    assert len(home.read()) == 2


def test_tensors_pass_untouched_and_the_secret_identity_does_not(desk: Any) -> None:
    worker, silo = desk.worker(), desk.silo()
    silo.opens("s", 1)
    worker.read()
    frames = (b"\x00" * 7, b"", b"abc")
    silo.says(Extend(id=2, session="s", rows=(0,), starts=(0,), lengths=(1,)), frames, peer=b"somebody")
    (parcel,) = worker.inbox
    assert parcel.tensors == frames
    assert parcel.peer == silo.alias != silo.attach.peer
    worker.says(Result(id=2), frames, peer=silo.alias)
    (back,) = silo.inbox
    assert (back.peer, back.tensors, back.header) == (b"", frames, Result(id=2))


def test_a_failing_open_releases_the_name(desk: Any) -> None:
    worker, silo = desk.worker(), desk.silo()
    for number, open_, use in ((1, silo.opens, silo.extends), (5, silo.joins, forward(silo))):
        open_("x", number)
        assert desk.load(worker) == 1
        worker.says(failed(number), peer=silo.alias)
        assert desk.load(worker) == 0
        assert silo.reads_error().code == "limit"
        use("x", number + 1)
        assert silo.reads_error().code == "unknown-name"
        open_("x", number + 2)
        assert desk.load(worker) == 1
        worker.says(Opened(id=number + 2), peer=silo.alias)
        assert silo.read() == [Opened(id=number + 2)]
        worker.read()
        use("x", number + 3)
        assert [h.id for h in worker.read()] == [number + 3]
        silo.says(CloseSession(id=90, session="x") if number == 1 else CloseRun(id=91, run="x"))
        assert desk.load(worker) == 0


def test_an_open_that_fails_does_not_close_what_is_open(desk: Any) -> None:
    """A worker that refuses to open a name again leaves the session or membership as it was."""
    worker, silo = desk.worker(), desk.silo()
    for number, open_, use in ((1, silo.opens, silo.extends), (5, silo.joins, forward(silo))):
        open_("x", number)
        worker.says(Opened(id=number), peer=silo.alias)
        open_("x", number + 1)
        worker.says(failed(number + 1), peer=silo.alias)
        silo.read(), worker.read()
        use("x", number + 2)
        assert [h.id for h in worker.read()] == [number + 2]
    assert desk.load(worker) == 2


def test_of_two_opens_the_one_that_succeeds_counts(desk: Any) -> None:
    worker, silo = desk.worker(), desk.silo()
    silo.opens("s", 1)
    silo.opens("s", 2)
    worker.says(failed(1), peer=silo.alias)
    worker.says(Opened(id=2), peer=silo.alias)
    worker.read()
    silo.extends("s", 3)
    assert [h.id for h in worker.read()] == [3]
    assert desk.load(worker) == 1


def test_two_opens_that_fail_release_the_name_once(desk: Any) -> None:
    worker, silo = desk.worker(), desk.silo()
    for number in (1, 2):
        silo.opens("s", number)
    for number in (1, 2):
        worker.says(failed(number), peer=silo.alias)
    assert desk.load(worker) == 0


def test_an_old_open_that_fails_late_does_not_take_the_new_name(desk: Any) -> None:
    worker, silo = desk.worker("a"), desk.silo()
    silo.opens("s", 1)
    silo.says(CloseSession(id=2, session="s"))
    other = desk.worker("b")
    silo.opens("t", 3)  # the name "s" goes to the other worker next
    silo.opens("s", 4)
    assert [h.id for h in other.read()] == [4]
    worker.says(failed(1), peer=silo.alias)
    silo.extends("s", 5)
    assert [h.id for h in other.read()] == [5]
    assert (desk.load(worker), desk.load(other)) == (1, 1)


def test_silos_that_join_a_run_at_once_do_not_disturb_one_another(desk: Any) -> None:
    worker, north, south = desk.worker(), desk.silo("north"), desk.silo("south")
    north.joins("r", 1)
    south.joins("r", 1)
    worker.says(failed(1), peer=north.alias)
    worker.says(Opened(id=1), peer=south.alias)
    assert desk.load(worker) == 1
    worker.read(), north.read(), south.read()
    forward(south)("r", 2)
    forward(north)("r", 2)
    assert [parcel.peer for parcel in worker.inbox] == [south.alias]
    assert north.reads_error().code == "unknown-name"
    south.says(CloseRun(id=3, run="r"))
    assert desk.load(worker) == 0


def test_the_last_silo_to_close_a_run_frees_it(desk: Any) -> None:
    worker, silos = desk.worker(), [desk.silo("north"), desk.silo("south")]
    for silo in silos:
        silo.joins("r", 1)
        worker.says(Opened(id=1), peer=silo.alias)
    silos[0].says(CloseRun(id=2, run="r"))
    assert desk.load(worker) == 1
    silos[1].says(CloseRun(id=2, run="r"))
    assert desk.load(worker) == 0


def test_anothers_names_and_names_of_nobody_look_alike(desk: Any) -> None:
    desk.worker()
    owner, stranger = desk.silo("owner"), desk.silo("stranger")
    owner.opens("secret", 1)
    owner.joins("secret-run", 2)
    for known, unknown in (("secret", "s-cret"), ("secret-run", "s-cret-run")):
        answers = []
        for name in (known, unknown):
            for request in (
                Extend(id=1, session=name, rows=(0,), starts=(0,), lengths=(1,)),
                CloseSession(id=1, session=name),
                Forward(id=1, run=name, microbatch=0, lengths=(1,)),
                GetAdapter(id=1, run=name),
                CloseRun(id=1, run=name),
            ):
                stranger.says(request)
                error = stranger.reads_error()
                answers.append((error.code, error.what.replace(name, "NAME"), error.side, error.hint))
        assert set(answers) == {("unknown-name", answers[0][1], "silo", "")}


def test_two_silos_may_use_one_session_name(desk: Any) -> None:
    worker, silos = desk.worker(), [desk.silo("north"), desk.silo("south")]
    for silo in silos:
        silo.opens("s", 1)
    assert [parcel.peer for parcel in worker.inbox] == [silo.alias for silo in silos]
    silos[0].says(CloseSession(id=2, session="s"))
    worker.read()
    silos[1].extends("s", 2)
    assert len(worker.read()) == 1


def test_a_number_that_is_on_its_way_is_refused(desk: Any) -> None:
    worker, silo = desk.worker(), desk.silo()
    silo.opens("s", 1)
    silo.extends("s", 2)
    worker.read()
    silo.extends("s", 2)
    error = silo.reads_error()
    assert (error.id, error.code, error.side) == (2, "protocol", "silo")
    assert worker.read() == []
    worker.says(Result(id=2), peer=silo.alias)
    assert silo.read() == [Result(id=2)]
    silo.extends("s", 2)
    assert [h.id for h in worker.read()] == [2]


def test_a_request_needs_a_number(desk: Any) -> None:
    """0 stands for the connection itself: its answer could not be told from an error of the link."""
    worker, silo = desk.worker(), desk.silo()
    silo.opens("s", 0)
    error = silo.reads_error()
    assert (error.id, error.code, error.side) == (0, "protocol", "silo")
    assert worker.read() == []


def test_a_quota_of_requests(new_desk: Callable[..., Any]) -> None:
    desk = new_desk(requests=2)
    worker, silo, other = desk.worker(), desk.silo(), desk.silo("other")
    silo.opens("s", 1)
    silo.extends("s", 2)
    silo.extends("s", 3)
    error = silo.reads_error()
    assert (error.id, error.code, error.side) == (3, "limit", "silo")
    assert "2 requests" in error.what
    assert "--window" in error.hint
    other.opens("s", 1)
    assert [h.id for h in worker.read()] == [1, 2, 1]
    worker.says(Opened(id=1), peer=silo.alias)
    silo.extends("s", 3)
    assert [h.id for h in worker.read()] == [3]


def test_a_quota_of_bytes(new_desk: Callable[..., Any]) -> None:
    desk = new_desk(bytes=100)
    worker, silo = desk.worker(), desk.silo()
    silo.opens("s", 1)
    silo.extends("s", 2, [b"x" * 60])
    worker.read()
    silo.extends("s", 3, [b"x" * 30, b"x" * 11])
    error = silo.reads_error()
    assert (error.id, error.code, error.side) == (3, "limit", "silo")
    assert "60 bytes" in error.what
    silo.extends("s", 4, [b"x" * 40])
    assert [h.id for h in worker.read()] == [4]
    worker.says(Result(id=2), peer=silo.alias)
    silo.extends("s", 5, [b"x" * 60])
    assert [h.id for h in worker.read()] == [5]


def test_a_request_over_the_whole_quota_is_told_so(new_desk: Callable[..., Any]) -> None:
    desk = new_desk(bytes=100)
    desk.worker()
    silo = desk.silo()
    silo.opens("s", 1)
    silo.extends("s", 2, [b"x" * 101])
    error = silo.reads_error()
    assert (error.code, error.side) == ("limit", "silo")
    assert "101 bytes" in error.what
    assert "--batch" in error.hint


@pytest.mark.parametrize("how", ["leaves", "is lost", "falls silent"])
def test_a_workers_death_is_told_to_all_who_wait_and_once(desk: Any, how: str) -> None:
    worker, other = desk.worker("w"), desk.worker("v", start=0, stop=3)
    silos = [desk.silo("north"), desk.silo("south"), desk.silo("idle")]
    for silo in silos[:2]:
        silo.opens("s", 1)
        worker.says(Opened(id=1), peer=silo.alias)
        silo.read()
        silo.extends("s", 2, [b"12345"])
        silo.joins("r", 3)
    silos[1].opens("elsewhere", 4, start=1, stop=2)
    assert [h.id for h in other.read()] == [4]
    die(desk, worker, how)
    for silo, expected in zip(silos, ({2, 3}, {2, 3}, set()), strict=True):
        errors = [h for h in silo.read() if not isinstance(h, Heartbeat)]
        assert {e.id for e in errors} == expected
        assert len(errors) == len(expected)
        assert {(e.code, e.side) for e in errors} <= {("unavailable", "worker")}
        assert all("'w' left" in e.what and "again" in e.hint for e in errors)
    assert other.read() == []
    desk.deliver(desk.router.lost(worker.route))
    assert not any(isinstance(h, Error) for silo in silos for h in silo.read())
    states = [desk.router.registry.silos[silo.alias] for silo in silos]
    assert [list(state.pending) for state in states] == [[], [4], []]
    assert [state.account.bytes for state in states] == [0, 0, 0]


def test_what_left_with_a_worker_is_told_until_it_is_opened_again(desk: Any) -> None:
    worker, silo, other = desk.worker("w"), desk.silo(), desk.silo("other")
    silo.opens("s", 1)
    silo.joins("r", 2)
    other.joins("r", 2)
    worker.leaves()
    silo.read(), other.read()
    for request in (
        Extend(id=3, session="s", rows=(0,), starts=(0,), lengths=(1,)),
        Forward(id=4, run="r", microbatch=0, lengths=(1,)),
    ):
        silo.says(request)
        error = silo.reads_error()
        assert (error.code, error.side) == ("unavailable", "worker")
        assert "'w' left" in error.what
    second = desk.worker("second")
    silo.opens("s", 5)
    silo.joins("r", 6)
    assert [h.id for h in second.read()] == [5, 6]
    assert desk.load(second) == 2
    # The other silo was in the run that is gone, not in the one of the same name.
    forward(other)("r", 7)
    assert other.reads_error().code == "unavailable"
    assert second.read() == []
    silo.says(CloseRun(id=8, run="r"))
    assert desk.load(second) == 1


def test_closing_what_left_with_a_worker_forgets_it(desk: Any) -> None:
    worker, silo = desk.worker(), desk.silo()
    silo.opens("s", 1)
    worker.leaves()
    silo.read()
    silo.says(CloseSession(id=2, session="s"))
    assert silo.reads_error().code == "unavailable"
    silo.says(CloseSession(id=3, session="s"))
    assert silo.reads_error().code == "unknown-name"


@pytest.mark.parametrize("how", ["leaves", "is lost", "falls silent"])
def test_a_silos_death_is_told_to_the_workers_that_hold_something(desk: Any, how: str) -> None:
    holds_session, holds_run = desk.worker("a", stop=3), desk.worker("b", start=3)
    held_once, never = desk.worker("c", start=1, stop=2), desk.worker("d", model=OTHER_MODEL)
    silo, other = desk.silo("north"), desk.silo("south")
    silo.opens("s", 1, start=0, stop=1)
    silo.joins("r", 2, start=3, stop=6)
    other.joins("r", 2, start=3, stop=6)
    silo.opens("t", 3, start=1, stop=2)
    keeper = held_once if held_once.inbox else holds_session
    silo.says(CloseSession(id=4, session="t"))
    workers = [holds_session, holds_run, held_once, never]
    for worker in workers:
        worker.read()
    die(desk, silo, how)
    gone = {worker.attach.name: worker.inbox[:] for worker in workers}
    for name in ("a", "b"):
        (parcel,) = [p for p in gone[name] if isinstance(p.header, Gone)]
        assert (parcel.header, parcel.peer) == (Gone(name="north"), silo.alias)
    assert any(isinstance(p.header, Gone) for p in gone["c"]), "it has yet to answer the goodbye to its own"
    assert not any(isinstance(p.header, Gone) for p in gone["d"])
    assert keeper is held_once
    assert [desk.load(worker) for worker in workers] == [0, 1, 0, 0]
    assert not any(isinstance(h, Error) for h in other.read())


def test_a_dead_silos_runs_and_sessions_no_longer_count(desk: Any) -> None:
    worker, silo = desk.worker(), desk.silo()
    silo.joins("r", 1)
    silo.opens("s", 2)
    assert desk.load(worker) == 2
    silo.leaves()
    assert desk.load(worker) == 0


def test_what_was_lost_does_not_count_when_its_worker_comes_back(desk: Any) -> None:
    worker, silo, other = desk.worker(), desk.silo(), desk.silo("other")
    silo.opens("s", 1)
    silo.joins("r", 2)
    worker.leaves()
    worker.reattaches()
    assert desk.load(worker) == 0
    worker.read()
    other.joins("r", 1)
    silo.leaves()
    assert desk.load(worker) == 1
    assert [h.id for h in worker.read()] == [1]  # and no word of the silo that had nothing there
    other.says(CloseRun(id=2, run="r"))
    assert desk.load(worker) == 0


def test_silence_is_measured_from_any_sign_of_life(new_desk: Callable[..., Any]) -> None:
    desk = new_desk(silence=10.0)
    worker, silo = desk.worker(), desk.silo()
    for _ in range(4):
        desk.passes(6)
        worker.says(Heartbeat())
        silo.says(GetAdapter(id=1, run="none"))
    assert len(desk.router.peers) == 2
    desk.passes(10)
    assert len(desk.router.peers) == 2
    desk.passes(0.1)
    assert not desk.router.peers


def test_a_silo_that_attaches_again_keeps_what_it_has(desk: Any) -> None:
    worker, silo = desk.worker(), desk.silo()
    silo.opens("s", 1)
    worker.says(Opened(id=1), peer=silo.alias)
    silo.extends("s", 2)
    silo.read(), worker.read()
    old = silo.route
    silo.reattaches()
    assert silo.read() == [Welcome(heartbeat=1.0, resumed=True)]
    assert list(desk.router.peers) == [worker.route, silo.route]
    assert desk.router.lost(old) == []
    worker.says(Result(id=2), peer=silo.alias)
    assert silo.read() == [Result(id=2)]
    silo.extends("s", 3)
    assert [h.id for h in worker.read()] == [3]


def test_a_worker_that_attaches_again_keeps_what_it_has(desk: Any) -> None:
    worker, silo = desk.worker("a"), desk.silo()
    worker.says(Heartbeat())
    silo.opens("s", 1)
    silo.joins("r", 2)
    worker.reattaches()
    assert [h for h in worker.read() if isinstance(h, Welcome)] == [Welcome(heartbeat=1.0, resumed=True)]
    assert desk.load(worker) == 2
    silo.read()
    worker.says(Opened(id=1), peer=silo.alias)
    silo.extends("s", 3)
    assert [h.id for h in worker.read()] == [3]


def test_what_was_on_a_workers_broken_connection_is_not_waited_for(desk: Any) -> None:
    """Request or answer may be lost, and then nobody would ever say so."""
    worker, silo = desk.worker("a", credit=2), desk.silo()
    silo.opens("s", 1)
    worker.says(Opened(id=1), peer=silo.alias)
    silo.extends("s", 2)
    silo.extends("s", 3)
    silo.extends("s", 4)
    silo.read(), worker.read()
    worker.reattaches()
    errors = silo.read()
    assert [(error.id, error.code, error.side) for error in errors] == [
        (2, "unavailable", "broker"),
        (3, "unavailable", "broker"),
    ]
    assert [h.id for h in worker.read()] == [0, 4], "what still waited at the broker goes"
    worker.says(Result(id=2), peer=silo.alias)
    assert silo.read() == [], "it was answered already"
    worker.says(Result(id=4), peer=silo.alias)
    assert silo.read() == [Result(id=4)]


def test_a_name_whose_open_was_interrupted_is_what_the_worker_says_later(desk: Any) -> None:
    for willing in (True, False):
        worker, silo = desk.worker("a"), desk.silo()
        worker.says(Heartbeat())
        silo.opens("s", 1)
        worker.reattaches()
        silo.read(), worker.read()
        answer = Opened(id=1) if willing else Error(id=1, code="limit", what="no", side="worker")
        worker.says(answer, peer=silo.alias)
        assert silo.read() == []
        assert desk.load(worker) == willing
        silo.leaves()
        worker.leaves()


@pytest.mark.parametrize("role", ["silo", "worker"])
def test_who_may_not_have_read_its_welcome_hears_it_again(desk: Any, role: str) -> None:
    """Or it would never know that the broker before this one is gone, and what it had there."""
    peer = getattr(desk, role)()
    peer.reattaches()
    assert peer.read() == [Welcome(heartbeat=1.0)]
    peer.says(Heartbeat())
    peer.read()
    peer.reattaches()
    assert peer.read() == [Welcome(heartbeat=1.0, resumed=True)]
    assert len(desk.router.peers) == 1


def test_attaching_twice_on_one_connection_changes_nothing(desk: Any) -> None:
    worker, silo = desk.worker(), desk.silo()
    silo.opens("s", 1)
    for party in (worker, silo):
        party.read()
        party.says(party.attach)
        assert party.read() == [Welcome(heartbeat=1.0, resumed=True)]
    assert desk.load(worker) == 1
    assert len(desk.router.peers) == 2


def test_another_identity_on_a_connection_ends_the_first(desk: Any, introduce: Any) -> None:
    worker, silo = desk.worker(), desk.silo("first")
    silo.opens("s", 1)
    worker.read()
    silo.says(introduce("silo", "second"))
    assert worker.read() == [Gone(name="first")]
    assert silo.read() == [Welcome(heartbeat=1.0)]
    assert desk.load(worker) == 0
    silo.extends("s", 2)
    assert silo.reads_error().code == "unknown-name"
    assert [peer.name for peer in desk.router.peers.values()] == ["w", "second"]


def test_an_identity_keeps_its_role(desk: Any) -> None:
    worker, silo = desk.worker(), desk.silo()
    silo.opens("s", 1)
    worker.read()
    as_worker = Attach(
        id=5,
        role="worker",
        name="x",
        peer=silo.attach.peer,
        model=worker.attach.model,
        start=0,
        stop=6,
    )
    silo.says(as_worker)
    error = silo.reads_error()
    assert (error.id, error.code, error.side) == (5, "protocol", "worker")
    silo.extends("s", 2)
    assert [h.id for h in worker.read()] == [2]


def test_answers_that_nobody_waits_for_are_dropped(desk: Any) -> None:
    worker, silo = desk.worker(), desk.silo()
    silo.opens("s", 1)
    for answer in (Result(id=9), Error(id=0, code="protocol", what="the link is over", side="worker")):
        worker.says(answer, peer=silo.alias)
    worker.says(Opened(id=1), peer=b"nobody")
    assert silo.read() == []
    for _ in range(2):
        worker.says(Opened(id=1), peer=silo.alias)
    assert silo.read() == [Opened(id=1)]
    silo.leaves()
    worker.says(Done(id=1), peer=silo.alias)
    assert silo.read() == []


def test_only_the_worker_that_was_asked_may_answer(desk: Any) -> None:
    worker, silo = desk.worker("asked"), desk.silo()
    silo.opens("s", 1)
    liar = desk.worker("liar")
    liar.says(Opened(id=1), peer=silo.alias)
    assert silo.read() == []
    worker.says(Opened(id=1), peer=silo.alias)
    assert silo.read() == [Opened(id=1)]


def test_what_an_answer_cannot_be_does_not_pass(desk: Any) -> None:
    """A worker cannot speak in the broker's name."""
    worker, silo = desk.worker(), desk.silo()
    silo.opens("s", 1)
    for header in (Gone(name="x"), Welcome(heartbeat=1.0)):
        worker.says(header, peer=silo.alias)
        assert silo.read() == []


def test_a_span_that_runs_backwards_is_an_answer(desk: Any) -> None:
    desk.worker()
    silo = desk.silo()
    silo.opens("s", 1, start=4, stop=2)
    error = silo.reads_error()
    assert (error.id, error.code) == (1, "usage")


def die(desk: Any, party: Any, how: str) -> None:
    if how == "leaves":
        party.leaves()
    elif how == "is lost":
        desk.deliver(desk.router.lost(party.route))
    else:
        desk.now += 8
        for other in list(desk.parties.values()):
            if other is not party:
                other.says(Heartbeat())
                other.inbox.pop()
        desk.passes(8)
    assert party.route not in desk.router.peers


def failed(number: int) -> Error:
    return Error(id=number, code="limit", what="too much", side="worker")


def forward(silo: Any) -> Callable[[str, int], None]:
    return lambda name, number: silo.says(Forward(id=number, run=name, microbatch=0, lengths=(1,)))


def test_parcels_are_not_encoded_again(desk: Any) -> None:
    worker, silo = desk.worker(), desk.silo()
    silo.opens("s", 1)
    sent = Parcel.of(Extend(id=2, session="s", rows=(0,), starts=(0,), lengths=(1,)))
    worker.read()
    desk.take(silo.route, sent)
    assert worker.inbox[0].raw is sent.raw


def test_a_broker_that_ends_tells_every_peer_to_look_for_one(desk: Any) -> None:
    peers = [desk.worker(), desk.silo()]
    sends = desk.router.farewell()
    assert {send.route for send in sends} == {peer.route for peer in peers}
    for send in sends:
        assert (send.parcel.header.id, send.parcel.header.code) == (0, LinkError.code)
