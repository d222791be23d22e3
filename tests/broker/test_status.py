"""The question how the pool is: what is told and to whom, and the health check made of it."""

import json
import os
import secrets
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from broker.key_files import make_key, read_public
from broker.keyring import KeyRing, allow, revoke
from broker.parcel import Parcel
from broker.question import ask_pool
from broker.status_command import status
from codec.errors import LinkError, RefusedError, TrunklineError, UsageError
from codec.limits import MAX_HEADER_BYTES, MAX_LISTED
from codec.messages import Attach, Drain, Pool, Status, WorkerStatus, encode_header
from codec.plan import ModelCard


def asked(desk: Any) -> Pool:
    """What a connection that is attached as nothing is told."""
    (send,) = desk.router.handle(b"stranger", Parcel.of(Status(id=7)), desk.now)
    assert send.route == b"stranger"
    assert isinstance(send.parcel.header, Pool)
    return send.parcel.header


def test_workers_are_told_by_name_and_silos_by_number(desk: Any) -> None:
    east, west = desk.worker("west"), desk.worker("east", start=1, stop=4)
    north, south = desk.silo("north"), desk.silo("south")
    north.opens("secret-session", 1)
    south.joins("secret-run", 1)
    east.says(Drain())
    desk.now = 2.0
    pool = asked(desk)
    assert [(w.name, w.start, w.stop, w.draining) for w in pool.workers] == [
        ("east", 1, 4, False),
        ("west", 0, 6, True),
    ]
    assert sum(worker.load for worker in pool.workers) == 2
    assert (pool.id, pool.silos, pool.sessions, pool.runs, pool.unlisted) == (7, 2, 1, 1, 0)
    assert {worker.silent for worker in pool.workers} == {2.0}
    said = encode_header(pool)
    assert not any(word in said for word in (b"north", b"south", b"secret"))
    west.leaves()
    assert [worker.name for worker in asked(desk).workers] == ["west"]


def test_asking_attaches_nobody_and_an_attached_peer_may_ask_too(desk: Any) -> None:
    assert asked(desk) == Pool(id=7, workers=(), unlisted=0, silos=0, sessions=0, runs=0)
    silo = desk.silo()
    silo.says(Status(id=3))
    (pool,) = silo.read()
    assert (pool.id, pool.silos) == (3, 1)
    assert len(desk.router.peers) == 1


def test_the_longest_answer_is_a_header(desk: Any) -> None:
    card = ModelCard(name="\U0001f600" * 512, fingerprint="f", blocks=6, hidden=4)
    for number in range(MAX_LISTED + 3):
        name = f"{number:03}".ljust(128, "\U0001f600")
        desk.party(
            Attach(role="worker", name=name, peer=secrets.token_bytes(16), model=card, start=0, stop=6)
        )
    pool = asked(desk)
    assert (len(pool.workers), pool.unlisted) == (MAX_LISTED, 3)
    assert len(encode_header(pool)) < MAX_HEADER_BYTES


# --- the health check -------------------------------------------------------------------------------------


def check(*arguments: str) -> Result:
    return CliRunner().invoke(status, list(arguments))


def test_a_broker_without_workers_is_healthy_only_if_that_is_enough(start_broker: Any) -> None:
    endpoint = start_broker().endpoint
    done = check("--broker", endpoint)
    assert isinstance(done.exception, TrunklineError)
    assert "takes new work" in str(done.exception)
    assert "silos 0, sessions 0, runs 0" in done.stdout
    assert check("--broker", endpoint, "--any").exit_code == 0


def test_it_shows_the_workers_and_writes_them_for_machines(
    start_broker: Any, connect: Any, introduce: Any, ask: Any, tmp_path: Path
) -> None:
    endpoint = start_broker().endpoint
    worker = connect(endpoint, introduce("worker", "[red]gpu1"))
    settled(endpoint, 1)
    done = check("--broker", endpoint, "--worker", "[red]gpu1")
    assert done.exit_code == 0
    assert "[red]gpu1" in done.stdout, "a name is not markup"
    assert "0:6" in done.stdout
    path = tmp_path / "status.json"
    assert check("--broker", endpoint, "--json", str(path)).exit_code == 0
    told = json.loads(path.read_text())
    assert told.keys() == {"workers", "unlisted", "silos", "sessions", "runs"}
    assert told["workers"][0].keys() == set(WorkerStatus.__struct_fields__)
    assert "no worker 'gpu2'" in str(check("--broker", endpoint, "--worker", "gpu2").exception)
    ask(worker, Drain(id=1))
    assert "takes new work" in str(check("--broker", endpoint).exception)
    assert check("--broker", endpoint, "--worker", "[red]gpu1").exit_code == 0


def settled(endpoint: str, workers: int) -> None:
    until = time.monotonic() + 5
    while len(ask_pool(endpoint, 5).workers) != workers:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_nobody_there_is_one_clear_line_in_time() -> None:
    begun = time.monotonic()
    with pytest.raises(LinkError, match=r"no broker answered at tcp://127\.0\.0\.1:9 within 0\.3 s"):
        ask_pool("tcp://127.0.0.1:9", 0.3)
    assert time.monotonic() - begun < 2
    with pytest.raises(UsageError, match="beyond loopback"):
        ask_pool("tcp://10.0.0.1:7555", 0.3)


def test_a_stopped_broker_is_noticed_in_time(processes: Any) -> None:
    endpoint = processes.broker()
    assert ask_pool(endpoint, 5).workers == ()
    os.kill(processes["broker"].pid, signal.SIGSTOP)
    try:
        with pytest.raises(LinkError, match="no broker answered"):
            ask_pool(endpoint, 0.5)
    finally:
        os.kill(processes["broker"].pid, signal.SIGCONT)
    assert ask_pool(endpoint, 5).workers == ()


def test_a_broker_that_was_stopped_forgets_nobody_who_beat_meanwhile(
    processes: Any, connect: Any, introduce: Any, tmp_path: Path
) -> None:
    endpoint = processes.broker("--silence", "2")
    connect(endpoint, introduce("worker", "w"))
    connect(endpoint, introduce("silo"))
    settled(endpoint, 1)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        os.kill(processes["broker"].pid, number)
        time.sleep(3)
    pool = ask_pool(endpoint, 5)
    assert (len(pool.workers), pool.silos) == (1, 1)
    log = (tmp_path / "logs" / "broker.log").read_text()
    assert log.count('"peers"') == 2, "two came, and nobody was forgotten"


@pytest.fixture
def processes(tmp_path: Path) -> Any:
    from silo_agent.processes import Processes

    with Processes(tmp_path / "logs") as started:
        yield started


# --- with keys --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["silo", "worker"])
def test_the_key_of_either_role_will_do_until_it_is_revoked(
    start_broker: Any, tmp_path: Path, role: Any
) -> None:
    make_key(tmp_path / "hub", "broker", "hub")
    secret, public = make_key(tmp_path / "home", role, "north")
    allow(tmp_path / "hub", read_public(public))
    endpoint = start_broker(keys=KeyRing(tmp_path / "hub")).endpoint
    broker_key = str(tmp_path / "hub" / "hub.public")
    with_key = ("--broker", endpoint, "--any", "--key", str(secret), "--broker-key", broker_key)
    assert check(*with_key).exit_code == 0
    assert "uses keys and the other none" in str(check("--broker", endpoint, "--any").exception)
    revoke(tmp_path / "hub", "north")
    refused = check(*with_key)
    assert isinstance(refused.exception, RefusedError)


def test_a_connection_whose_key_was_revoked_is_told_nothing_more(start_broker: Any, tmp_path: Path) -> None:
    """It asked before, and keeps its connection: a broker looks at the key for every question."""
    import zmq

    from broker.key_files import link_keys
    from codec.messages import Error, decode_header

    make_key(tmp_path / "hub", "broker", "hub")
    secret, public = make_key(tmp_path / "home", "silo", "north")
    allow(tmp_path / "hub", read_public(public))
    endpoint = start_broker(keys=KeyRing(tmp_path / "hub")).endpoint
    keys = link_keys(secret, str(tmp_path / "hub" / "hub.public"), "silo")
    assert keys is not None
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        keys.guard(socket)
        socket.connect(endpoint)

        def answer() -> Any:
            socket.send_multipart(Parcel.of(Status(id=1)).frames())
            assert socket.poll(5000)
            return decode_header(socket.recv_multipart()[1])

        assert isinstance(answer(), Pool)
        revoke(tmp_path / "hub", "north")
        until = time.monotonic() + 5
        while isinstance(told := answer(), Pool) and time.monotonic() < until:
            time.sleep(0.02)
        assert isinstance(told, Error)
        assert told.code == "refused"
