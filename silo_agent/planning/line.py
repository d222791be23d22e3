"""How far the workers are, shown by a session in which made-up hidden states cross and nothing private."""

import contextlib
import secrets
import time
from collections.abc import Iterator

import torch

from broker.link import Link
from codec.errors import LimitError, MismatchError, ProtocolError, UnavailableError
from codec.messages import CloseSession, Extend, OpenSession, Result
from codec.partition import Span
from codec.plan import ModelCard
from silo_agent.packed import pack
from silo_agent.planning.proposal import Line
from silo_agent.remote import Remote

_TOKENS = (32, 512)
"""A small message first: if that takes long, a large one is not needed to see the line's rate."""
_ENOUGH_S = 0.5
_ECHO_S = 2.0
"""Time for the heartbeats that tell the round trip."""


def measure_line(remote: Remote, link: Link, card: ModelCard, trunk: Span, dtype: torch.dtype) -> Line:
    """Send random hidden states through the blocks `trunk` of the model `card`.

    Where no worker takes them, the line says why and has no speed. Raises `LinkError` and `DeadlineError`.
    """
    try:
        trunk_s = _trunk_seconds(remote, card, trunk, dtype)
    except (UnavailableError, MismatchError, LimitError) as error:
        return Line(link.speed, silent=error.what, encodings=link.encodings)
    until = time.monotonic() + _ECHO_S
    while link.speed is None and time.monotonic() < until:
        time.sleep(0.05)
    return Line(link.speed, trunk_s, encodings=link.encodings)


def _trunk_seconds(remote: Remote, card: ModelCard, trunk: Span, dtype: torch.dtype) -> float:
    """What workers take to compute a token."""
    seconds = 0.0
    with _session(remote, card, trunk) as session:
        for tokens in _TOKENS:
            begun = time.monotonic()
            request = Extend(session=session, rows=(0,), starts=(0,), lengths=(tokens,), wire="raw")
            packed = pack(request, [torch.randn(tokens, card.hidden, dtype=dtype)], wire="raw")
            header = remote.wait(remote.send(packed)).header
            if not isinstance(header, Result):
                raise ProtocolError("the worker answered an extend with something else", side="worker")
            seconds = header.seconds / tokens
            if time.monotonic() - begun > _ENOUGH_S:
                break
    return seconds


@contextlib.contextmanager
def _session(remote: Remote, card: ModelCard, trunk: Span) -> Iterator[str]:
    name = secrets.token_hex(8)
    opening = OpenSession(
        session=name, model=card, start=trunk.start, stop=trunk.stop, rows=1, capacity=max(_TOKENS)
    )
    remote.call(opening)
    try:
        yield name
    finally:
        remote.tell(CloseSession(session=name))
