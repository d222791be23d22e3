"""`trunkline audit`: attack what this silo would send, before anybody else does."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import click

from silo_agent.display import progress_bar
from silo_agent.options import ModelOptions, load_saved, load_tokenizer, model_options
from silo_agent.report import settings_of, write_report
from silo_agent.tasks.options import DataOptions, data_options

_FILE = click.Path(path_type=Path)
_COUNT = click.IntRange(min=1)


@click.command("audit")
@model_options
@data_options
@click.option("--adapter", type=_FILE, help="The silo's PEFT adapter; the attacker does not have it.")
@click.option("--attacks", "names", default="all", show_default=True, help="Names with commas between.")
@click.option("--examples", default=16, show_default=True, type=_COUNT, help="Texts to attack.")
@click.option(
    "--candidates", default=256, show_default=True, type=_COUNT, help="Tokens a search tries a position."
)
@click.option(
    "--releases", default=8, show_default=True, type=_COUNT, help="Times a text is sent, for averaging."
)
@click.option("--public", help="Text that the attacker has, as --data; else what --data holds beyond.")
@click.option("--json", "json_path", type=_FILE, help="Write what was found here.")
@click.option("--plot", type=_FILE, help="Draw it here (PNG).")
def audit(options: ModelOptions, data: DataOptions, **given: Any) -> None:
    """What a curious worker can read of your text: sends nothing, attacks what would be sent.

    Your model, adapter, partition, noise, wire and data; the operator of a worker is taken to know all of
    the base model and how the noise is made. Needs memory for the whole model. What no attack here finds,
    another may.

    \b
    Examples:
      trunkline audit --model smollm2-135m --noise 0.05 --wire steps --data notes.jsonl --max-length 64
      trunkline audit --model smollm2-135m --head 5 --noise 1 --task xsum --data xsum.jsonl \\
          --max-length 80 --attacks unseen,nearest,search --json audit.json --plot audit.png
    """
    from silo_agent.audit.attack import Knowledge
    from silo_agent.audit.attacks import chosen_attacks
    from silo_agent.audit.display import draw_attacks, show_attacks
    from silo_agent.audit.scoring import score
    from silo_agent.audit.subject import all_sent, public_texts, shared_beginning
    from silo_agent.pictures import pyplot
    from workers.checkpoint import Checkpoint

    attacks = chosen_attacks(given["names"], given["candidates"])
    if given["plot"] is not None:
        pyplot()  # If it is not there, this is said before the work and not after it.
    tokenizer, checkpoint = load_tokenizer(options.model), Checkpoint(options.model)
    saved = load_saved(given["adapter"])
    examples = data.examples(tokenizer, "train")
    texts = examples[: given["examples"]]
    others = public_texts(data, tokenizer, given["public"], examples[given["examples"] :])
    begin = shared_beginning(texts)
    model, seen = all_sent(options, checkpoint, saved, texts, given["releases"])
    knowledge, rows = Knowledge(model, begin, others), []
    with progress_bar() as bar:
        shown = bar.add_task("audit", total=len(attacks), facts="")
        for attack in attacks:
            bar.update(shown, facts=attack.name)
            begun = time.monotonic()
            guesses = attack.guess(knowledge, seen)
            seconds = time.monotonic() - begun
            found = score(tokenizer, texts, guesses, about=attack.about, begin=len(begin))
            about = {"name": attack.name, "about": attack.about, "assumes": attack.assumes}
            rows.append({**about, **dataclasses.asdict(found), "seconds": seconds})
            bar.advance(shown)
    show_attacks(rows)
    results = {"attacks": rows, "texts": len(texts), "sigma": [text.sigma for text in seen]}
    write_report(given["json_path"], "audit", {**settings_of(options, data), **given}, results)
    if given["plot"] is not None:
        draw_attacks(rows, f"{options.model}, head {options.head}, noise {options.noise}", given["plot"])
