"""The error tree. Every message says what happened, whose side it was on, and what to do.

An error that crosses the wire travels as `codec.messages.Error` and is raised again on the other
side as the class its `code` names (`from_code`), so a silo sees the worker's own words.
"""

from typing import ClassVar, Literal

Side = Literal["silo", "broker", "worker"]


class TrunklineError(Exception):
    """Base of all errors Trunkline raises on purpose.

    `what` is one sentence about what happened, `side` whose it is, `hint` what to do about it.
    """

    code: ClassVar[str] = "error"
    side: ClassVar[Side] = "silo"

    def __init__(self, what: str, *, hint: str = "", side: Side | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint
        self.at: Side = side or type(self).side

    def __str__(self) -> str:
        return f"{self.what} [{self.at}]" + (f" {self.hint}" if self.hint else "")


class UsageError(TrunklineError):
    """An option or a combination of options that cannot work."""

    code = "usage"


class DataError(TrunklineError):
    """Bad input text; `what` names the file and the line."""

    code = "data"


class ModelError(TrunklineError):
    """A model that cannot be found, read or split."""

    code = "model"


class MismatchError(TrunklineError):
    """Two sides hold different models, plans or partitions."""

    code = "mismatch"


class SaveError(TrunklineError):
    """A file could not be written; nothing half-written was left behind."""

    code = "save"


class FrameError(TrunklineError):
    """A tensor frame that does not say the truth about itself, or exceeds a limit."""

    code = "frame"


class ProtocolError(TrunklineError):
    """A message that cannot be decoded, or that is not allowed in this state."""

    code = "protocol"


class LinkError(TrunklineError):
    """The broker cannot be reached, or the connection to it was lost."""

    code = "link"
    side = "broker"


class RefusedError(TrunklineError):
    """The broker does not let this peer in: its key is not allowed, revoked, or of another role."""

    code = "refused"
    side = "broker"


class DeadlineError(TrunklineError):
    """An answer did not come in time."""

    code = "deadline"
    side = "worker"


class UnavailableError(TrunklineError):
    """No worker can serve this now: none attached, gone, or over a limit. Trying again may help."""

    code = "unavailable"
    side = "worker"


class NobodyError(UnavailableError):
    """No worker is attached to this broker at all. One may come, and another broker may have some."""

    code = "nobody"


class EndedError(TrunklineError):
    """The run is over before its last step: one of its silos left it."""

    code = "ended"


class UnknownNameError(TrunklineError):
    """No session, run or adapter of that name belongs to the asker."""

    code = "unknown-name"


class LimitError(TrunklineError):
    """A request over a quota or a memory budget."""

    code = "limit"
    side = "worker"


_BY_CODE: dict[str, type[TrunklineError]] = {
    cls.code: cls
    for cls in (
        UsageError,
        DataError,
        ModelError,
        MismatchError,
        SaveError,
        FrameError,
        ProtocolError,
        LinkError,
        RefusedError,
        DeadlineError,
        UnavailableError,
        NobodyError,
        EndedError,
        UnknownNameError,
        LimitError,
    )
}


def from_code(code: str, what: str, hint: str, side: Side) -> TrunklineError:
    """The error a peer reported, rebuilt here; an unknown code becomes the base class."""
    return _BY_CODE.get(code, TrunklineError)(what, hint=hint, side=side)
