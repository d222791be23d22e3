"""`trunkline bench`: one command per benchmark."""

from pathlib import Path

import click

from codec.partition import Partition
from codec.plan import checked_plan
from workers import runtime  # before torch: it sets how idle threads wait

_JSON = click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the report here.")


@click.group("bench")
def bench() -> None:
    """Measure, one question per benchmark."""


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
    from silo_agent.report import write_report
    from workers.checkpoint import Checkpoint
    from workers.families import lora_targets as named_targets

    runtime.quiet_libraries()
    checkpoint = Checkpoint(model)
    Partition(head, tail).spans(checkpoint.blocks)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.ref)
    texts = [
        tokenizer(note)["input_ids"][: 24 + 3 * (line % 11)] for line, note in enumerate(_notes(), start=1)
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


@bench.command("codec")
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--head", default=2, show_default=True, metavar="P")
@click.option("--tail", default=2, show_default=True, metavar="Q")
@click.option("--noise", default=0.05, show_default=True, help="On head → trunk, relative.")
@click.option(
    "--text",
    "file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Plain text, one sequence a line.  [default: the demo's notes]",
)
@click.option("--tokens", default=4096, show_default=True, help="Stop after this many.")
@click.option("--max-length", default=920, show_default=True, help="Tokens of a line that are used.")
@_JSON
def codec(
    model: str,
    head: int,
    tail: int,
    noise: float,
    file: Path | None,
    tokens: int,
    max_length: int,
    json_path: Path | None,
) -> None:
    """What does each encoding cost, in bits, in loss and in time? On the model's own boundaries.

    \b
    Examples:
      trunkline bench codec --model smollm2-135m --json codec.json
      trunkline bench codec --model smollm2-135m --text passages.txt --tokens 4096
    """
    from transformers import AutoTokenizer

    from benchmarks.codec import measure
    from silo_agent.report import write_report
    from workers.checkpoint import Checkpoint

    runtime.quiet_libraries()
    checkpoint = Checkpoint(model)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.ref)
    lines = file.read_text().splitlines() if file else _notes()
    texts: list[list[int]] = []
    for line in lines:
        ids = tokenizer(line)["input_ids"][:max_length]
        if len(ids) > 1:
            texts.append(ids)
        if sum(map(len, texts)) >= tokens:
            break
    results = measure(model, Partition(head, tail), texts, noise)
    click.echo(
        f"{'boundary':24} {'wire':6} {'bits':>6} {'entropy':>8} {'loss':>9} {'encode':>8} {'decode':>8}"
    )
    for row in results["rows"]:
        entropy = f"{row['entropy']:.2f}" if row["entropy"] is not None else ""
        loss = f"{row['loss_change']:+.4f}" if row["loss_change"] is not None else ""
        click.echo(
            f"{row['boundary']:24} {row['wire']:6} {row['bits']:6.2f} {entropy:>8} {loss:>9} "
            f"{row['encode_ms']:5.1f} ms {row['decode_ms']:5.1f} ms"
        )
    traffic = results["traffic"]
    click.echo(
        f"{results['tokens']} tokens, loss {results['loss_exact']:.4f}, with noise alone "
        f"{results['loss_noise_alone']:.4f}; plain lz4 of fp32: {results['plain_lz4_bits']:.2f} bits\n"
        f"all four boundaries: {traffic['steps_bits']:.1f} bits, {traffic['times_fewer']:.1f} times fewer "
        f"than fp16 padded to {max(map(len, texts))} tokens"
    )
    settings = {"model": model, "head": head, "tail": tail, "noise": noise, "text": str(file)}
    write_report(json_path, "codec", settings, results)


def _notes() -> list[str]:
    from silo_agent.data import read_chats
    from silo_agent.demo.commands import CLINICS, data_file

    return [
        " ".join(message["content"] for message in messages)
        for clinic in CLINICS
        for _, messages in read_chats(data_file(clinic))
    ]
