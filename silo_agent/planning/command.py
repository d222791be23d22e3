"""`trunkline silo plan`."""

from pathlib import Path
from typing import Any

import click

from silo_agent.options import SiloOptions, load_tokenizer, silo_options_offline
from silo_agent.planning.memory import parse_size
from silo_agent.planning.work import generating_work, lengths_of, training_work
from silo_agent.report import settings_of, write_report
from silo_agent.tasks.options import DataOptions, data_options

_COUNT = click.IntRange(min=1)


@click.command("plan")
@silo_options_offline
@data_options
@click.option(
    "--for", "purpose", type=click.Choice(["train", "generate"]), default="train", show_default=True
)
@click.option("--batch", default=4, show_default=True, type=_COUNT, help="Sequences that go together.")
@click.option("--accumulate", default=2, show_default=True, type=_COUNT, help="Micro-batches in a step.")
@click.option("--memory", metavar="SIZE", help="What may be taken, as 8GB.  [default: 80 % of what is free]")
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write what was measured and proposed here."
)
def plan_command(options: SiloOptions, data: DataOptions, **given: Any) -> None:
    """Measure this machine, the line and the data, and propose partition, noise and wire.

    --head and --tail are wishes: fewer blocks are proposed where memory is short, and never more. With
    --broker made-up hidden states are sent through a worker; nothing of the data is.

    \b
    Examples:
      trunkline silo plan --model smollm2-135m --data notes.jsonl
      trunkline silo plan --broker tcp://127.0.0.1:7555 --model smollm2-135m \\
          --task multirc --data MultiRC/train.jsonl --memory 2GB --json plan.json
    """
    from codec.partition import Partition
    from codec.plan import LoraPlan
    from silo_agent.planning.measuring import measure_machine, measure_way
    from silo_agent.planning.proposal import Wishes, propose
    from silo_agent.planning.reasons import reasons
    from silo_agent.planning.table import results_of, show
    from workers.checkpoint import Checkpoint
    from workers.families import lora_targets

    memory = None if given["memory"] is None else parse_size(given["memory"])
    noise = options.scale()
    tokenizer = load_tokenizer(options.model)
    checkpoint = Checkpoint(options.model)
    examples = data.examples(tokenizer, "train")
    batch, accumulate = given["batch"], given["accumulate"]
    lengths = lengths_of(examples, batch * accumulate)
    if given["purpose"] == "train":
        work = training_work(examples, batch=batch, accumulate=accumulate)
    else:
        work = generating_work(batch, lengths.most)
    lora = LoraPlan(targets=lora_targets(checkpoint.config, "attention"))
    wishes = Wishes(Partition(options.head, options.tail), work)
    machine = measure_machine(options, checkpoint, work, lora, memory)
    chosen = propose(machine, wishes).chosen.partition
    measured = measure_way(machine, options, checkpoint, work, chosen)
    proposal = propose(measured, wishes)
    why = reasons(measured, wishes, noise, proposal)
    show(lengths, measured, wishes, proposal, why)
    settings = settings_of(options, data) | {name: given[name] for name in ("purpose", "batch", "accumulate")}
    results = results_of(lengths, measured, work, proposal, why)
    write_report(given["json_path"], "silo-plan", settings, results)
