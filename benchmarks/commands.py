"""`trunkline bench`: one command per benchmark."""

import signal
from pathlib import Path

import click

from benchmarks.broker_command import broker
from benchmarks.chaos_command import chaos
from benchmarks.codec_command import codec, noise
from benchmarks.curve_command import curve
from benchmarks.decode_command import decode
from benchmarks.link_command import link
from benchmarks.reference_command import reference
from benchmarks.scale_command import scale
from benchmarks.soak_command import soak
from benchmarks.throughput_command import throughput
from benchmarks.training_command import train
from benchmarks.worker_command import worker
from codec.partition import Partition
from codec.plan import checked_plan
from workers import runtime  # before torch: it sets how idle threads wait

_JSON = click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the report here.")


@click.group("bench")
def bench() -> None:
    """Measure, one question per benchmark."""
    # Asked to end, a benchmark ends like on Ctrl-C, and the processes that it started with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


bench.add_command(codec)
bench.add_command(broker)
bench.add_command(curve)
bench.add_command(noise)
bench.add_command(link)
bench.add_command(decode)
bench.add_command(throughput)
bench.add_command(worker)
bench.add_command(reference)
bench.add_command(scale)
bench.add_command(train)
bench.add_command(soak)
bench.add_command(chaos)


@bench.command("parity")
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--head", default=2, show_default=True, metavar="P")
@click.option("--tail", default=2, show_default=True, metavar="Q")
@click.option("--new-tokens", default=64, show_default=True)
@click.option("--steps", default=10, show_default=True, type=click.IntRange(min=1))
@click.option("--silos", default=2, show_default=True)
@click.option("--ends", type=click.Choice(["shared", "own"]), default="shared", show_default=True)
@click.option("--lora-targets", default="attention", show_default=True)
@_JSON
def parity(
    model: str,
    head: int,
    tail: int,
    new_tokens: int,
    steps: int,
    silos: int,
    ends: str,
    lora_targets: str,
    json_path: Path | None,
) -> None:
    """Is the split model the whole model? Against plain transformers and PEFT, noise 0, exact wire.

    \b
    Examples:
      trunkline bench parity --model smollm2-135m --head 2 --tail 2 --json parity.json
      trunkline bench parity --model tiny --head 0 --tail 0 --ends own --silos 2
    """
    from transformers import AutoTokenizer

    from benchmarks.parity import measure
    from benchmarks.texts import notes
    from silo_agent.report import write_report
    from workers.checkpoint import Checkpoint
    from workers.families import lora_targets as named_targets

    runtime.quiet_libraries()
    checkpoint = Checkpoint(model)
    Partition(head, tail).spans(checkpoint.blocks)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.ref)
    texts = [
        tokenizer(note)["input_ids"][: 24 + 3 * (line % 11)] for line, note in enumerate(notes(), start=1)
    ]
    plan = checked_plan(
        silos=silos,
        steps=steps,
        ends=ends,
        lora={"targets": named_targets(checkpoint.config, lora_targets)},
        learning_rate=3e-4,
        warmup_steps=2,
        clip_norm=0.5,
        weight_decay=0.01,
    )
    results = measure(model, Partition(head, tail), plan, texts, new_tokens)
    for name, value in results.items():
        click.echo(f"{name:26} {value:.3g}" if isinstance(value, float) else f"{name:26} {value}")
    settings = {
        "model": model,
        "head": head,
        "tail": tail,
        "new_tokens": new_tokens,
        "steps": steps,
        "silos": silos,
        "ends": ends,
        "lora_targets": list(plan.lora.targets),
    }
    write_report(json_path, "parity", settings, results)
