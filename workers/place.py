"""Where files are kept that must survive: a directory here, or anything that fsspec can open."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from codec.errors import UsageError

_PART = ".part"


class Place(Protocol):
    """Files by name. Every method raises `OSError`, or what the filesystem raises."""

    def at(self, name: str) -> "Place":
        """The place `name` within this one; it need not exist."""

    def names(self) -> list[str]:
        """What is there; empty if the place does not exist. Unfinished files end with `.part`."""

    def read(self, name: str) -> bytes:
        """A file's bytes."""

    def write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all; one that is there is replaced."""

    def claim(self, name: str) -> bool:
        """Create an empty file; False if it is there already. Of several who try, one succeeds."""

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    def clear(self) -> None:
        """Remove all files, and the place."""


def place_at(url: str) -> Place:
    """A directory, or an fsspec URL (`s3://bucket/path`). Raises `UsageError` for an unknown protocol."""
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    try:
        filesystem, path = url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UsageError(
            f"{url} cannot be opened: {error}", hint="Give a directory or an fsspec URL."
        ) from None
    return Directory(Path(path)) if isinstance(filesystem, LocalFileSystem) else Bucket(filesystem, path)


class Directory:
    """A directory of this machine. What was written is on the disk before `write` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def at(self, name: str) -> "Directory":
        """See `Place.at`."""
        return Directory(self.path / name)

    def names(self) -> list[str]:
        """See `Place.names`."""
        try:
            return sorted(os.listdir(self.path))
        except FileNotFoundError:
            return []

    def read(self, name: str) -> bytes:
        """See `Place.read`."""
        return (self.path / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        """See `Place.write`: a temporary file, synced and renamed. Nobody else may read it."""
        self._exist()
        part = self.path / (name + _PART)
        try:
            with open(os.open(part, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.path / name)
        except OSError:
            with suppress(OSError):
                part.unlink()
            raise
        _settle(self.path)

    def claim(self, name: str) -> bool:
        """See `Place.claim`: exclusive creation."""
        self._exist()
        try:
            os.close(os.open(self.path / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            return False
        _settle(self.path)
        return True

    def remove(self, name: str) -> None:
        """See `Place.remove`."""
        (self.path / name).unlink(missing_ok=True)

    def clear(self) -> None:
        """See `Place.clear`."""
        for name in reversed(self.names()):  # States before the epochs that fence them.
            self.remove(name)
        with suppress(FileNotFoundError):
            self.path.rmdir()

    def _exist(self) -> None:
        if not self.path.is_dir():
            self.path.mkdir(parents=True, exist_ok=True)
            _settle(self.path.parent)


def _settle(directory: Path) -> None:
    """A power cut does not undo what was made or renamed in it before this."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Bucket:
    """A place on an fsspec filesystem: written under a temporary name, then moved.

    `claim` is exclusive where the filesystem can create a file exclusively (mode `xb`). Elsewhere it
    looks first and writes then, and two who claim at the same moment may both succeed.
    """

    def __init__(self, filesystem: Any, path: str) -> None:
        self._filesystem, self._path = filesystem, path.rstrip("/")

    def at(self, name: str) -> "Bucket":
        """See `Place.at`."""
        return Bucket(self._filesystem, f"{self._path}/{name}")

    def names(self) -> list[str]:
        """See `Place.names`."""
        self._filesystem.invalidate_cache()
        try:
            found = self._filesystem.ls(self._path, detail=False)
        except FileNotFoundError:
            return []
        return sorted(str(path).rstrip("/").rpartition("/")[2] for path in found)

    def read(self, name: str) -> bytes:
        """See `Place.read`."""
        return bytes(self._filesystem.cat_file(f"{self._path}/{name}"))

    def write(self, name: str, data: bytes) -> None:
        """See `Place.write`."""
        self._filesystem.makedirs(self._path, exist_ok=True)
        final = f"{self._path}/{name}"
        self._filesystem.pipe_file(final + _PART, data)
        self._filesystem.mv(final + _PART, final)

    def claim(self, name: str) -> bool:
        """See `Place.claim`, and what the class says of it."""
        self._filesystem.makedirs(self._path, exist_ok=True)
        path = f"{self._path}/{name}"
        try:
            with self._filesystem.open(path, "xb"):
                return True
        except FileExistsError:
            return False
        except (ValueError, NotImplementedError):
            if self._filesystem.exists(path):
                return False
            self._filesystem.pipe_file(path, b"")
            return True

    def remove(self, name: str) -> None:
        """See `Place.remove`."""
        with suppress(FileNotFoundError):
            self._filesystem.rm_file(f"{self._path}/{name}")

    def clear(self) -> None:
        """See `Place.clear`."""
        with suppress(FileNotFoundError):
            self._filesystem.rm(self._path, recursive=True)
