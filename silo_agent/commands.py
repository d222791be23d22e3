"""`trunkline silo`: a data owner's commands."""

import click

from broker.shutdown import leave_on_sigterm
from codec import logs
from silo_agent.planning.command import plan_command
from silo_agent.query_commands import chat, evaluate_command, generate_command
from silo_agent.train_command import train_command


@click.group("silo")
def silo() -> None:
    """A data owner's side. Text, token ids and labels never leave this process."""
    logs.configure()
    leave_on_sigterm()


for _command in (plan_command, train_command, generate_command, chat, evaluate_command):
    silo.add_command(_command)
