"""`trunkline silo train`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from codec.errors import UsageError
from codec.plan import checked_plan
from silo_agent.display import step_display
from silo_agent.options import (
    SiloOptions,
    delta_option,
    load_saved,
    load_tokenizer,
    open_silo,
    silo_options,
)
from silo_agent.planning.automatic import check_alone, partition_option, settled
from silo_agent.planning.work import training_work
from silo_agent.report import settings_of, write_report
from silo_agent.tasks.options import DataOptions, data_options

if TYPE_CHECKING:
    from torch import Tensor

    from silo_agent.trainer import StepReport

_FILE = click.Path(path_type=Path)


def _window(_: click.Context, __: click.Parameter, value: str) -> int | None:
    """A number, or None for `auto`."""
    if value == "auto":
        return None
    if not value.isdecimal() or not int(value):
        raise click.BadParameter(f"{value} is neither auto nor a number of 1 or more")
    return int(value)


def _members(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Names in order, so that every silo means the same however it wrote them."""
    return tuple(sorted(name.strip() for name in value.split(","))) if value else ()


@click.command("train")
@silo_options
@partition_option
@data_options
@click.option("--out", type=_FILE, required=True, help="Directory for the adapter, in PEFT's format.")
@click.option(
    "--resume",
    type=_FILE,
    help="Go on with the unfinished run in this directory; or begin with the adapter in it.",
)
@click.option("--run", "run_name", default="default", show_default=True, help="Silos of one run share it.")
@click.option("--silos", default=1, show_default=True, help="How many silos take part.")
@click.option(
    "--members",
    callback=_members,
    metavar="NAMES",
    help="Only these silos may take part, by their keys' names, with commas.  [default: anyone]",
)
@click.option("--steps", default=10, show_default=True)
@click.option(
    "--ends",
    type=click.Choice(["own", "shared"]),
    default="own",
    show_default=True,
    help="Whether each silo keeps its own head and tail adapters.",
)
@click.option(
    "--batch", default=4, show_default=True, type=click.IntRange(min=1), help="Sequences in a micro-batch."
)
@click.option(
    "--accumulate",
    default=2,
    show_default=True,
    type=click.IntRange(min=1),
    help="Micro-batches of this silo in a step.",
)
@click.option(
    "--window",
    default="auto",
    show_default=True,
    callback=_window,
    help="Micro-batches in flight at once; auto: as many as it takes that the trunk need not wait.",
)
@click.option("--rank", default=8, show_default=True)
@click.option("--alpha", default=16.0, show_default=True)
@click.option(
    "--lora-targets",
    default="attention",
    show_default=True,
    help="attention, all (with the MLP), or layer names with commas.",
)
@click.option("--lr", default=1e-3, show_default=True)
@click.option("--warmup", default=0, show_default=True, help="Warm-up steps.")
@click.option(
    "--schedule", type=click.Choice(["constant", "linear", "cosine"]), default="linear", show_default=True
)
@click.option("--clip", default=1.0, show_default=True, help="Bound on the global gradient norm; 0: none.")
@click.option("--weight-decay", default=0.0, show_default=True)
@click.option("--loss-on", type=click.Choice(["answer", "everything"]), default="answer", show_default=True)
@click.option("--freeze-head", is_flag=True, help="Leave the head's adapter as it is; train trunk and tail.")
@delta_option
@click.option(
    "--epsilon",
    type=float,
    metavar="E",
    help="Choose the noise so that all steps together spend (E, --delta).",
)
@click.option(
    "--budget", type=float, metavar="E", help="Stop before more than (E, --delta) is spent, and save."
)
@click.option("--seed", default=0, show_default=True, help="Of the first adapter and the data order.")
@click.option(
    "--patience",
    default=600.0,
    show_default=True,
    help="Seconds to wait for the other silos, and to try a step again after a loss.",
)
@click.option("--progress", type=click.Choice(["bar", "jsonl"]), default="bar", show_default=True)
@click.option("--json", "json_path", type=_FILE, help="Write what was measured here.")
def train_command(options: SiloOptions, data: DataOptions, **given: Any) -> None:
    """Fine-tune together with other silos; every silo gets the merged adapter with its own ends.

    \b
    Examples:
      trunkline silo train --broker tcp://127.0.0.1:7555 --model smollm2-135m \\
          --data notes.jsonl --steps 20 --out adapter
      trunkline silo train --broker tcp://127.0.0.1:7555 --model smollm2-135m \\
          --task multirc --data MultiRC/train.jsonl --steps 100 --out adapter
      trunkline silo train --broker tcp://127.0.0.1:7555 --model smollm2-135m \\
          --run clinics --silos 2 --noise 0.05 --data north.jsonl --out north
      trunkline silo train ... --freeze-head --noise-clip 40 --delta 1e-5 --epsilon 8
      trunkline silo train ... --out north --resume north      # after it was killed
    """
    from silo_agent.accountant import Wish, said
    from silo_agent.adapters import check_place, write_adapter
    from silo_agent.microbatch import Steps
    from silo_agent.snapshot import FILE, read_snapshot
    from silo_agent.training import TrainSettings, train
    from workers.checkpoint import Checkpoint
    from workers.families import lora_targets

    check_place(given["out"])
    check_alone(given["partition"], given["silos"])
    unfinished = read_snapshot(given["resume"]) if given["resume"] else None
    resume = unfinished or load_saved(given["resume"])
    if not given["resume"] and (given["out"] / FILE).exists():
        click.echo(f"the unfinished run at {given['out']} is begun anew; --resume goes on with one", err=True)
    if given["resume"] and unfinished is None:
        click.echo(
            f"no unfinished run at {given['resume']}: a new one begins with the adapter there", err=True
        )
    tokenizer, checkpoint = load_tokenizer(options.model), Checkpoint(options.model)
    plan = checked_plan(
        silos=given["silos"],
        steps=given["steps"],
        ends=given["ends"],
        lora={
            "rank": given["rank"],
            "alpha": given["alpha"],
            "targets": lora_targets(checkpoint.config, given["lora_targets"]),
        },
        learning_rate=given["lr"],
        warmup_steps=given["warmup"],
        schedule=given["schedule"],
        clip_norm=given["clip"],
        weight_decay=given["weight_decay"],
        seed=given["seed"],
        members=given["members"],
    )
    if given["freeze_head"] and plan.ends == "shared":
        raise UsageError("--freeze-head leaves this silo's head as it is, and --ends shared trains all heads")
    settings = TrainSettings(
        run=given["run_name"],
        batch=given["batch"],
        accumulate=given["accumulate"],
        window=given["window"],
        patience=given["patience"],
        out=given["out"],
        freeze_head=given["freeze_head"],
        last=plan.steps,
    )
    examples = data.examples(tokenizer, "train", everything=given["loss_on"] == "everything")
    work = training_work(
        examples, batch=settings.batch, accumulate=settings.accumulate, window=settings.window
    )
    if unfinished is None:
        options = settled(options, given["partition"], work, plan.lora)
    elif given["partition"] == "auto":  # It was settled when the run began.
        cut = unfinished[0].cut(checkpoint.blocks)
        options = dataclasses.replace(options, head=cut.head, tail=cut.tail)
    steps = Steps(examples, settings.batch, settings.accumulate, plan.seed)
    wish = Wish(given["delta"], given["epsilon"], given["budget"])
    account = wish.account(
        options.scale(),
        options.noise_seed,
        (steps[number] for number in range(plan.steps)),
        trains_head=options.head > 0 and not settings.freeze_head,
    )
    if account is not None:
        options = dataclasses.replace(options, noise_abs=account.scale.absolute)
        settings = dataclasses.replace(settings, last=wish.last_step(account))
        click.echo(f"noise: σ = {account.scale.sigma(0):.4g}", err=True)
    with open_silo(options, tokenizer) as silo:
        reports: list[StepReport] = []
        with step_display(given["progress"], plan.steps, options.name) as show:

            def on_step(report: "StepReport") -> None:
                if account is not None:
                    report = dataclasses.replace(report, epsilon=account.epsilon(report.step))
                reports.append(report)
                show(report)

            def save(tensors: "Mapping[str, Tensor]") -> None:
                write_adapter(given["out"], plan.lora, tensors, options.model)

            done = train(silo, plan, settings, examples, resume, on_step, save)
        results = {
            "steps": [dataclasses.asdict(report) for report in reports],
            "loss_first": reports[0].loss if reports else None,
            "loss_last": reports[-1].loss if reports else None,
            "traffic": silo.traffic(),
        }
        if account is not None:
            results["account"] = account.report(done)
        write_report(given["json_path"], "silo-train", settings_of(options, data), results)
    click.echo(f"adapter saved at {given['out']}", err=True)
    if account is not None:
        click.echo(said(account.epsilon(done), account.delta, "each sequence in this run"), err=True)
        if done < plan.steps:
            beyond = account.epsilon(done + 1)
            raise UsageError(
                f"stopped after step {done} of {plan.steps}: the next one would have spent "
                f"ε = {beyond:.4g}, over the budget of {wish.budget:g}",
            )
