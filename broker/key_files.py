"""Key files: one line of four words, and who may read it.

They say what it is, the role, the name, and 40 characters of Z85:
`trunkline-public silo north Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID`. A secret file holds the secret
half alone: the public half follows from it.
"""

import contextlib
import os
import re
import stat
import struct
from pathlib import Path
from typing import cast, get_args

import zmq
from zmq.utils import z85

from broker.keys import KeyRole, LinkKeys, PublicKey, SecretKey
from codec.errors import Side, UsageError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
_Z85 = re.compile(r"[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_MOST = 512
"""Bytes of the longest file that could be a key."""


def link_keys(own: Path | None, broker: str | None, role: KeyRole | None) -> LinkKeys | None:
    """The keys behind `--key` and `--broker-key`, of `role` if it is given; None if neither key is.

    Raises `UsageError`.
    """
    at = role or "silo"
    if own is None and broker is None:
        return None
    if own is None or broker is None:
        raise UsageError(
            "--key and --broker-key go together",
            side=at,
            hint="Give this side's secret key and the broker's public key.",
        )
    return LinkKeys(read_secret(own, role), public_key(broker, "broker", at=at).key)


def make_key(directory: Path, role: KeyRole, name: str) -> tuple[Path, Path]:
    """Make a key pair: `NAME.secret` (mode 0600) and `NAME.public` in `directory`, mode 0700 if new.

    Returns both paths. Raises `UsageError` for a bad name, or if such a file is there already.
    """
    check_name(name, at=role)
    public, secret = zmq.curve_keypair()
    while public.startswith(b"-"):  # On a command line it would pass for an option.
        public, secret = zmq.curve_keypair()
    make_directory(directory, at=role)
    paths = directory / f"{name}.secret", directory / f"{name}.public"
    if paths[1].exists():  # Before anything is written: half a pair would be in the way.
        raise _exists(paths[1], role)
    _create(paths[0], f"trunkline-secret {role} {name} {secret.decode()}\n", 0o600, at=role)
    write_public(paths[1], PublicKey(role, name, public.decode()), at=role)
    return paths


def write_public(path: Path, key: PublicKey, *, at: Side) -> None:
    """Create a public key's file. Raises `UsageError` if it is there already or cannot be written."""
    # A broker may be reading: it appears whole. The draft keeps out who writes the same name now.
    draft = path.with_suffix(".new")
    _create(draft, f"trunkline-public {key.role} {key.name} {key.key}\n", 0o644, at=at)
    if path.exists():
        draft.unlink()
        raise _exists(path, at)
    draft.rename(path)


def read_secret(path: Path, role: KeyRole | None = None) -> SecretKey:
    """Read a secret key's file, of `role` if it is given.

    Raises `UsageError` if it cannot be read, holds something else or another role's key, or if
    others than its owner can read it.
    """
    try:
        kind, found, name, key = _words(path, private=True)
        if kind != "secret":
            raise ValueError("it holds a public key, and the secret one is needed")
        _check_role(found, role)
    except (OSError, ValueError) as error:
        hint = f"Make a pair with: trunkline keys new NAME --role {role or 'ROLE'}"
        raise _unusable(
            path, error, f"secret key of a {role}" if role else "secret key", hint, role or "broker"
        ) from None
    return SecretKey(found, name, key)


def read_public(path: Path, role: KeyRole | None = None) -> PublicKey:
    """Read a public key's file, of `role` if it is given.

    Raises `ValueError` saying what is wrong with it, and `OSError` if it cannot be read.
    """
    kind, found, name, key = _words(path)
    if kind != "public":
        raise ValueError("it holds a secret key, and the public one is needed")
    _check_role(found, role)
    return PublicKey(found, name, key)


def public_key(text: str, role: KeyRole, *, at: Side) -> PublicKey:
    """The public key that a command line gives: a file, or the 40 characters themselves, without a name.

    Raises `UsageError`.
    """
    if not os.path.exists(text) and _is_key(text):
        return PublicKey(role, "", text)
    try:
        return read_public(Path(text), role)
    except (OSError, ValueError) as error:
        hint = f"Ask the {role}'s operator for its NAME.public."
        raise _unusable(text, error, f"public key of a {role}", hint, at) from None


def check_name(name: str, *, at: Side) -> None:
    """Names become file names: letters, digits, `-` and `_`. Raises `UsageError` for others."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot be a key's name",
            side=at,
            hint="Use up to 63 letters, digits, - and _, with a letter or digit first.",
        )


def make_directory(directory: Path, *, at: Side) -> None:
    """Make a directory for keys, mode 0700. One that is there stays as it is. Raises `UsageError`."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{directory} cannot be made: {error.strerror}", side=at, hint="Choose --dir."
        ) from None


def _words(path: Path, *, private: bool = False) -> tuple[str, KeyRole, str, str]:
    """The four words of a key file, checked. Raises `OSError`, and `ValueError` for what is no key."""
    # Without waiting: it may be a pipe.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("it is not a file")
        if private and about.st_mode & 0o077:
            raise ValueError(f"others can read or write it (mode {about.st_mode & 0o777:04o}): chmod 600")
        words = os.read(descriptor, _MOST).decode("ascii", "replace").split()
    finally:
        os.close(descriptor)
    kind, _, rest = words[0].partition("-") if len(words) == 4 else ("", "", "")
    if kind != "trunkline" or rest not in ("secret", "public") or words[1] not in get_args(KeyRole):
        raise ValueError("it is not a key file")
    if not _NAME.fullmatch(words[2]) or not _is_key(words[3]):
        raise ValueError("its name or key is malformed")
    return rest, cast(KeyRole, words[1]), words[2], words[3]


def _is_key(text: str) -> bool:
    if not _Z85.fullmatch(text):
        return False
    try:
        return len(z85.decode(text)) == 32
    except struct.error:  # Five characters that stand for more than 32 bits.
        return False


def _check_role(found: KeyRole, wanted: KeyRole | None) -> None:
    if wanted is not None and found != wanted:
        raise ValueError(f"it is a {found}'s key, and cannot act as a {wanted}'s")


def _create(path: Path, text: str, mode: int, *, at: Side) -> None:
    try:
        # Never a moment in which it has another mode, or replaces what was there.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except FileExistsError:
        raise _exists(path, at) from None
    except OSError as error:
        raise _unwritten(path, error, at) from None
    try:
        with open(descriptor, "w") as file:
            file.write(text)
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise _unwritten(path, error, at) from None


def _exists(path: Path, at: Side) -> UsageError:
    return UsageError(f"{path} exists already", side=at, hint="Choose another name, or move it away.")


def _unwritten(path: Path, error: OSError, at: Side) -> UsageError:
    return UsageError(f"{path} cannot be written: {error.strerror}", side=at, hint="Choose another --dir.")


def _unusable(path: Path | str, error: Exception, wanted: str, hint: str, at: Side) -> UsageError:
    why = error.strerror if isinstance(error, OSError) else str(error)
    return UsageError(f"no {wanted} can be read from {str(path)!r}: {why}", side=at, hint=hint)
