"""`trunkline keys`."""

import dataclasses
import json
from pathlib import Path
from typing import get_args

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from broker import keyring
from broker.key_files import make_key, public_key
from broker.keys import KeyRole
from codec.errors import UsageError

_DIR = click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path),
    default="keys",
    show_default=True,
    help="Where the key files are.",
)


@click.group("keys")
def keys() -> None:
    """Make keys, and say whose a broker lets in. docs/security.md has it step by step.

    \b
    Examples:
      trunkline keys new hub --role broker
      trunkline keys new north --role silo
      trunkline keys allow north.public --role silo
      trunkline keys revoke north
    """


@keys.command("new")
@click.argument("name")
@click.option("--role", type=click.Choice(get_args(KeyRole)), required=True)
@_DIR
def new(name: str, role: KeyRole, directory: Path) -> None:
    """Make a key pair called NAME for one silo, worker or broker, on the machine that will use it.

    \b
    Examples:
      trunkline keys new north --role silo
      trunkline keys new hub --role broker --dir /etc/trunkline/keys
    """
    secret, public = make_key(directory, role, name)
    click.echo(f"{secret}: secret, stays on this machine")
    if role == "broker":
        click.echo(f"{public}: public, for silos and workers (--broker-key)")
    else:
        click.echo(f"{public}: public, for the broker: trunkline keys allow {public.name} --role {role}")


@keys.command("allow")
@click.argument("key", metavar="PUBLIC-KEY")
@click.option("--role", type=click.Choice(["silo", "worker"]), required=True, help="What it may act as.")
@click.option("--name", help="What the broker calls it.  [default: the file's]")
@_DIR
def allow(key: str, role: KeyRole, name: str | None, directory: Path) -> None:
    """Let the holder of PUBLIC-KEY, a file or the key itself, attach to the broker.

    A broker that is running hears of it within a second.

    \b
    Examples:
      trunkline keys allow north.public --role silo
      trunkline keys allow 'Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID' --role worker --name gpu1
    """
    given = public_key(key, role, at="broker")
    if not name and not given.name:
        raise UsageError("a key alone has no name", side="broker", hint="Give it one with --name.")
    named = dataclasses.replace(given, name=name or given.name)
    keyring.allow(directory, named)
    click.echo(f"{named} is allowed")


@keys.command("revoke")
@click.argument("name")
@_DIR
def revoke(name: str, directory: Path) -> None:
    """Let NAME in no longer. A broker that is running ends its connections within a second.

    \b
    Examples:
      trunkline keys revoke north
    """
    keyring.revoke(directory, name)
    click.echo(f"{name} is revoked")


@keys.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_DIR
def list_keys(directory: Path, as_json: bool) -> None:
    """Who a broker lets in, and its own public key.

    \b
    Examples:
      trunkline keys list
      trunkline keys list --json
    """
    own = keyring.own_key(directory).public
    allowed, problems = keyring.allowed(directory)
    for problem in problems:
        click.echo(f"passed over: {problem}", err=True)
    if as_json:
        rows = [{"role": key.role, "name": key.name, "key": key.key} for key in [own, *allowed]]
        click.echo(json.dumps(rows, indent=2))
        return
    table = Table("role", "name", "public key", box=None)
    for key in [own, *allowed]:
        table.add_row(key.role, key.name, Text(key.key))
    Console().print(table)
