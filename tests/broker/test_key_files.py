"""Key files: what is written, with which modes, and what is refused when it is read."""

import os
import stat
from pathlib import Path

import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker.key_files import link_keys, make_key, public_key, read_public, read_secret
from broker.keys import PublicKey
from codec.errors import UsageError

Z85 = "Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID"


@pytest.fixture(params=[0o000, 0o022, 0o077], ids=["umask 000", "umask 022", "umask 077"])
def umask(request: pytest.FixtureRequest) -> object:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_written_is_a_pair_that_can_be_read(tmp_path: Path) -> None:
    secret, public = make_key(tmp_path / "keys", "silo", "north")
    own = read_secret(secret, "silo")
    assert read_public(public, "silo") == own.public == public_key(str(public), "silo", at="broker")
    assert zmq.curve_public(own.secret.encode()).decode() == own.public.key
    assert (own.role, own.name) == ("silo", "north")
    assert own.secret not in repr(own)
    assert own.secret not in public.read_text()


def test_a_secret_is_its_owners_alone(tmp_path: Path, umask: int) -> None:
    secret, _ = make_key(tmp_path / "a" / "keys", "silo", "north")
    assert mode(secret) == 0o600
    assert mode(secret.parent) == 0o700 & ~umask


def test_a_secret_is_born_with_its_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not made first and narrowed then: whoever opened it between the two could read on."""
    born = []
    real = os.open

    def watched(path: str, flags: int, *rest: int) -> int:
        descriptor = real(path, flags, *rest)
        born.append((Path(path).name, bool(flags & os.O_EXCL), mode(Path(path)), os.path.getsize(path)))
        return descriptor

    monkeypatch.setattr(os, "open", watched)
    before = os.umask(0)
    try:
        make_key(tmp_path, "worker", "w")
    finally:
        os.umask(before)
    assert born == [("w.secret", True, 0o600, 0), ("w.new", True, 0o644, 0)]


@pytest.mark.parametrize("suffix", ["secret", "public"])
def test_nothing_that_is_there_is_replaced(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"north.{suffix}").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        make_key(tmp_path, "silo", "north")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_a_link_to_elsewhere_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "north.secret").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="exists already"):
        make_key(tmp_path, "silo", "north")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../up", "a/b", "a\\b", "/etc/x", ".hidden", "-x", "a b", "a\n", "a\0", "ä", "x" * 64],
)
def test_names_cannot_lead_elsewhere(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be a key's name") as caught:
        make_key(tmp_path / "keys", "worker", name)
    assert caught.value.at == "worker"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o620, 0o602, 0o610, 0o601, 0o777])
def test_a_secret_that_others_can_open_is_refused(tmp_path: Path, bits: int) -> None:
    secret, _ = make_key(tmp_path, "silo", "north")
    secret.chmod(bits)
    with pytest.raises(UsageError, match=f"others can read or write it .mode {bits:04o}.: chmod 600"):
        read_secret(secret, "silo")
    secret.chmod(0o400)
    read_secret(secret, "silo")


def test_what_cannot_be_read_says_why_and_what_to_do(tmp_path: Path) -> None:
    secret, public = make_key(tmp_path, "silo", "north")
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path, why in (
        (tmp_path / "none", "No such file or directory"),
        (tmp_path, "Is a directory|it is not a file"),
        (tmp_path / "pipe", "it is not a file"),
        (public, "others can read"),
    ):
        with pytest.raises(UsageError, match=why) as caught:
            read_secret(path, "silo")
        assert str(path) in caught.value.what
        assert "trunkline keys new NAME --role silo" in caught.value.hint
    public.chmod(0o600)
    with pytest.raises(UsageError, match="it holds a public key"):
        read_secret(public, "silo")
    with pytest.raises(UsageError, match="it holds a secret key"):
        public_key(str(secret), "silo", at="broker")
    with pytest.raises(UsageError, match="it is a silo's key, and cannot act as a worker's") as caught:
        read_secret(secret, "worker")
    assert caught.value.at == "worker"
    with pytest.raises(UsageError, match="it is a silo's key, and cannot act as a broker's"):
        public_key(str(public), "broker", at="silo")


def test_a_public_key_may_be_given_as_it_is() -> None:
    assert public_key(Z85, "worker", at="broker") == PublicKey("worker", "", Z85)
    for wrong in (Z85[:-1], Z85 + "a", "#" * 40, "'" * 40, ""):
        with pytest.raises(UsageError, match="no public key"):
            public_key(wrong, "worker", at="broker")


def test_key_and_broker_key_go_together(tmp_path: Path) -> None:
    secret, _ = make_key(tmp_path, "silo", "north")
    assert link_keys(None, None, "silo") is None
    for own, broker in ((secret, None), (None, Z85)):
        with pytest.raises(UsageError, match="go together"):
            link_keys(own, broker, "silo")
    keys = link_keys(secret, Z85, "silo")
    assert keys is not None
    assert (keys.own.name, keys.broker) == ("north", Z85)


torn = st.sampled_from(
    [f"trunkline-{kind} {role} a {Z85}\n" for kind in ("public", "secret") for role in ("silo", "x")]
)
mutated = st.builds(
    lambda line, at, with_: (line[:at] + with_ + line[at + 1 :]).encode("utf-8", "replace"),
    torn,
    st.integers(0, 70),
    st.text(max_size=3),
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=200), mutated, st.binary(max_size=20).map(lambda more: more * 100_000)))
def test_any_bytes_are_a_key_or_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "any"
    path.write_bytes(data)
    path.chmod(0o600)
    try:
        key = read_public(path)
    except ValueError:
        pass
    else:
        again = f"trunkline-public {key.role} {key.name} {key.key}"
        assert data[:512].decode("ascii", "replace").split() == again.split()
        assert len(zmq.utils.z85.decode(key.key)) == 32
    try:
        own = read_secret(path)
    except UsageError:
        pass
    else:
        assert len(own.public.key) == 40
