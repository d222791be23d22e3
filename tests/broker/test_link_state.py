"""When a link attaches, beats, attaches again and gives up. The clock is a number."""

from typing import Any

import pytest

from broker.failover import Connect
from broker.keys import LinkKeys, SecretKey
from broker.link_state import Action, Deliver, Fail, LinkState, Transmit
from broker.parcel import Parcel
from codec.errors import LinkError, ProtocolError, RefusedError, UnavailableError
from codec.messages import (
    ENCODINGS,
    AnyHeader,
    Attach,
    CloseSession,
    Done,
    Error,
    Gone,
    Heartbeat,
    Leave,
    OpenSession,
    Result,
    Welcome,
)
from codec.plan import ModelCard

ENDPOINT = "tcp://127.0.0.1:7555"
SILO = Attach(role="silo", name="s", peer=bytes(16))
WORKER = Attach(
    role="worker",
    name="w",
    peer=bytes(16),
    model=ModelCard(name="m", fingerprint="f", blocks=6, hidden=4),
    start=0,
    stop=6,
)
NOT_ATTACHED = Error(id=0, code="link", what="this connection is not attached", side="broker")


def begun(attach: Attach = SILO, patience: float = 30.0) -> LinkState:
    return LinkState(attach, [ENDPOINT], patience, 0.0)


def attached(attach: Attach = SILO, *, heartbeat: float = 1.0, patience: float = 30.0) -> LinkState:
    """Welcome at second 0, with the first beat said."""
    state = begun(attach, patience)
    assert state.tick(0.0) == [Transmit(attach)]
    assert hears(state, Welcome(heartbeat=heartbeat), 0.0) == []
    assert state.attached
    (beat,) = state.tick(0.0)
    assert beat == Transmit(Heartbeat(id=1)), "the first beat, at once, measures the round trip"
    return state


def hears(state: LinkState, header: AnyHeader, now: float) -> list[Action]:
    return state.arrived(Parcel.of(header), now)


def test_it_attaches_and_tries_again() -> None:
    state = begun()
    said = [now for now in (i / 10 for i in range(21)) if state.tick(now) == [Transmit(SILO)]]
    assert said == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert not state.attached


def test_what_could_not_leave_is_said_again_at_once() -> None:
    state = begun()
    assert state.tick(0.0) == [Transmit(SILO)]
    state.unsent()
    assert state.tick(0.1) == [Transmit(SILO)]
    assert state.tick(0.2) == []


def test_patience_ends_with_an_error_that_says_where_and_what_to_do() -> None:
    state = begun(patience=3.0)
    assert all(not isinstance(action, Fail) for i in range(31) for action in state.tick(i / 10))
    (action,) = state.tick(3.1)
    assert isinstance(action, Fail)
    assert isinstance(action.error, LinkError)
    assert ENDPOINT in action.error.what
    assert "3 s" in action.error.what
    assert f"trunkline broker --listen {ENDPOINT}" in action.error.hint
    assert action.error.at == "broker"


def test_patience_begins_anew_with_every_loss() -> None:
    state = attached(patience=3.0)
    for now in range(1, 100):
        hears(state, Heartbeat(), float(now))
        state.tick(float(now))
    assert hears(state, NOT_ATTACHED, 100.0) == [Transmit(SILO)]
    assert not any(isinstance(a, Fail) for a in state.tick(103.0))
    assert isinstance(state.tick(103.1)[0], Fail)


@pytest.mark.parametrize("heartbeat", [0.25, 1.0, 2.0])
def test_it_beats_as_often_as_the_broker_asks(heartbeat: float) -> None:
    state = attached(heartbeat=heartbeat)
    beats = 0
    for i in range(1, 101):
        now = i / 10
        for action in state.tick(now):
            beats += 1
            assert action == Transmit(Heartbeat(id=beats + 1))
            assert hears(state, Heartbeat(id=beats + 1), now) == []
    assert beats == pytest.approx(10.0 / heartbeat, rel=0.25)
    assert state.attached


def test_two_heartbeats_without_a_byte_are_a_loss() -> None:
    state = attached()
    assert state.tick(2.0) == [Transmit(Heartbeat(id=2))]
    assert state.attached
    assert state.tick(2.1) == [Transmit(SILO)]
    assert not state.attached


def test_bytes_alone_do_for_ten_seconds() -> None:
    """The broker's machine answers pings; its program hangs."""
    state = attached()
    for i in range(1, 101):
        state.felt(i / 10)
        state.tick(i / 10)
        assert state.attached
    state.felt(10.1)
    assert state.tick(10.1) == [Transmit(SILO)]
    assert not state.attached


def test_any_message_is_a_sign_of_life() -> None:
    state = attached()
    for now in range(1, 30):
        hears(state, Result(id=now), float(now))
        state.tick(now + 0.5)
        assert state.attached


def test_a_slow_heartbeat_is_not_silence() -> None:
    state = attached(heartbeat=LinkState.SILENCE * 2)
    state.tick(LinkState.SILENCE * 4)
    assert state.attached


def test_a_connection_that_ends_is_a_loss_at_once() -> None:
    state = attached()
    assert state.unshaken("broken", 0.1) == [Transmit(SILO)]
    assert not state.attached
    assert state.unshaken("broken", 0.2) == []
    assert state.unshaken("unreachable", 0.2) == [], "with one broker it is waited for"


def test_not_attached_means_attach_again_and_once() -> None:
    state = attached()
    assert hears(state, NOT_ATTACHED, 1.0) == [Transmit(SILO)]
    assert not state.attached
    # One such answer comes for each message that was on its way.
    assert hears(state, NOT_ATTACHED, 1.0) == []
    assert state.tick(1.1) == []
    assert state.tick(1.6) == [Transmit(SILO)]
    assert hears(state, Welcome(heartbeat=1.0, resumed=True), 1.7) == []
    assert state.attached


@pytest.mark.parametrize("code", ["protocol", "mismatch", "limit"])
def test_any_other_error_of_the_connection_is_the_end(code: str) -> None:
    for state in (begun(), attached()):
        (action,) = hears(state, Error(id=0, code=code, what="no", side="silo", hint="do"), 1.0)
        assert isinstance(action, Fail)
        assert (action.error.code, action.error.what, action.error.hint) == (code, "no", "do")
        assert not isinstance(action.error, LinkError)


def test_errors_of_requests_are_the_owners() -> None:
    state = attached()
    for code in ("link", "protocol"):
        state.sent(CloseSession(id=3, session="s"), 0, 0.5)
        parcel = Parcel.of(Error(id=3, code=code, what="no", side="worker"))
        assert state.arrived(parcel, 1.0) == [Deliver(parcel)]
    assert state.attached


def test_answers_are_delivered_as_they_came() -> None:
    parcel = Parcel.of(Result(id=3), (b"x",), b"peer")
    state = attached()
    state.sent(CloseSession(id=3, session="s"), 0, 0.5)
    (action,) = state.arrived(parcel, 1.0)
    assert isinstance(action, Deliver)
    assert action.parcel is parcel


def test_a_broker_that_forgot_a_silo_will_not_answer_it() -> None:
    """The requests on their way are answered here: nobody else knows of them."""
    state = attached()
    for number in (1, 2, 3):
        state.sent(CloseSession(id=number, session="s"), 0, 0.0)
    state.sent(Leave(), 0, 0.0)
    hears(state, Done(id=2), 1.0)
    hears(state, NOT_ATTACHED, 2.0)
    errors = hears(state, Welcome(heartbeat=1.0), 2.1)
    assert [delivered(action).id for action in errors] == [1, 3]
    for action in errors:
        error = delivered(action)
        assert (error.code, error.side) == (UnavailableError.code, "broker")
        assert "restarted" in error.what
        assert error.hint
    hears(state, NOT_ATTACHED, 3.0)
    assert hears(state, Welcome(heartbeat=1.0), 3.1) == []


def test_a_broker_that_remembers_still_answers() -> None:
    state = attached()
    state.sent(CloseSession(id=1, session="s"), 0, 0.0)
    hears(state, NOT_ATTACHED, 2.0)
    assert hears(state, Welcome(heartbeat=1.0, resumed=True), 2.1) == []


def test_the_first_welcome_loses_nothing() -> None:
    for attach in (SILO, WORKER):
        state = begun(attach)
        state.tick(0.0)
        assert hears(state, Welcome(heartbeat=1.0), 0.1) == []


def test_a_repeated_welcome_loses_nothing() -> None:
    state = attached()
    state.sent(CloseSession(id=1, session="s"), 0, 0.0)
    assert hears(state, Welcome(heartbeat=1.0), 0.2) == []


def test_a_forgotten_worker_frees_what_every_silo_held() -> None:
    state = attached(WORKER)
    hears(state, NOT_ATTACHED, 2.0)
    (action,) = hears(state, Welcome(heartbeat=1.0), 2.1)
    assert isinstance(action, Deliver)
    assert isinstance(action.parcel.header, Gone)
    assert action.parcel.peer == b""


def test_a_fresh_open_counts_as_on_its_way() -> None:
    state = attached()
    card = ModelCard(name="m", fingerprint="f", blocks=6, hidden=4)
    state.sent(OpenSession(id=8, session="s", model=card, start=0, stop=6, rows=1, capacity=1), 0, 0.0)
    hears(state, NOT_ATTACHED, 2.0)
    (action,) = hears(state, Welcome(heartbeat=1.0), 2.1)
    assert delivered(action).id == 8


def test_that_protocol_errors_rise_again_as_such() -> None:
    (action,) = hears(attached(), Error(id=0, code="protocol", what="no", side="broker"), 1.0)
    assert isinstance(action, Fail)
    assert isinstance(action.error, ProtocolError)
    assert action.error.at == "broker"


def delivered(action: Any) -> Error:
    assert isinstance(action, Deliver)
    assert isinstance(action.parcel.header, Error)
    return action.parcel.header


def test_a_large_message_is_chased_by_a_heartbeat_that_times_it() -> None:
    state = begun()
    state.tick(0.0)
    hears(state, Welcome(heartbeat=1.0), 0.08)
    assert state.meter.speed is None
    state.tick(1.0)
    assert hears(state, Heartbeat(id=1), 1.05) == []
    assert state.sent(CloseSession(id=1, session="s"), 100, 1.1) == []
    (action,) = state.sent(CloseSession(id=2, session="s"), 1_000_000, 1.1)
    assert action == Transmit(Heartbeat(id=2))
    assert hears(state, Heartbeat(id=2), 1.25) == []
    assert state.meter.speed is not None
    assert state.meter.speed.rtt == pytest.approx(0.05)
    assert state.meter.speed.rate == pytest.approx(1_000_000 / 0.1)


def test_what_workers_read_is_known_from_the_welcome() -> None:
    state = begun()
    assert state.encodings == ENCODINGS
    hears(state, Welcome(heartbeat=1.0, encodings=("raw",)), 0.0)
    assert state.encodings == ("raw",)


OWN = SecretKey("silo", "north", "JTKVSB%%)wK0E.X)V>+}o?pNmC{O&4W4b!Ni{Lh6")
KEYS = LinkKeys(OWN, "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7")


def keyed() -> LinkState:
    return LinkState(SILO, [ENDPOINT], 30.0, 0.0, KEYS)


def why(actions: list[Action]) -> str:
    (action,) = actions
    assert isinstance(action, Fail)
    assert isinstance(action.error, RefusedError)
    assert ENDPOINT in action.error.what
    assert action.error.hint
    return str(action.error)


def test_a_refusal_is_final_and_names_the_command_that_helps() -> None:
    told = why(keyed().unshaken("refused", 0.1))
    assert f"trunkline keys allow '{OWN.public.key}' --role silo --name north" in told
    assert OWN.secret not in told


def test_sides_that_do_not_both_use_keys_are_told() -> None:
    assert "uses no keys" in why(keyed().unshaken("mechanism", 0.1))
    assert "Give --key" in why(begun().unshaken("mechanism", 0.1))


def test_a_handshake_that_is_cut_off_for_long_is_the_brokers_key() -> None:
    state = keyed()
    times = [i * 0.25 for i in range(20)]
    first = next(now for now in times if state.unshaken("cut", now))
    assert LinkState.CUT <= first <= LinkState.CUT + 0.25
    assert "--broker-key" in why(state.unshaken("cut", first + 0.25))


def test_handshakes_cut_off_now_and_then_are_not() -> None:
    """A broker that is being restarted, say."""
    state = keyed()
    assert all(not state.unshaken("cut", now) for now in (0.0, 0.5, 1.0, 3.0, 4.0, 6.0, 7.0))


def test_a_broker_that_was_reached_has_the_right_key() -> None:
    state = keyed()
    hears(state, Welcome(heartbeat=1.0), 0.0)
    assert not any(state.unshaken("cut", i * 0.25) for i in range(40))


def test_without_keys_it_waits_for_a_broker_that_is_not_there_yet() -> None:
    """As behind a tunnel, which takes the connection and drops it."""
    assert not any(begun().unshaken("cut", i * 0.25) for i in range(40))


OTHER = "tcp://127.0.0.1:7556"


def of_two(attach: Attach = SILO) -> LinkState:
    """Attached at the first of two brokers since second 0."""
    state = LinkState(attach, [ENDPOINT, OTHER], 30.0, 0.0)
    state.tick(0.0)
    hears(state, Welcome(heartbeat=1.0), 0.0)
    state.tick(0.0)
    return state


def test_what_a_broken_connection_may_have_lost_is_answered_at_once() -> None:
    state = attached()
    state.sent(CloseSession(id=7, session="s"), 0, 0.0)
    knock, lost = state.unshaken("broken", 1.0)
    assert knock == Transmit(SILO)
    assert (delivered(lost).id, delivered(lost).code) == (7, "unavailable")
    assert hears(state, Welcome(heartbeat=1.0, resumed=True), 1.2) == [], "once, and the rest is still there"


def test_of_two_brokers_the_other_is_used_when_nobody_listens_at_the_first() -> None:
    state = of_two()
    state.sent(CloseSession(id=7, session="s"), 0, 0.5)
    assert state.unshaken("broken", 1.0)[0] == Transmit(SILO), "it may be back at once"
    assert state.tick(1.1) == []
    assert state.unshaken("unreachable", 1.2) == []
    assert state.tick(1.2) == [Connect(OTHER)]
    assert state.tick(1.3) == [Transmit(SILO)], "with the same identity"
    assert hears(state, Welcome(heartbeat=1.0), 1.4) == []
    assert state.attached


def test_of_two_brokers_the_other_is_used_when_the_first_is_silent() -> None:
    state = of_two()
    state.sent(CloseSession(id=7, session="s"), 0, 0.5)
    assert state.tick(2.1) == [Transmit(SILO)]
    moved, lost = state.tick(2.2)
    assert moved == Connect(OTHER)
    assert (delivered(lost).id, delivered(lost).code) == (7, "unavailable")
    assert "another one is tried" in delivered(lost).what
    assert hears(state, Welcome(heartbeat=1.0), 2.4) == []


def test_a_broker_without_workers_is_left_only_if_there_is_another() -> None:
    state = attached()
    assert state.elsewhere(10.0) == []
    assert state.attached
    state = of_two()
    assert state.elsewhere(1.0) == [], "workers may be on their way to one that was only just come to"
    assert state.elsewhere(2.5) == [Connect(OTHER)]
    assert not state.attached
    assert state.elsewhere(2.6) == [], "it is on its way already"


def test_a_key_that_one_of_two_brokers_refuses_may_be_good_for_the_other() -> None:
    state = LinkState(SILO, [ENDPOINT, OTHER], 30.0, 0.0, KEYS)
    state.tick(0.0)
    assert state.unshaken("refused", 0.1) == []
    assert state.tick(0.1) == [Connect(OTHER)]
    assert state.unshaken("refused", 0.2) == []
    (end,) = state.tick(0.2)
    assert isinstance(end, Fail)
    assert isinstance(end.error, RefusedError)
    assert OTHER in end.error.what


def test_an_answer_whose_request_failed_already_is_nobodys() -> None:
    state = attached()
    state.sent(CloseSession(id=3, session="s"), 0, 0.5)
    failed = [delivered(a).id for a in state.unshaken("broken", 1.0) if isinstance(a, Deliver)]
    assert failed == [3]
    hears(state, Welcome(heartbeat=1.0, resumed=True), 1.1)
    assert hears(state, Done(id=3), 1.2) == []
