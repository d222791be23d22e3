"""Where a broker listens: `tcp://host:port`, beyond loopback only with keys."""

from collections.abc import Sequence
from urllib.parse import urlsplit

from codec.errors import LinkError, UsageError

_LOOPBACK = {"127.0.0.1", "localhost", "::1"}


def check_endpoint(endpoint: str, *, free_port: bool = False, keys: bool = False) -> None:
    """Refuse what is not `tcp://host:port`, and without `keys` any host beyond loopback.

    Port 0, any free one, is for listening: `free_port`. Raises `UsageError`.
    """
    try:
        parts = urlsplit(endpoint)
        port, host = parts.port, parts.hostname or ""
    except ValueError:
        raise _malformed(endpoint) from None
    if port is None or not host or endpoint.lower() != f"tcp://{parts.netloc.lower()}" or parts.username:
        raise _malformed(endpoint)
    if port == 0 and not free_port:
        raise UsageError(f"{endpoint} names no port", hint="Give the port that the broker listens on.")
    if host not in _LOOPBACK and not keys:
        raise UsageError(
            f"{endpoint} is beyond loopback, and without keys friend and stranger look the same",
            side="broker",
            hint="Make keys (trunkline keys --help), or use 127.0.0.1 and a tunnel (ssh -L, WireGuard).",
        )


def is_ipv6(endpoint: str) -> bool:
    """Whether ZeroMQ must be told to use IPv6 for this endpoint."""
    return "[" in endpoint


def no_answer(endpoints: Sequence[str], waited: str) -> LinkError:
    """What is said when nobody answered at any of them; `waited` as in "for 30 s"."""
    return LinkError(
        f"no broker answered at {', '.join(endpoints)} {waited}",
        hint=f"Start one (trunkline broker --listen {endpoints[0]}), or check --broker.",
    )


def _malformed(endpoint: str) -> UsageError:
    return UsageError(f"{endpoint!r} is not an endpoint", hint="Write it as tcp://127.0.0.1:7555.")
