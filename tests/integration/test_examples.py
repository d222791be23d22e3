"""The examples: every command line in them is one that this program takes, and deadlines fit together.

Docker is not needed, and so nothing here shows that an image builds.
"""

import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from trunkline import cli

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
UNITS = sorted(EXAMPLES.glob("systemd/*.service"))
SECONDS = {"s": 1, "m": 60}


def understood(arguments: list[str]) -> click.Context:
    """Parse a command line as the program would, and carry nothing out."""
    context = cli.make_context("trunkline", list(arguments))
    command: click.Command = cli
    while isinstance(command, click.Group):
        name, found, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert name is not None, arguments
        assert found is not None, arguments
        command, context = found, found.make_context(name, rest, parent=context)
    return context


def unit(path: Path) -> dict[str, str]:
    lines = (line.partition("=") for line in path.read_text().splitlines() if "=" in line and line[0] != "#")
    return {key: value for key, _, value in lines}


def services() -> dict[str, Any]:
    return yaml.safe_load((EXAMPLES / "compose.yaml").read_text())["services"]


def test_there_are_units_for_broker_and_worker() -> None:
    assert [path.stem for path in UNITS] == ["trunkline-broker", "trunkline-worker"]


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_a_units_command_is_understood_and_has_time_to_end(path: Path) -> None:
    settings = unit(path)
    program, *arguments = shlex.split(settings["ExecStart"])
    assert Path(program).name == "trunkline"
    given = understood(arguments).params
    assert int(settings["TimeoutStopSec"]) > given.get("drain", 0) + 5
    assert settings["Restart"] == "on-failure"
    assert settings["NoNewPrivileges"] == "yes"
    assert settings["ProtectSystem"] == "strict"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_systemd_reads_a_unit(path: Path, tmp_path: Path) -> None:
    text = path.read_text().replace("/opt/trunkline/bin/trunkline", "/bin/true")
    (tmp_path / path.name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / path.name)], capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["broker", "worker"])
def test_a_services_commands_are_understood_and_it_has_time_to_end(name: str) -> None:
    service = services()[name]
    given = understood(service["command"])
    assert given.info_name == name
    grace = service["stop_grace_period"]
    assert int(grace[:-1]) * SECONDS[grace[-1]] > given.params.get("drain", 0) + 5
    check = service["healthcheck"]
    how, program, *arguments = check["test"]
    assert (how, program) == ("CMD", "trunkline")
    asked = understood(arguments)
    assert asked.info_name == "status"
    assert asked.params["timeout"] < int(check["timeout"][:-1]), "it ends with a line of its own"


def test_the_image_runs_the_program_itself() -> None:
    """A shell in between would keep SIGTERM to itself."""
    assert 'ENTRYPOINT ["trunkline"]' in (EXAMPLES / "Dockerfile").read_text()
    assert services()["broker"]["build"]["dockerfile"] == "examples/Dockerfile"
    assert (EXAMPLES.parent / services()["broker"]["build"]["dockerfile"]).is_file()
