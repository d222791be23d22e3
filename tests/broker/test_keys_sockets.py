"""Brokers with keys over real sockets: who gets in, who does not, and what each is told."""

import logging
import select
import socket
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import zmq

from broker.key_files import link_keys, make_key, read_public
from broker.keyring import KeyRing, allow, revoke
from broker.keys import LinkKeys, PublicKey
from broker.link import ZmqLink
from broker.parcel import Parcel
from codec.errors import LinkError, RefusedError, UsageError
from codec.messages import CloseSession, Error, Gone, Opened, Result, Welcome, decode_header, encode_header

Keys = Callable[..., LinkKeys]


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A broker's key directory."""
    make_key(tmp_path / "hub", "broker", "hub")
    return tmp_path / "hub"


@pytest.fixture
def ring(hub: Path) -> KeyRing:
    return KeyRing(hub)


@pytest.fixture
def pair(hub: Path, tmp_path: Path) -> Keys:
    """`pair("silo", "north")`: keys of an allowed peer; of an unknown one with `let_in=False`."""
    homes = count()

    def make(role: Any, name: str, *, let_in: bool = True) -> LinkKeys:
        secret, public = make_key(tmp_path / f"home{next(homes)}", role, name)
        if let_in:
            allow(hub, read_public(public))
        keys = link_keys(secret, str(hub / "hub.public"), role)
        assert keys is not None
        return keys

    return make


@pytest.fixture
def world(start_broker: Any, ring: KeyRing, pair: Keys, connect: Any, introduce: Any) -> Any:
    """A broker with keys and a worker that echoes, both on loopback."""
    running = start_broker(keys=ring)
    worker = connect(running.endpoint, introduce("worker"), keys=pair("worker", "gpu1"))
    running.worker = worker
    return running


@pytest.fixture
def echoed(ask: Any, opened: Any, extending: Any) -> Any:
    """`echoed(silo, world, numbers)`: a request and its answer."""

    def check(silo: ZmqLink, world: Any, session: str, number: int) -> None:
        silo.send(Parcel.of(extending(session, number), [b"x" * 1000]))
        request = world.worker.receive(10)
        world.worker.send(Parcel.of(Result(id=number), request.tensors, request.peer))
        answer = silo.receive(10)
        assert answer is not None
        assert isinstance(answer.header, Result), answer.header
        assert [bytes(buffer) for buffer in answer.buffers()] == [b"x" * 1000]

    return check


@pytest.fixture
def opens(world: Any, opening: Any, until: Any) -> Any:
    """`opens(silo, name, number)`: a session that the worker opened."""

    def call(silo: ZmqLink, name: str, number: int) -> None:

        until(lambda: any(peer.role == "worker" for peer in world.server.router.peers.values()))
        silo.send(Parcel.of(opening(name, id=number)))
        request = world.worker.receive(10)
        world.worker.send(Parcel.of(Opened(id=request.header.id), peer=request.peer))
        answer = silo.receive(10)
        assert answer is not None
        assert isinstance(answer.header, Opened), answer.header

    return call


def warnings(caplog: pytest.LogCaptureFixture) -> list[Any]:
    """What the broker complained about; another test may have turned its other lines on."""
    return [record for record in caplog.records if record.levelno == logging.WARNING]


def fate(link: ZmqLink, within: float = 5.0) -> Exception:
    """What the link ends with; far sooner than its patience does."""
    begun = time.monotonic()
    with pytest.raises((RefusedError, LinkError)) as caught:
        link.receive(within + 1)
    assert time.monotonic() - begun < within
    return caught.value


def test_who_is_allowed_gets_in_and_tensors_cross(
    world: Any, pair: Keys, connect: Any, introduce: Any, opens: Any, echoed: Any
) -> None:
    silo = connect(world.endpoint, introduce("silo", "called so by itself"), keys=pair("silo", "north"))
    opens(silo, "s", 1)
    echoed(silo, world, "s", 2)
    names = {peer.role: peer.name for peer in world.server.router.peers.values()}
    assert names == {"silo": "north", "worker": "gpu1"}, "the key's name, not what it calls itself"


def test_a_key_that_is_not_allowed_hears_so_at_once(
    world: Any, pair: Keys, connect: Any, introduce: Any, until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    keys = pair("silo", "stranger", let_in=False)
    with caplog.at_level(logging.WARNING, "trunkline"):
        error = fate(connect(world.endpoint, introduce("silo"), keys=keys))
        until(lambda: warnings(caplog))
    assert isinstance(error, RefusedError)
    assert "refused this key, 'stranger'" in error.what
    assert f"trunkline keys allow '{keys.own.public.key}' --role silo --name stranger" in error.hint
    (record,) = warnings(caplog)
    assert record.message == "key refused"
    assert record.facts == {"key": keys.own.public.key, "address": "127.0.0.1"}


def test_it_gets_in_once_it_is_allowed(
    world: Any, hub: Path, pair: Keys, connect: Any, introduce: Any, opens: Any
) -> None:
    keys = pair("silo", "late", let_in=False)
    fate(connect(world.endpoint, introduce("silo"), keys=keys))
    allow(hub, keys.own.public)
    opens(connect(world.endpoint, introduce("silo"), keys=keys), "s", 1)


def test_another_brokers_key_is_told_apart(
    world: Any, pair: Keys, connect: Any, introduce: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The broker cannot be impersonated: a link talks to the holder of that key and to nobody else."""
    good = pair("silo", "north")
    wrong = LinkKeys(good.own, good.own.public.key)
    with caplog.at_level(logging.WARNING, "trunkline"):
        error = fate(connect(world.endpoint, introduce("silo"), keys=wrong))
    assert isinstance(error, RefusedError)
    assert "has not the key that --broker-key names" in error.what
    assert "trunkline keys list" in error.hint
    first = warnings(caplog)[0]
    assert first.message == "a peer could not connect"
    assert first.facts == {"why": "it has another public key for this broker"}


def test_no_key_at_a_broker_with_keys(world: Any, connect: Any, introduce: Any) -> None:
    error = fate(connect(world.endpoint, introduce("worker")))
    assert isinstance(error, RefusedError)
    assert "lets in only who has a key" in error.what
    assert error.at == "worker"
    assert "--key and --broker-key" in error.hint


def test_a_key_at_a_broker_without_keys(start_broker: Any, pair: Keys, connect: Any, introduce: Any) -> None:
    error = fate(connect(start_broker().endpoint, introduce("silo"), keys=pair("silo", "north")))
    assert isinstance(error, RefusedError)
    assert "uses no keys" in error.what
    assert "--keys DIR" in error.hint


@pytest.mark.parametrize(("has", "wants"), [("silo", "worker"), ("worker", "silo")])
def test_a_key_cannot_act_in_another_role(
    world: Any, pair: Keys, connect: Any, introduce: Any, has: str, wants: str
) -> None:
    before = dict(world.server.router.peers)
    error = fate(connect(world.endpoint, introduce(wants), keys=pair(has, "climber")))
    assert isinstance(error, RefusedError)
    assert f"is a {has}'s and cannot act as a {wants}'s" in error.what
    assert world.server.router.peers.keys() >= before.keys()
    assert all(peer.name != "climber" for peer in world.server.router.peers.values())


def test_a_stolen_identity_is_worth_nothing_under_another_key(
    world: Any, pair: Keys, connect: Any, introduce: Any, opens: Any, echoed: Any, extending: Any, ask: Any
) -> None:
    """The thief knows the victim's 16 secret bytes and its session's name, and has an allowed key."""
    attach = introduce("silo")
    victim = connect(world.endpoint, attach, keys=pair("silo", "north"))
    opens(victim, "s", 1)
    thief = connect(world.endpoint, attach, keys=pair("silo", "south"))
    answer = ask(thief, extending("s", 2)).header
    other = ask(thief, extending("never was", 3)).header
    assert isinstance(answer, Error)
    assert isinstance(other, Error)
    assert answer.code == other.code == "unknown-name"
    assert answer.what.replace("'s'", "") == other.what.replace("'never was'", "")
    echoed(victim, world, "s", 2)


def test_the_same_key_comes_back_to_what_it_had(
    world: Any, pair: Keys, connect: Any, introduce: Any, opens: Any, echoed: Any
) -> None:
    attach, keys = introduce("silo"), pair("silo", "north")
    opens(connect(world.endpoint, attach, keys=keys), "s", 1)
    again = connect(world.endpoint, attach, keys=keys)
    echoed(again, world, "s", 2)


def test_revoking_ends_a_live_connection(
    world: Any, hub: Path, pair: Keys, connect: Any, introduce: Any, opens: Any, echoed: Any, until: Any
) -> None:
    attach, keys = introduce("silo"), pair("silo", "north")
    silo = connect(world.endpoint, attach, keys=keys)
    other = connect(world.endpoint, introduce("silo"), keys=pair("silo", "south"))
    opens(silo, "s", 1)
    opens(other, "t", 1)
    revoke(hub, "north")
    error = fate(silo)
    assert isinstance(error, RefusedError)
    assert "revoked" in error.what
    gone = world.worker.receive(10)
    assert gone.header == Gone(name="north"), "and what it held is freed"
    assert "was revoked" in str(fate(connect(world.endpoint, attach, keys=keys)))
    echoed(other, world, "t", 2)


def test_revoking_a_worker_is_told_to_who_waits_for_it(
    world: Any, hub: Path, pair: Keys, connect: Any, introduce: Any, opens: Any, extending: Any
) -> None:
    silo = connect(world.endpoint, introduce("silo"), keys=pair("silo", "north"))
    opens(silo, "s", 1)
    silo.send(Parcel.of(extending("s", 2)))
    assert world.worker.receive(10) is not None
    revoke(hub, "gpu1")
    answer = silo.receive(10)
    assert (answer.header.id, answer.header.code) == (2, "unavailable")
    assert "revoked" in str(fate(world.worker))


def test_a_revoked_peer_that_will_not_go_gets_no_further(
    world: Any, hub: Path, pair: Keys, introduce: Any, extending: Any
) -> None:
    """ZeroMQ keeps its connection open; whatever comes over it is refused."""
    keys = pair("silo", "stubborn")
    with Dealer(world.endpoint, keys) as dealer:
        attach = introduce("silo")
        dealer.say(attach)
        assert isinstance(dealer.hears(), Welcome)
        revoke(hub, "stubborn")
        assert dealer.hears().code == "refused"
        for again in (attach, introduce("silo"), introduce("worker")):
            dealer.say(again)
            assert dealer.hears().code == "refused"
        dealer.say(extending("s", 5))
        assert (dealer.hears().code, dealer.hears().code) == ("link", "unavailable")
        allow(hub, PublicKey("silo", "stubborn", keys.own.public.key))
        time.sleep(0.1)
        dealer.say(attach)
        assert isinstance(dealer.hears(), Welcome), "and may come back when it is allowed again"


def test_a_name_that_gets_another_key_ends_the_old_one(
    world: Any, hub: Path, pair: Keys, connect: Any, introduce: Any, opens: Any
) -> None:
    silo = connect(world.endpoint, introduce("silo"), keys=pair("silo", "north"))
    opens(silo, "s", 1)
    revoke(hub, "north")
    successor = pair("silo", "north")
    assert "revoked" in str(fate(silo))
    assert world.worker.receive(10).header == Gone(name="north")
    opens(connect(world.endpoint, introduce("silo"), keys=successor), "s", 1)


def test_beyond_loopback_with_keys_alone(
    start_broker: Any, ring: KeyRing, pair: Keys, connect: Any, introduce: Any, opening: Any, ask: Any
) -> None:
    with pytest.raises(UsageError, match="beyond loopback"):
        start_broker("tcp://0.0.0.0:0")
    with pytest.raises(UsageError, match="beyond loopback"):
        connect("tcp://10.0.0.1:7555", introduce("silo"))
    running = start_broker("tcp://0.0.0.0:0", keys=ring)
    port = running.endpoint.rpartition(":")[2]
    silo = connect(f"tcp://127.0.0.1:{port}", introduce("silo"), keys=pair("silo", "north"))
    assert "no worker is attached" in ask(silo, opening("s", id=1)).header.what
    assert "has a key" in str(fate(connect(f"tcp://127.0.0.1:{port}", introduce("silo"))))


def test_a_link_outlives_a_restart_of_its_broker(
    start_broker: Any, ring: KeyRing, pair: Keys, connect: Any, introduce: Any, opening: Any, answer_to: Any
) -> None:
    first = start_broker(keys=ring)
    silo = connect(first.endpoint, introduce("silo"), keys=pair("silo", "north"))
    silo.send(Parcel.of(opening("s", id=1)))
    answer_to(silo, 1)
    first.stop()
    time.sleep(0.3)
    start_broker(first.endpoint, keys=ring)
    silo.send(Parcel.of(opening("s", id=2)))
    assert answer_to(silo, 2).header.code == "nobody"


@pytest.mark.parametrize("keyed", [True, False])
def test_what_crosses_can_be_read_only_without_keys(
    keyed: bool, start_broker: Any, ring: KeyRing, pair: Keys, introduce: Any
) -> None:
    """By a tap between silo and broker."""
    running = start_broker(keys=ring if keyed else None)
    with Tap(running.endpoint) as tap:
        with Dealer(tap.endpoint, pair("silo", "north") if keyed else None) as dealer:
            dealer.say(introduce("silo"))
            assert isinstance(dealer.hears(), Welcome)
            dealer.say(CloseSession(id=1, session="a-name-to-look-for"))
            assert dealer.hears().code == "unknown-name"
        for word in (b"a-name-to-look-for", b"welcome", b"you have no session"):
            assert (word in tap.seen) != keyed


def test_strangers_at_the_door_do_not_fill_the_log(
    world: Any, pair: Keys, connect: Any, introduce: Any, caplog: pytest.LogCaptureFixture
) -> None:
    keys = [pair("silo", f"stranger{number}", let_in=False) for number in range(8)]
    begun = time.monotonic()
    with caplog.at_level(logging.WARNING, "trunkline"):
        links = [connect(world.endpoint, introduce("silo"), keys=key) for key in keys]
        for link in links:
            fate(link)
    assert 1 <= len(warnings(caplog)) <= 1 + (time.monotonic() - begun)


class Dealer:
    """A socket that says what it likes."""

    def __init__(self, endpoint: str, keys: LinkKeys | None) -> None:
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        if keys is not None:
            keys.guard(self._socket)
        self._socket.connect(endpoint)

    def say(self, header: Any) -> None:
        self._socket.send_multipart([b"", encode_header(header)])

    def hears(self) -> Any:
        assert self._socket.poll(10_000), "no answer came"
        return decode_header(self._socket.recv_multipart()[1])

    def __enter__(self) -> "Dealer":
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)


class Tap:
    """A relay on loopback that keeps a copy of all that passes, both ways."""

    def __init__(self, endpoint: str) -> None:
        self.seen = bytearray()
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        self._there = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._pass, daemon=True)
        self._thread.start()

    def _pass(self) -> None:
        ours, _ = self._listener.accept()
        with ours, socket.create_connection(self._there, timeout=10) as theirs:
            ends = {ours: theirs, theirs: ours}
            while True:
                for ready in select.select(list(ends), [], [], 10)[0]:
                    data = ready.recv(65536)
                    if not data:
                        return
                    self.seen += data
                    ends[ready].sendall(data)

    def __enter__(self) -> "Tap":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(5)
        self._listener.close()
        assert not self._thread.is_alive()
