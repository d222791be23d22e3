"""Who may connect and attach: decisions without a socket."""

from pathlib import Path
from typing import Any

import pytest
from zmq.utils import z85

from broker.gate import DOMAIN, Gate
from broker.key_files import make_key, read_public
from broker.keyring import KeyRing, allow, revoke
from broker.keys import PublicKey
from codec.errors import RefusedError


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    make_key(tmp_path / "hub", "broker", "hub")
    return Gate(KeyRing(tmp_path / "hub"))


@pytest.fixture
def let_in(gate: Gate, tmp_path: Path) -> Any:
    """`let_in("silo", "north")`: a key that is allowed now."""

    def add(role: Any, name: str, directory: str = "elsewhere") -> PublicKey:
        key = read_public(make_key(tmp_path / directory, role, name)[1])
        allow(tmp_path / "hub", key)
        assert gate.ring.refresh()
        return key

    return add


def question(key: str, *, domain: bytes = DOMAIN, mechanism: bytes = b"CURVE") -> list[bytes]:
    return [b"1.0", b"7", domain, b"10.0.0.9", b"", mechanism, z85.decode(key)]


def test_an_allowed_key_connects_and_its_messages_carry_it(gate: Gate, let_in: Any) -> None:
    north = let_in("silo", "north")
    reply, refused = gate.answer(question(north.key))
    assert reply == [b"1.0", b"7", b"200", b"", north.key.encode(), b""]
    assert refused == ""


def test_all_else_does_not_connect(gate: Gate, let_in: Any, tmp_path: Path) -> None:
    north = let_in("silo", "north")
    stranger = read_public(make_key(tmp_path, "silo", "stranger")[1])
    plain = [b"1.0", b"7", DOMAIN, b"10.0.0.9", b"", b"PLAIN", b"north", b"password"]
    for asked in (
        question(stranger.key),
        question(gate.ring.secret.public.key),
        question(north.key, domain=b"other"),
        [b"1.0", b"7", DOMAIN, b"10.0.0.9", b"", b"NULL"],
        plain,
    ):
        reply, _ = gate.answer(asked)
        assert (reply[1], reply[2], reply[4]) == (b"7", b"400", b"")
    assert gate.answer(question(stranger.key))[1] == stranger.key


def test_a_peer_is_called_what_its_key_is_called(gate: Gate, let_in: Any, introduce: Any) -> None:
    north = let_in("silo", "north")
    attach = introduce("silo", "somebody else", encodings=("raw", "planes"))
    admitted = gate.admit(b"r", north.key, attach)
    assert (admitted.name, admitted.role, admitted.encodings) == ("north", "silo", ("raw", "planes"))


def test_one_identity_under_two_keys_is_two_peers(gate: Gate, let_in: Any, introduce: Any) -> None:
    north, south = let_in("silo", "north"), let_in("silo", "south")
    attach = introduce("silo")
    first = gate.admit(b"1", north.key, attach).peer
    assert gate.admit(b"2", north.key, attach).peer == first, "the same key comes back to what it had"
    stolen = gate.admit(b"3", south.key, attach).peer
    assert len({first, stolen, attach.peer}) == 3
    assert len(stolen) == 16


@pytest.mark.parametrize(("has", "wants"), [("silo", "worker"), ("worker", "silo")])
def test_a_key_acts_in_its_own_role_alone(
    gate: Gate, let_in: Any, introduce: Any, has: str, wants: str
) -> None:
    key = let_in(has, "k")
    with pytest.raises(RefusedError, match=f"is a {has}'s and cannot act as a {wants}'s") as caught:
        gate.admit(b"r", key.key, introduce(wants))
    assert caught.value.at == wants
    assert f"--role {wants}" in caught.value.hint
    assert list(gate.revoked({b"r"})) == []


def test_who_is_revoked_is_named_once(gate: Gate, let_in: Any, introduce: Any, tmp_path: Path) -> None:
    north, south = let_in("silo", "north"), let_in("silo", "south")
    for route, key in ((b"1", north), (b"2", south), (b"3", north), (b"4", north)):
        gate.admit(route, key.key, introduce("silo"))
    attached = {b"1", b"2", b"3"}
    assert list(gate.revoked(attached)) == []
    revoke(tmp_path / "hub", "north")
    gate.ring.refresh()
    assert sorted(route for route, _ in gate.revoked(attached)) == [b"1", b"3"]
    assert list(gate.revoked(attached)) == []
    with pytest.raises(RefusedError, match="revoked"):
        gate.admit(b"1", north.key, introduce("silo"))


def test_a_new_key_or_role_under_an_old_name_ends_what_the_old_one_had(
    gate: Gate, let_in: Any, introduce: Any, tmp_path: Path
) -> None:
    old = let_in("silo", "north")
    gate.admit(b"1", old.key, introduce("silo"))
    revoke(tmp_path / "hub", "north")
    new = let_in("silo", "north", "again")
    gate.admit(b"2", new.key, introduce("silo"))
    assert [route for route, _ in gate.revoked({b"1", b"2"})] == [b"1"]
    revoke(tmp_path / "hub", "north")
    allow(tmp_path / "hub", PublicKey("worker", "north", new.key))
    gate.ring.refresh()
    assert [route for route, _ in gate.revoked({b"1", b"2"})] == [b"2"]


def test_a_message_without_a_key_attaches_nobody(gate: Gate, introduce: Any) -> None:
    with pytest.raises(RefusedError):
        gate.admit(b"r", "", introduce("silo"))


def test_brokers_that_allow_the_same_key_know_its_holder_by_the_same_identity(
    gate: Gate, let_in: Any, tmp_path: Path, introduce: Any
) -> None:
    """So workers know a silo that fails over, and brokers agree on the home of a run."""
    north, silo = let_in("silo", "north"), introduce("silo")
    make_key(tmp_path / "other", "broker", "other")
    allow(tmp_path / "other", north)
    other = Gate(KeyRing(tmp_path / "other"))
    assert gate.admit(b"1", north.key, silo).peer == other.admit(b"2", north.key, silo).peer
