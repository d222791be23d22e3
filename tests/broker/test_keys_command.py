"""`trunkline keys` and a broker with keys as processes: what they print, and what they refuse."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.key_files import link_keys, read_public
from codec.errors import RefusedError
from codec.messages import Error


@pytest.fixture
def trunkline(repository: Path, tmp_path: Path) -> Any:
    """`trunkline(...)`: stdout of a command that succeeds, run in the test's own directory."""

    def run(*arguments: str, fails: bool = False) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "trunkline", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(repository)},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert (done.returncode != 0) == fails, done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr if fails else done.stdout

    return run


@pytest.fixture
def hub(trunkline: Any, repository: Path, tmp_path: Path) -> Iterator[str]:
    """A broker process with keys in `keys`; its endpoint."""
    trunkline("keys", "new", "hub", "--role", "broker")
    process = subprocess.Popen(
        [sys.executable, "-m", "trunkline", "broker", "--listen", "tcp://0.0.0.0:0", "--keys", "keys"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(repository)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        assert process.stdout is not None
        line = process.stdout.readline()
        yield "tcp://127.0.0.1:" + line.strip().rpartition(":")[2]
        process.terminate()
        assert process.wait(5) == 0


def test_from_a_new_key_to_a_revoked_one(
    hub: str, trunkline: Any, tmp_path: Path, connect: Any, introduce: Any, opening: Any, ask: Any
) -> None:
    trunkline("keys", "new", "north", "--role", "silo", "--dir", "home")
    keys = link_keys(tmp_path / "home" / "north.secret", str(tmp_path / "keys" / "hub.public"), "silo")
    refused = connect(hub, introduce("silo"), keys=keys)
    with pytest.raises(RefusedError) as caught:
        refused.receive(10)
    # The command that the silo is told to have run is the one that helps.
    hint = re.search(r"trunkline keys allow '(.+)' --role silo --name north", caught.value.hint)
    assert hint is not None
    assert (
        trunkline("keys", "allow", hint[1], "--role", "silo", "--name", "north") == "silo north is allowed\n"
    )
    silo = connect(hub, introduce("silo"), keys=keys)
    answer = ask(silo, opening("s", id=1)).header
    assert isinstance(answer, Error)
    assert "no worker is attached" in answer.what
    begun = time.monotonic()
    assert trunkline("keys", "revoke", "north") == "north is revoked\n"
    with pytest.raises(RefusedError, match="revoked"):
        silo.receive(10)
    assert time.monotonic() - begun < 5


def test_list_shows_the_broker_and_whom_it_lets_in(trunkline: Any, tmp_path: Path) -> None:
    assert "holds no broker's secret key" in trunkline("keys", "list", fails=True)
    for role, name in (("broker", "hub"), ("silo", "north"), ("worker", "gpu1"), ("silo", "not-allowed")):
        trunkline("keys", "new", name, "--role", role)
    trunkline("keys", "allow", "keys/north.public", "--role", "silo")
    trunkline("keys", "allow", "keys/gpu1.public", "--role", "worker", "--name", "gpu-one")
    listed = json.loads(trunkline("keys", "list", "--json"))
    expected = [("broker", "hub", "hub"), ("worker", "gpu-one", "gpu1"), ("silo", "north", "north")]
    assert listed == [
        {"role": role, "name": name, "key": read_public(tmp_path / "keys" / f"{file}.public").key}
        for role, name, file in expected
    ]
    table = trunkline("keys", "list")
    for row in listed:
        assert re.search(rf"^ *{row['role']} +{row['name']} +{re.escape(row['key'])} *$", table, re.M)
    assert "not-allowed" not in table


def test_new_says_where_and_what_next(trunkline: Any, tmp_path: Path) -> None:
    told = trunkline("keys", "new", "north", "--role", "silo", "--dir", "here")
    assert told.splitlines() == [
        "here/north.secret: secret, stays on this machine",
        "here/north.public: public, for the broker: trunkline keys allow north.public --role silo",
    ]
    assert (tmp_path / "here" / "north.secret").read_text().split()[3] not in told


def test_what_cannot_be_done_is_one_clear_line(trunkline: Any) -> None:
    trunkline("keys", "new", "hub", "--role", "broker")
    trunkline("keys", "new", "north", "--role", "silo")
    for arguments, says in (
        (["new", "north", "--role", "silo"], "keys/north.public exists already"),
        (["new", "../north", "--role", "silo"], "cannot be a key's name"),
        (["new", "x", "--role", "silo", "--dir", "keys/hub.secret"], "cannot be made"),
        (["allow", "keys/north.public", "--role", "worker"], "it is a silo's key"),
        (["allow", "keys/north.secret", "--role", "silo"], "it holds a secret key"),
        (["allow", "nowhere", "--role", "silo"], "No such file or directory"),
        (["allow", "Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID", "--role", "silo"], "--name"),
        (["revoke", "nobody"], "no key 'nobody' can be revoked"),
    ):
        (line,) = trunkline("keys", *arguments, fails=True).splitlines()
        assert line.startswith("trunkline: ")
        assert says in line


def test_a_broker_beyond_loopback_starts_with_keys_alone(trunkline: Any) -> None:
    for keys, says in (([], "beyond loopback"), (["--keys", "none"], "holds no broker's secret key")):
        (line,) = trunkline("broker", "--listen", "tcp://0.0.0.0:0", *keys, fails=True).splitlines()
        assert says in line


@pytest.mark.parametrize("name", ["new", "allow", "revoke", "list"])
def test_help_has_examples(trunkline: Any, name: str) -> None:
    assert re.search(rf"Examples:\n +trunkline keys {name}", trunkline("keys", name, "--help"))
