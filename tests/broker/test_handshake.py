"""What a side can find out about who does not let it in."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from broker.handshake import mechanism
from broker.key_files import link_keys, make_key
from broker.keyring import KeyRing
from codec.errors import LinkError


@contextmanager
def listener(says: bytes, *, hangs_up: bool) -> Iterator[str]:
    """Somebody who is no broker."""
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)

        def serve() -> None:
            held = []
            while not ended.is_set():
                try:
                    peer, _ = server.accept()
                except TimeoutError:
                    continue
                peer.sendall(says)
                if hangs_up:
                    peer.close()
                held.append(peer)
            for peer in held:
                peer.close()

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"
        ended.set()
        thread.join(5)


def test_a_broker_says_whether_it_uses_keys(start_broker: Any, tmp_path: Path) -> None:
    make_key(tmp_path, "broker", "hub")
    assert mechanism(start_broker().endpoint) == "NULL"
    assert mechanism(start_broker(keys=KeyRing(tmp_path)).endpoint) == "CURVE"


@pytest.mark.parametrize("hangs_up", [True, False])
@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(100), b"\xff" * 5])
def test_who_is_no_broker_says_nothing(says: bytes, hangs_up: bool) -> None:
    with listener(says, hangs_up=hangs_up) as endpoint:
        begun = time.monotonic()
        assert mechanism(endpoint) is None
        assert time.monotonic() - begun < 3


def test_nobody_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert mechanism(f"tcp://127.0.0.1:{port}") is None


def test_a_tunnel_without_a_broker_is_waited_for(connect: Any, introduce: Any, tmp_path: Path) -> None:
    """It takes connections and drops them, as with a broker's key that is wrong."""
    secret, _ = make_key(tmp_path, "silo", "north")
    _, public = make_key(tmp_path, "broker", "hub")
    keys = link_keys(secret, str(public), "silo")
    with listener(b"", hangs_up=True) as endpoint:
        silo = connect(endpoint, introduce("silo"), patience=2.5, keys=keys)
        with pytest.raises(LinkError, match="no broker answered"):
            silo.receive(10)
