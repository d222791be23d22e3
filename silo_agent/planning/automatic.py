"""`--partition auto`: the head and the tail that this machine bears."""

import dataclasses

import click

from codec.errors import UsageError
from codec.plan import LoraPlan
from silo_agent.options import SiloOptions
from silo_agent.planning.work import Work

partition_option = click.option(
    "--partition",
    type=click.Choice(["fixed", "auto"]),
    default="fixed",
    show_default=True,
    help="auto: --head and --tail are wishes, and fewer blocks are kept where memory is short (`silo plan`).",
)


def settled(options: SiloOptions, partition: str, work: Work, lora: LoraPlan | None = None) -> SiloOptions:
    """The options, with `auto` those of a partition that fits, which is then said on stderr.

    Raises what `measure_machine` and `propose` raise.
    """
    if partition == "fixed":
        return options
    from codec.partition import Partition
    from silo_agent.planning.measuring import measure_machine
    from silo_agent.planning.proposal import Wishes, named, propose
    from silo_agent.planning.reasons import why_partition
    from workers.checkpoint import Checkpoint

    wishes = Wishes(Partition(options.head, options.tail), work)
    measured = measure_machine(options, Checkpoint(options.model), work, lora or LoraPlan())
    proposal = propose(measured, wishes)
    chosen = proposal.chosen
    why = why_partition(measured, wishes, proposal)
    click.echo(
        f"partition: {named(chosen.partition)} ({why}; {1e3 * chosen.silo_s:.2f} s for 1,000 tokens here)",
        err=True,
    )
    return dataclasses.replace(options, head=chosen.partition.head, tail=chosen.partition.tail)


def check_alone(partition: str, silos: int) -> None:
    """Raises `UsageError` where other silos would have to pick the same."""
    if partition == "auto" and silos > 1:
        raise UsageError(
            f"all {silos} silos of a run keep the same blocks, and auto looks at this machine alone",
            hint="See what each bears with trunkline silo plan, and give all the smallest --head and --tail.",
        )
