"""`trunkline silo` given nonsense: one clear line, the right exit code, nothing written."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest

from trunkline import main

NOWHERE = ["--broker", "tcp://127.0.0.1:1", "--wait", "1", "--model"]
"""Nothing listens on port 1."""

CASES: dict[str, tuple[list[str], str]] = {
    "an unknown model": (
        ["generate", *NOWHERE, "no-such-model", "--prompt", "hi"],
        "no model at 'no-such-model' [silo] Give a directory, ",
    ),
    "no trunk left": (
        ["generate", *NOWHERE, "TINY", "--head", "4", "--tail", "2", "--prompt", "hi"],
        "a head of 4 and a tail of 2 leave no trunk of 6 blocks [silo] choose ",
    ),
    "no broker": (
        ["generate", *NOWHERE, "TINY", "--prompt", "hi"],
        "no broker answered at tcp://127.0.0.1:1 for 1 s [broker] Start one ",
    ),
    "a malformed line": (
        ["train", *NOWHERE, "TINY", "--data", "DATA", "--out", "OUT"],
        "DATA, line 2: not JSON: Expecting value at column 1 [silo]",
    ),
    "two kinds of noise": (
        ["eval", *NOWHERE, "TINY", "--noise", "0.1", "--noise-abs", "1", "--data", "DATA", "--json", "OUT"],
        "give one of --noise, --noise-abs and --noise-mean-abs [silo]",
    ),
    "no prompt": (
        ["generate", *NOWHERE, "TINY", "--json", "OUT"],
        "nothing to answer [silo] Give --prompt TEXT or --prompts FILE.",
    ),
    "bytes for a prompt": (
        ["generate", *NOWHERE, "TINY", "--raw", "--prompt", "\udcff"],
        "not text: surrogates not allowed at character 0 [silo]",
    ),
    "a file of bytes": (
        ["generate", *NOWHERE, "TINY", "--prompts", "BYTES"],
        "BYTES is not UTF-8 text: ",
    ),
}
FRONT_DOOR = "a malformed line"
"""Run as `python -m trunkline`; the others are forked from one process that has imported all."""

FORKED = """
import json, os, sys, traceback
import silo_agent.generation, silo_agent.options, silo_agent.query_commands, silo_agent.train_command
import trunkline
for number, arguments in enumerate(json.load(sys.stdin)):
    if os.fork() == 0:
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{number}.{name}", os.O_CREAT | os.O_WRONLY), descriptor)
        code = 0
        try:
            trunkline.main(arguments)
        except SystemExit as exit:
            code = exit.code
        except BaseException:
            traceback.print_exc()
            code = 99
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("cli")
    good = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}'
    (home / "DATA").write_text(f"{good}\nnot json\n")
    (home / "BYTES").write_bytes(b"\xff\xfe\n")
    return home


@pytest.fixture(scope="module")
def outcomes(place: Path, tiny: Any, repository: Path, tmp_path_factory: Any) -> dict[str, Outcome]:
    names = {"TINY": str(tiny.path), **{name: str(place / name) for name in ("DATA", "OUT", "BYTES")}}
    commands = {
        case: ["silo", *(names.get(word, word) for word in words)] for case, (words, _) in CASES.items()
    }
    where = {**os.environ, "PYTHONPATH": str(repository)}
    command = [sys.executable, "-m", "trunkline", *commands.pop(FRONT_DOOR)]
    done = subprocess.run(command, cwd=place.parent, env=where, capture_output=True, text=True)
    found = {FRONT_DOOR: Outcome(done.returncode, done.stdout, done.stderr)}
    home = tmp_path_factory.mktemp("outputs")
    done = subprocess.run(
        [sys.executable, "-c", FORKED],
        cwd=home,
        env=where,
        input=json.dumps(list(commands.values())),
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    for number, (case, code) in enumerate(zip(commands, done.stdout.split(), strict=True)):
        said = [(home / f"{number}.{name}").read_text() for name in ("out", "err")]
        found[case] = Outcome(int(code), *said)
    return found


@pytest.mark.parametrize("case", CASES)
def test_one_clear_line_and_exit_code_1(outcomes: dict[str, Outcome], place: Path, case: str) -> None:
    done, expected = outcomes[case], CASES[case][1]
    for name in ("DATA", "BYTES"):
        expected = expected.replace(name, str(place / name))
    assert done.err.startswith(f"trunkline: {expected}")
    assert done.err.count("\n") == 1
    assert (done.code, done.out) == (1, "")
    assert sorted(path.name for path in place.iterdir()) == ["BYTES", "DATA"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["generate", "--model", "tiny", "--prompt", "hi"], "Missing option '--broker'"),
        (["generate", *NOWHERE, "tiny", "--prompt", "hi", "--noise", "much"], "'much' is not a valid float"),
        (["generate", *NOWHERE, "tiny", "--prompt", "hi", "--max-tokens", "0"], "--max-tokens"),
        (["chat", *NOWHERE, "tiny", "--context", "0"], "--context"),
        (["train", *NOWHERE, "tiny", "--data", "x"], "Missing option '--out'"),
        (["train", *NOWHERE, "tiny", "--window", "0"], "0 is neither auto nor a number of 1 or more"),
        (["train", *NOWHERE, "tiny", "--window", "few"], "few is neither auto nor a number"),
    ],
)
def test_options_that_click_refuses(
    capsys: pytest.CaptureFixture[str], arguments: list[str], why: str
) -> None:
    """Refused before anything is imported or done, so this needs no process of its own."""

    with pytest.raises(SystemExit) as caught:
        main(["silo", *arguments])
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert why in said.err
    assert "Traceback" not in said.err
    assert said.out == ""


def test_members_mean_the_same_however_they_are_written() -> None:
    from silo_agent.train_command import train_command

    (option,) = [option for option in train_command.params if option.name == "members"]
    context = click.Context(train_command)
    for written in ("south,north", "north, south"):
        assert option.process_value(context, written) == ("north", "south")
    assert option.process_value(context, None) == ()
