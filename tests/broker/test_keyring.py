"""The broker's key directory: who is in it, and what is noticed when it changes."""

import os
from pathlib import Path
from typing import Any

import pytest

from broker.key_files import make_key, public_key, read_public
from broker.keyring import KeyRing, allow, allowed, revoke
from broker.keys import PublicKey
from codec.errors import UsageError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    make_key(tmp_path / "hub", "broker", "hub")
    return tmp_path / "hub"


@pytest.fixture
def peer(tmp_path: Path) -> Any:
    """`peer("silo", "north")`: a public key made elsewhere."""
    return lambda role, name: read_public(make_key(tmp_path / "elsewhere", role, name)[1])


def test_it_lets_in_who_was_allowed_and_nobody_else(directory: Path, peer: Any) -> None:
    north, stranger = peer("silo", "north"), peer("silo", "stranger")
    allow(directory, north)
    ring = KeyRing(directory)
    assert ring.holder(north.key) == north
    assert ring.holder(stranger.key) is None
    assert ring.holder(ring.secret.public.key) is None, "the broker's own key is not a peer's"
    assert ring.holder("") is None


def test_changes_are_noticed_once(directory: Path, peer: Any) -> None:
    ring = KeyRing(directory)
    north = peer("silo", "north")
    assert not ring.refresh()
    allow(directory, north)
    assert ring.refresh()
    assert not ring.refresh()
    assert ring.holder(north.key) == north
    revoke(directory, "north")
    assert ring.refresh()
    assert ring.holder(north.key) is None


def test_another_key_under_the_same_name_is_noticed(directory: Path, peer: Any, tmp_path: Path) -> None:
    """Even if it came so fast that the file's time and size say nothing."""
    old = peer("silo", "north")
    new = read_public(make_key(tmp_path / "again", "silo", "north")[1])
    allow(directory, old)
    ring = KeyRing(directory)
    path = directory / "allowed" / "north.public"
    before = path.stat()
    fresh = tmp_path / "fresh"
    fresh.write_text(path.read_text().replace(old.key, new.key))
    os.utime(fresh, ns=(before.st_atime_ns, before.st_mtime_ns))
    fresh.rename(path)
    assert ring.refresh()
    assert ring.holder(old.key) is None
    assert ring.holder(new.key) == new


def test_what_is_no_key_lets_nobody_in_and_harms_no_other(directory: Path, peer: Any) -> None:
    north, south = peer("silo", "north"), peer("worker", "south")
    allow(directory, north)
    held = directory / "allowed"
    (held / "torn.public").write_text("trunkline-public silo torn Yne@")
    (held / "other.public").write_text(f"trunkline-public worker south {south.key}\n")
    (held / "hub.public").write_bytes((directory / "hub.public").read_bytes())
    (held / "again.public").write_text(f"trunkline-public worker again {north.key}\n")
    (held / "zz.public").mkdir()
    (held / "dangling.public").symlink_to("nowhere")
    (held / "notes.txt").write_text("remember the milk")
    found, problems = allowed(directory)
    # The second holder of a key is passed over, whichever it is.
    assert [str(key) for key in found] == ["worker again"]
    assert len(problems) == 5
    (held / "again.public").unlink()
    ring = KeyRing(directory)
    assert ring.holder(north.key) == north
    assert ring.holder(south.key) is None


def test_a_directory_that_cannot_be_read_leaves_all_as_it_was(
    directory: Path, peer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of file descriptors, say: nobody was revoked."""
    north = peer("silo", "north")
    allow(directory, north)
    ring = KeyRing(directory)

    def refuse(_: object) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        assert not ring.refresh()
        assert ring.holder(north.key) == north
    revoke(directory, "north")
    assert ring.refresh()
    assert ring.holder(north.key) is None


def test_a_directory_that_is_gone_lets_nobody_in(directory: Path, peer: Any) -> None:
    north = peer("silo", "north")
    allow(directory, north)
    ring = KeyRing(directory)
    (directory / "allowed").rename(directory / "away")
    assert ring.refresh()
    assert ring.holder(north.key) is None


def test_a_name_and_a_key_are_allowed_once(directory: Path, peer: Any, tmp_path: Path) -> None:
    north = peer("silo", "north")
    allow(directory, north)
    with pytest.raises(UsageError, match="this key is allowed already, as silo north") as caught:
        allow(directory, PublicKey("worker", "w", north.key))
    assert "trunkline keys revoke north" in caught.value.hint
    other = read_public(make_key(tmp_path / "other", "worker", "north")[1])
    with pytest.raises(UsageError, match="exists already"):
        allow(directory, other)
    assert allowed(directory)[0] == [north]


@pytest.mark.parametrize("name", ["../hub", "..", "", "a/b", "hub.secret"])
def test_names_cannot_lead_elsewhere(directory: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be a key's name"):
        revoke(directory, name)
    key = public_key("Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID", "silo", at="broker")
    with pytest.raises(UsageError, match="cannot be a key's name"):
        allow(directory, PublicKey("silo", name, key.key))
    assert sorted(path.name for path in directory.rglob("*")) == ["hub.public", "hub.secret"]


def test_who_was_never_allowed_cannot_be_revoked(directory: Path) -> None:
    with pytest.raises(UsageError, match="no key 'north' can be revoked") as caught:
        revoke(directory, "north")
    assert "keys list" in caught.value.hint


def test_a_broker_needs_one_key_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no broker's secret key") as caught:
        KeyRing(tmp_path / "none")
    assert "trunkline keys new NAME --role broker" in caught.value.hint
    assert not (tmp_path / "none").exists()
    make_key(tmp_path, "silo", "north")
    with pytest.raises(UsageError, match="holds no broker's secret key"):
        KeyRing(tmp_path)
    make_key(tmp_path, "broker", "one")
    assert KeyRing(tmp_path).secret.name == "one", "a silo's key beside it does not matter"
    make_key(tmp_path, "broker", "two")
    with pytest.raises(UsageError, match="several brokers: one, two"):
        KeyRing(tmp_path)


def test_a_directory_that_others_can_write_to_is_refused(directory: Path) -> None:
    KeyRing(directory)
    for path in (directory / "allowed", directory):
        path.chmod(0o770)
        with pytest.raises(UsageError, match="others can write to") as caught:
            KeyRing(directory)
        assert f"chmod go-w {path}" in caught.value.hint
        path.chmod(0o750)
    KeyRing(directory)
