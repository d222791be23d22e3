"""Which peer is at the other end of which connection, and how it is.

ZeroMQ names connections by file descriptor where it tells of their end, and by route where messages
pass; a message's metadata has both.
"""

from collections.abc import Iterable

from broker.pulse import quiet_for

_GRACE_S = 0.4
"""A peer that lives connects again and attaches within this time, and keeps what it has."""


class Lines:
    """The connections of a socket that listens."""

    def __init__(self) -> None:
        self._routes: dict[int, bytes] = {}
        self._connections: dict[bytes, int] = {}
        self._doubted: dict[bytes, float] = {}

    def attached(self, route: bytes, connection: int, now: float) -> None:
        """Somebody attached over this connection. Whoever had one of the same number has none now."""
        former = self._routes.get(connection)
        if former is not None and former != route:
            self._doubted[former] = now
            self._connections.pop(former, None)
        self._routes[connection], self._connections[route] = route, connection

    def quiet_for(self, route: bytes) -> float | None:
        """Seconds since the last byte of this peer; None if that cannot be told."""
        return quiet_for(self._connections.get(route))

    def doubtful(self, ended: Iterable[int], now: float) -> list[bytes]:
        """Given the connections that have ended since: peers that are gone by now, to be probed.

        The number of a connection that ended may be another's already, so one or the other may live.
        """
        for connection in ended:
            if (route := self._routes.get(connection)) is not None:
                self._doubted[route] = now
        due = [route for route, at in self._doubted.items() if now - at >= _GRACE_S]
        for route in due:
            del self._doubted[route]
        return due
