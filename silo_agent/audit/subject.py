"""Whom the audit attacks: a silo as its options describe it, and texts as it would send them."""

import dataclasses
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from codec.partition import Partition
from silo_agent.adapters import SavedAdapter
from silo_agent.audit.attack import Seen
from silo_agent.audit.crossing import Crossing
from silo_agent.audit.public import PublicModel
from silo_agent.conversation import common_prefix
from silo_agent.data import chat_examples
from silo_agent.demo.commands import data_file
from silo_agent.ends import Ends
from silo_agent.microbatch import Example
from silo_agent.noise import Noise
from silo_agent.options import ModelOptions
from silo_agent.tasks.options import DataOptions
from silo_agent.wires import Wires
from workers.checkpoint import Checkpoint
from workers.lora import add_adapter

_DEMO_TOKENS = 4096
"""More than the demo's longest note has."""


def all_sent(
    options: ModelOptions,
    checkpoint: Checkpoint,
    saved: SavedAdapter | None,
    texts: Sequence[Example],
    releases: int,
) -> tuple[PublicModel, list[Seen]]:
    """The public model, and what a worker sees of each text, sent `releases` times.

    Raises any `TrunklineError`: bad options, an adapter that does not fit, values that cannot cross.
    """
    device, dtype = options.placed()
    ends = Ends(checkpoint, Partition(options.head, options.tail), dtype=dtype, device=device)
    model = PublicModel(checkpoint, ends)
    if saved is not None:
        ends.adapt(saved.plan, seed=0, initial=saved.tensors)
        assert ends.adapter_key is not None
        add_adapter(model.trunk, ends.adapter_key, saved.plan, 0, initial=saved.within(ends.trunk))
    noise = Noise(options.scale(), seed=options.noise_seed, device=str(device))
    wires = Wires(options.wire, noise=options.noise, dtype=dtype, device=device)
    crossing = Crossing(ends, model.trunk, noise, wires)
    return model, [crossing.send(text, releases) for text in texts]


def shared_beginning(texts: Sequence[Example]) -> tuple[int, ...]:
    """The tokens that all texts begin with: the template's, which are no secret. None of a single text."""
    if len(texts) < 2:
        return ()
    shared = min(common_prefix(texts[0].ids, text.ids) for text in texts[1:])
    return texts[0].ids[:shared]


def public_texts(
    data: DataOptions, tokenizer: PreTrainedTokenizerBase, public: str | None, rest: Sequence[Example]
) -> tuple[tuple[int, ...], ...]:
    """Texts for the attacker: from `public`, read as the silo's own are, else the `rest` of the silo's.

    If there is none, the demo's. Raises `DataError`.
    """
    if public is not None:
        rest = dataclasses.replace(data, data=public).examples(tokenizer, "train")
    if not rest:
        rest = chat_examples(data_file("north"), tokenizer, max_tokens=_DEMO_TOKENS)
    return tuple(example.ids[: data.max_length] for example in rest)
