"""Who may attach to a broker with keys. Decisions only; the sockets are `broker.door`'s.

ZeroMQ asks at every handshake (ZAP, rfc.zeromq.org/spec/27) and from then on marks what comes over
the connection with its public key. A connection keeps its key, so it is looked at when a peer
attaches and not for every message.
"""

import hashlib
from collections.abc import Container, Iterator, Sequence

import msgspec
from zmq.utils import z85

from broker.keyring import KeyRing
from broker.keys import PublicKey
from codec.errors import RefusedError
from codec.messages import Attach

DOMAIN = b"trunkline"
_VERSION = b"1.0"


class Gate:
    """Lets in the holders of allowed keys, each in its role and under its own name."""

    def __init__(self, ring: KeyRing) -> None:
        self.ring = ring
        self._holders: dict[bytes, PublicKey] = {}

    def answer(self, request: Sequence[bytes]) -> tuple[list[bytes], str]:
        """ZeroMQ's question whether a key may connect: the reply, and the key if it may not."""
        version, number, domain, _, _, mechanism, *credentials = request
        key = z85.encode(credentials[0]).decode() if mechanism == b"CURVE" else ""
        if version == _VERSION and domain == DOMAIN and self._known(key):
            return [_VERSION, number, b"200", b"", key.encode(), b""], ""
        return [_VERSION, number, b"400", b"not allowed", b"", b""], key

    def _known(self, key: str) -> bool:
        # It may have been allowed a moment ago; a look at the directory costs less than the handshake did.
        return self.ring.holder(key) is not None or (
            self.ring.refresh() and self.ring.holder(key) is not None
        )

    def admit(self, route: bytes, key: str, attach: Attach) -> Attach:
        """The introduction of who came over a connection with `key`, as the router may believe it.

        The name becomes the key's. The secret identity is bound to the key: under another key the
        same 16 bytes are another peer, who finds nothing of the first one's.

        Raises `RefusedError` for a key that is not allowed (any more) or is of another role.
        """
        holder = self.holder(key)
        if holder.role != attach.role:
            raise RefusedError(
                f"this key is a {holder.role}'s and cannot act as a {attach.role}'s",
                side=attach.role,
                hint=f"Make one with: trunkline keys new NAME --role {attach.role}",
            )
        self._holders[route] = holder
        bound = hashlib.blake2b(attach.peer, key=key.encode(), digest_size=16).digest()
        return msgspec.structs.replace(attach, name=holder.name, peer=bound)

    def holder(self, key: str) -> PublicKey:
        """Whose key it is. Raises `RefusedError` if it is not allowed (any more)."""
        holder = self.ring.holder(key)
        if holder is None:
            raise _revoked()
        return holder

    def revoked(self, attached: Container[bytes]) -> Iterator[tuple[bytes, RefusedError]]:
        """Of the `attached` routes those whose key is allowed no longer, and what to tell them."""
        for route, holder in list(self._holders.items()):
            if route not in attached:
                del self._holders[route]
            elif self.ring.holder(holder.key) != holder:
                del self._holders[route]
                yield route, _revoked()


def _revoked() -> RefusedError:
    return RefusedError(
        "the broker's operator has revoked this key",
        hint="Ask for it to be allowed again: trunkline keys allow",
    )
