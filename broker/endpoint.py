"""Where a broker listens: `tcp://host:port`, on loopback only until there are keys."""

from urllib.parse import urlsplit

from codec.errors import UsageError

_LOOPBACK = {"127.0.0.1", "localhost", "::1"}


def check_endpoint(endpoint: str) -> None:
    """Refuse what is not `tcp://host:port`, and any host beyond loopback: it would be open to all.

    Raises `UsageError`.
    """
    parts = urlsplit(endpoint)
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme != "tcp" or not parts.hostname or port is None:
        raise UsageError(f"{endpoint!r} is not an endpoint", hint="Write it as tcp://127.0.0.1:7555.")
    if parts.hostname not in _LOOPBACK:
        raise UsageError(
            f"{endpoint} is beyond loopback, and this version has no keys to tell friend from stranger",
            side="broker",
            hint="Listen on 127.0.0.1 and reach it through an authenticated tunnel (ssh -L, WireGuard).",
        )
