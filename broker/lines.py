"""Which peer is at the other end of which connection, and how it is.

ZeroMQ names connections by file descriptor where it tells of their end, and by route where messages
pass; a message's metadata has both.
"""

from collections.abc import Iterable

from broker.pulse import quiet_for

_LOOKS = 5
"""How often a peer is probed after its connection ended. ZeroMQ tells of that a moment before it stops
taking messages for it."""


class Lines:
    """The connections of a socket that listens."""

    def __init__(self) -> None:
        self._routes: dict[int, bytes] = {}
        self._connections: dict[bytes, int] = {}
        self._doubted: dict[bytes, int] = {}

    def attached(self, route: bytes, connection: int) -> None:
        """Somebody attached over this connection. Whoever had one of the same number has none now."""
        self._end(connection, unless=route)
        self._routes[connection], self._connections[route] = route, connection

    def quiet_for(self, route: bytes) -> float | None:
        """Seconds since the last byte of this peer; None if that cannot be told."""
        return quiet_for(self._connections.get(route))

    def doubtful(self, ended: Iterable[int]) -> list[bytes]:
        """Given the connections that have ended since: peers that may be gone, to be probed now.

        The number of a connection that ended may be another's by now, so these are not surely gone.
        """
        for connection in ended:
            self._end(connection)
        probed = list(self._doubted)
        self._doubted = {route: looks - 1 for route, looks in self._doubted.items() if looks > 1}
        return probed

    def _end(self, connection: int, unless: bytes | None = None) -> None:
        route = self._routes.get(connection)
        if route is not None and route != unless:
            self._doubted[route] = _LOOKS
            if unless is not None:
                self._connections.pop(route, None)
