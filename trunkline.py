"""The front door: one program whose commands are loaded only when they are called.

`trunkline broker` therefore never imports torch.
"""

import importlib
import sys
from typing import Any

import click

from codec.errors import TrunklineError

COMMANDS = {
    "demo": ("silo_agent.demo.commands", "demo"),
    "broker": ("broker.commands", "broker"),
    "status": ("broker.status_command", "status"),
    "keys": ("broker.keys_command", "keys"),
    "worker": ("workers.commands", "worker"),
    "silo": ("silo_agent.commands", "silo"),
    "audit": ("silo_agent.audit.command", "audit"),
    "models": ("workers.commands", "models"),
    "bench": ("benchmarks.commands", "bench"),
    "relay": ("benchmarks.relay_command", "relay"),
}
SUMMARIES = {
    "demo": "Broker, worker and two silos on this machine: fine-tune, then generate.",
    "broker": "Route messages between silos and workers.",
    "status": "Ask a broker who is attached; exit code 0 if work can be done.",
    "keys": "Make keys, and say whose a broker lets in.",
    "worker": "Host a span of a model's blocks for silos.",
    "silo": "Train, generate, chat and evaluate with private text.",
    "audit": "Attack what this silo would send, and show what can be read.",
    "models": "Models that Trunkline knows by name.",
    "bench": "Measure, one question per benchmark.",
    "relay": "Make the way to a broker slow, for measuring.",
}


class Commands(click.Group):
    """A group that imports a command's module when it is called, not to list it."""

    def list_commands(self, _: click.Context) -> list[str]:
        """Names only; nothing is imported."""
        return list(COMMANDS)

    def get_command(self, _: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module that holds the command."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, _: click.Context, formatter: click.HelpFormatter) -> None:
        """The listing in `--help`, from the summaries above."""
        with formatter.section("Commands"):
            formatter.write_dl(list(SUMMARIES.items()))


@click.command(cls=Commands)
@click.version_option(package_name="trunkline")
def cli() -> None:
    """Fine-tune and query one large model together; every owner's text stays at home.

    \b
    Examples:
      trunkline demo
      trunkline broker
      trunkline worker --broker tcp://127.0.0.1:7555 --model smollm2-135m
      trunkline silo generate --broker tcp://127.0.0.1:7555 --model smollm2-135m --prompt "Hello"
    """


def main(arguments: list[str] | None = None) -> Any:
    """Run the program; an error of ours is one clear line and exit code 1."""
    try:
        return cli.main(arguments, prog_name="trunkline")
    except TrunklineError as error:
        click.echo(f"trunkline: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
