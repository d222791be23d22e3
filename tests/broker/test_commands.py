"""`trunkline broker` as a process: what it prints, how it ends, what it refuses."""

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from codec.messages import Error


@pytest.fixture
def trunkline(repository: Path) -> Iterator[Any]:
    """`trunkline(...)`: the program, started; killed after the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "trunkline", *arguments],
                cwd=repository,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        with process:
            process.kill()


def lines(process: subprocess.Popen[str], number: int) -> list[str]:
    assert process.stdout is not None
    return [process.stdout.readline().rstrip("\n") for _ in range(number)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_where_it_listens_and_ends_when_asked(
    trunkline: Any, number: int, connect: Any, introduce: Any, ask: Any, opening: Any
) -> None:
    process = trunkline("broker", "--listen", "tcp://127.0.0.1:0")
    (line,) = lines(process, 1)
    assert re.fullmatch(r"listening on tcp://127\.0\.0\.1:\d+", line)
    silo = connect(line.removeprefix("listening on "), introduce("silo"))
    answer = ask(silo, opening("s", id=1)).header
    assert isinstance(answer, Error)
    assert "no worker is attached" in answer.what
    begun = time.monotonic()
    os.kill(process.pid, number)
    assert process.wait(10) == 0
    assert time.monotonic() - begun < 2
    stderr = process.stderr.read()
    assert "Traceback" not in stderr
    assert '"event": "peers"' in stderr


def test_it_serves_metrics(trunkline: Any) -> None:
    process = trunkline("broker", "--listen", "tcp://127.0.0.1:0", "--metrics", "127.0.0.1:0")
    metrics, listening = lines(process, 2)
    assert listening.startswith("listening on ")
    url = metrics.removeprefix("metrics at ")
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/metrics", url)
    with urllib.request.urlopen(url, timeout=10) as response:
        assert response.headers["Content-Type"].startswith("text/plain")
        assert 'trunkline_peers{role="worker"} 0.0' in response.read().decode()
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(2) == 0


def test_help_has_examples(trunkline: Any) -> None:
    process = trunkline("broker", "--help")
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert len(re.findall(r"^ +trunkline broker", out.partition("Examples:")[2], re.M)) >= 2
    for option in ("--listen", "--metrics", "--silence"):
        assert option in out


def test_a_taken_port_is_one_clear_line(trunkline: Any, start_broker: Any) -> None:
    endpoint = start_broker().endpoint
    code, line = refusal(trunkline("broker", "--listen", endpoint))
    assert code == 1
    assert line.startswith(f"trunkline: the broker cannot listen on {endpoint}: Address already in use")
    assert "--listen" in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--listen", "tcp://0.0.0.0:0"], "beyond loopback"),
        (["--listen", "here"], "is not an endpoint"),
        (["--listen", "tcp://127.0.0.1:0", "--metrics", "nowhere"], "metrics cannot be served"),
    ],
)
def test_what_it_cannot_do_is_one_clear_line(trunkline: Any, arguments: list[str], says: str) -> None:
    code, line = refusal(trunkline("broker", *arguments))
    assert code == 1
    assert line.startswith("trunkline: ")
    assert says in line


def refusal(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = process.communicate(timeout=30)
    assert out == ""
    (line,) = err.splitlines()
    return process.returncode, line


def test_its_options_are_the_quotas(
    trunkline: Any, connect: Any, introduce: Any, ask: Any, opening: Any
) -> None:
    most = ("--max-requests", "9", "--max-mib", "1")
    (line,) = lines(trunkline("broker", "--listen", "tcp://127.0.0.1:0", *most), 1)
    link = connect(line.removeprefix("listening on "), introduce("silo"))
    error = ask(link, opening("s", id=1), [bytes((1 << 20) + 1)]).header
    assert isinstance(error, Error)
    assert (error.code, f"{1 << 20} of a silo may wait" in error.what) == ("limit", True)
