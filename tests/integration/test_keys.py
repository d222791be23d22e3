"""A broker open to the network, a worker and a silo with keys: as docs/security.md sets it up."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from codec.errors import TrunklineError
from silo_agent.processes import Processes

Run = Callable[..., "subprocess.CompletedProcess[str]"]
TINY = ("--model", "tiny", "--head", "1", "--tail", "2")
ASK = ("--prompt", "A short note", "--max-tokens", "8")


def test_keys_from_end_to_end(processes: Processes, trunkline: Run, tmp_path: Path) -> None:
    def keys(*arguments: str) -> None:
        done = trunkline("keys", *arguments)
        assert done.returncode == 0, done.stderr

    keys("new", "hub", "--role", "broker", "--dir", "hub")
    keys("new", "gpu1", "--role", "worker", "--dir", "gpu")
    keys("new", "north", "--role", "silo", "--dir", "north")
    keys("allow", "gpu/gpu1.public", "--role", "worker", "--dir", "hub")
    open_to_all = processes.broker("--listen", "tcp://0.0.0.0:0", "--keys", str(tmp_path / "hub"))
    endpoint = open_to_all.replace("0.0.0.0", "127.0.0.1")
    broker_key = ("--broker-key", str(tmp_path / "hub" / "hub.public"))
    gpu1, north = tmp_path / "gpu" / "gpu1.secret", tmp_path / "north" / "north.secret"
    worker = processes.start(
        "worker", "worker", "--broker", endpoint, "--model", "tiny", "--key", str(gpu1), *broker_key
    )

    def generate(*given: str) -> "subprocess.CompletedProcess[str]":
        return trunkline("silo", "generate", "--broker", endpoint, *TINY, *ASK, *given)

    with_key = ("--key", str(north), *broker_key)
    refused = generate(*with_key)
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    assert "refused this key, 'north'" in refused.stderr.splitlines()[-1]

    keys("allow", "north/north.public", "--role", "silo", "--dir", "hub")
    answer = generate(*with_key, "--json", "answer.json")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip()
    settings = json.loads((tmp_path / "answer.json").read_text())["settings"]
    assert settings["key"] == str(north), "which key, and nothing of what is in it"

    keys("revoke", "gpu1", "--dir", "hub")
    with pytest.raises(TrunklineError, match="has revoked this key"):
        worker.wait(20)
