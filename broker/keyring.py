"""The broker's key directory: its own secret key, and the public key of every peer it lets in.

DIR/NAME.secret           the broker's, mode 0600
DIR/NAME.public           its other half, for silos and workers
DIR/allowed/NAME.public   one peer: its role, its name, its key
"""

import contextlib
import os
from pathlib import Path

from broker.key_files import check_name, make_directory, read_public, read_secret, write_public
from broker.keys import PublicKey, SecretKey
from codec.errors import UsageError
from codec.logs import Log

_ALLOWED = "allowed"
_SUFFIX = ".public"

Stamp = frozenset[tuple[str, int, int, int]]
"""What tells that a directory of files has changed: names, times, sizes and inodes."""


class KeyRing:
    """What a broker knows of keys. `refresh` keeps it up to date with the directory."""

    def __init__(self, directory: Path) -> None:
        """Read the directory.

        Raises `UsageError` if it holds no broker's secret key or several, if others can write to it,
        or if it cannot be read.
        """
        self.secret = own_key(directory)
        self._allowed = directory / _ALLOWED
        make_directory(self._allowed, at="broker")
        for path in (directory, self._allowed):
            if path.stat().st_mode & 0o022:
                raise UsageError(
                    f"others can write to {path}, and let in whom they like",
                    side="broker",
                    hint=f"Run: chmod go-w {path}",
                )
        self._log = Log("broker")
        self._stamp: Stamp | None = None
        self._holders: dict[str, PublicKey] = {}
        self._readable = True
        self.refresh()
        if not self._readable:
            raise UsageError(f"{self._allowed} cannot be read", side="broker")

    def holder(self, key: str) -> PublicKey | None:
        """Whose `key` (Z85) it is, with role and name; None for one that is not allowed."""
        return self._holders.get(key)

    def refresh(self) -> bool:
        """Read the allowed keys again if their files changed; whether they had.

        A file that is no key lets nobody in. A directory that cannot be read leaves all as it was.
        """
        try:
            stamp = _stamp(self._allowed)
            if stamp == self._stamp:
                return False
            holders, problems = allowed(self._allowed.parent)
        except OSError as error:
            if self._readable:
                self._log.warn("the key directory cannot be read", why=str(error))
            self._readable = False
            return False
        for problem in problems:
            self._log.warn("a key is passed over", why=problem)
        self._stamp, self._readable = stamp, True
        self._holders = {holder.key: holder for holder in holders}
        self._log.say("keys", allowed=len(holders))
        return True


def allowed(directory: Path) -> tuple[list[PublicKey], list[str]]:
    """The peers that a key directory lets in, by name, and what is wrong with the rest.

    Raises `OSError` if the files cannot be read; a directory that is not there lets nobody in.
    """
    holders: dict[str, PublicKey] = {}
    problems = []
    for name in sorted(entry[0] for entry in _stamp(directory / _ALLOWED)):
        path = directory / _ALLOWED / name
        try:
            key = read_public(path)
            if key.role == "broker":
                raise ValueError("it is a broker's key")
            if name != key.name + _SUFFIX:
                raise ValueError(f"it holds the key of {key.name!r}")
            if key.key in holders:
                raise ValueError(f"it is the key of {holders[key.key]} too")
        except FileNotFoundError:
            continue  # Removed just now.
        except ValueError as error:
            problems.append(f"{path}: {error}")
        else:
            holders[key.key] = key
    return list(holders.values()), problems


def allow(directory: Path, key: PublicKey) -> None:
    """Let a peer in. Raises `UsageError` if its name or its key is there already."""
    check_name(key.name, at="broker")
    own_key(directory)
    for holder in allowed(directory)[0]:
        if holder.key == key.key:
            raise UsageError(
                f"this key is allowed already, as {holder}",
                side="broker",
                hint=f"Remove it first: trunkline keys revoke {holder.name}",
            )
    make_directory(directory / _ALLOWED, at="broker")
    write_public(directory / _ALLOWED / (key.name + _SUFFIX), key, at="broker")


def revoke(directory: Path, name: str) -> None:
    """Let a peer in no longer. Raises `UsageError` if none of that name is allowed."""
    check_name(name, at="broker")
    try:
        (directory / _ALLOWED / (name + _SUFFIX)).unlink()
    except OSError as error:
        raise UsageError(
            f"no key {name!r} can be revoked in {directory}: {error.strerror}",
            side="broker",
            hint="See who is let in: trunkline keys list",
        ) from None


def own_key(directory: Path) -> SecretKey:
    """The broker's own secret key. Raises `UsageError` unless there is exactly one."""
    secrets = [key for key in map(read_secret, sorted(directory.glob("*.secret"))) if key.role == "broker"]
    if not secrets:
        raise UsageError(
            f"{directory} holds no broker's secret key",
            side="broker",
            hint=f"Make one: trunkline keys new NAME --role broker --dir {directory}",
        )
    if len(secrets) > 1:
        raise UsageError(
            f"{directory} holds the secret keys of several brokers: {', '.join(key.name for key in secrets)}",
            side="broker",
            hint="Give each broker a directory of its own.",
        )
    return secrets[0]


def _stamp(directory: Path) -> Stamp:
    """One entry for every key file."""
    entries = []
    try:
        files = os.scandir(directory)
    except FileNotFoundError:
        return frozenset()
    with files:
        for file in files:
            with contextlib.suppress(FileNotFoundError):  # Removed just now.
                about = file.stat()
                entries.append((file.name, about.st_mtime_ns, about.st_size, about.st_ino))
    return frozenset(entry for entry in entries if entry[0].endswith(_SUFFIX))
