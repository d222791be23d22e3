"""What a worker leaves where its death does not take it: the message it is at, in shared memory."""

import mmap
import struct
from pathlib import Path

_SIZE = 1 << 20
_HEAD = struct.Struct("<QQ")
_STOP = _SIZE - 1


class Slot:
    """One worker's, a file that both sides map: an index, a message, and the wish to stop."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        with path.open("w+b" if create else "r+b") as file:
            file.truncate(_SIZE)
            self._memory = mmap.mmap(file.fileno(), _SIZE)

    def put(self, index: int, data: bytes) -> bool:
        """The worker's side, before it reads the message `data`. False if it is to stop instead."""
        self._memory[_HEAD.size : _HEAD.size + len(data)] = data
        _HEAD.pack_into(self._memory, 0, index, len(data))
        return not self._memory[_STOP]

    @property
    def index(self) -> int:
        """Where the worker is."""
        return int(_HEAD.unpack_from(self._memory)[0])

    @property
    def begun(self) -> bool:
        """Whether the worker has come to a message at all."""
        return bool(_HEAD.unpack_from(self._memory)[1])

    def message(self) -> bytes:
        """The message that the worker is at; empty if it never came to one."""
        size = int(_HEAD.unpack_from(self._memory)[1])
        return self._memory[_HEAD.size : _HEAD.size + size]

    def stop(self) -> None:
        """Ask the worker to end its round here."""
        self._memory[_STOP] = 1
