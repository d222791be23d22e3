"""Keys: CURVE key pairs with a role and a name (rfc.zeromq.org/spec/26)."""

from dataclasses import dataclass, field
from typing import Literal

import zmq

KeyRole = Literal["silo", "worker", "broker"]


@dataclass(frozen=True, slots=True)
class PublicKey:
    """The half that others may know: `key` in Z85, and whose it is."""

    role: KeyRole
    name: str
    key: str

    def __str__(self) -> str:
        return f"{self.role} {self.name}"


@dataclass(frozen=True, slots=True)
class SecretKey:
    """The half that never leaves its machine."""

    role: KeyRole
    name: str
    secret: str = field(repr=False)

    @property
    def public(self) -> PublicKey:
        """The other half."""
        return PublicKey(self.role, self.name, zmq.curve_public(self.secret.encode()).decode())


@dataclass(frozen=True, slots=True)
class LinkKeys:
    """What a link needs: its own secret key, and the public key (Z85) that the broker must have."""

    own: SecretKey
    broker: str

    def guard(self, socket: "zmq.Socket[bytes]") -> None:
        """Encrypt and authenticate what `socket` connects to."""
        socket.curve_secretkey = self.own.secret.encode()
        socket.curve_publickey = self.own.public.key.encode()
        socket.curve_serverkey = self.broker.encode()
