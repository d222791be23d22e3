"""A tiny random Llama, made on the spot: for tests, and for trying commands without a download.

Its weights come from a counter-based bit stream and not from a normal sampler, so that silos and
workers on different machines make the same bits and agree on the fingerprint.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch

SEED: Final = 2505_15683
SPECIAL: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB: Final = 512
CONTEXT: Final = 2048

CHATML: Final = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TEXT: Final = """\
Several owners of data want one model to learn from all of them, and none of them may give its text
away. So each keeps the first and the last blocks of the model at home, and only what leaves the
first blocks goes out to the others. The patient came in this morning with pain in the chest and was
seen by the nurse. Summarise the notes for the ward: who is it, what is the problem, what has been
done and when will it be looked at again? The answer is short. user: what is the capital of that
country? assistant: the capital is the largest city on the river. There were three questions, and
the story answers two of them; the other one has no answer that can be found in the passage. If this
is true, then the next sentence is false, because it says the opposite. He would have thought about
their house before they went through it with her, but she could not wait for him any longer.
PATIENT: 63 m | PROBLEM: chest pain | ACTION: started aspirin | REVIEW: tomorrow morning
PATIENT: 7 f | PROBLEM: broken wrist | ACTION: plaster cast | REVIEW: in two weeks
"""


def build(scratch: Path, report: Callable[[str], None]) -> Path:
    """Make the model directory under `scratch` (a second or two, no network) and return it."""
    # Imported here: knowing a model's name must not cost the import of torch.
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlamaConfig

    generation: Any = GenerationConfig  # untyped upstream, as is the tokenizer below

    report("making the tiny random model")
    model = scratch / "model"
    model.mkdir()
    ids: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        **ids,
    )
    config.save_pretrained(model)
    generation(**ids).save_pretrained(model)
    save_file(_weights(config), model / "model.safetensors", metadata={"format": "pt"})
    _tokenizer().save_pretrained(model, save_jinja_files=False)
    return model


def _weights(config: Any) -> "dict[str, torch.Tensor]":
    """Uniform weights of variance 1/fan-in; norms around one, so that a mixed-up norm shows."""
    import numpy as np
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in LlamaForCausalLM(config).state_dict().items()}
    del shapes["lm_head.weight"]  # tied to the embeddings
    bits = np.random.Philox(SEED)
    weights = {}
    for name, shape in sorted(shapes.items()):
        raw = bits.random_raw(int(np.prod(shape)))
        unit = (raw >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1)
        values = 1 + 0.1 * unit if len(shape) == 1 else unit * np.float32((3 / shape[-1]) ** 0.5)
        weights[name] = torch.from_numpy(values.astype(np.float32).reshape(shape))
    return weights


def _tokenizer() -> Any:
    """Byte-level BPE over `TEXT`: any string survives encoding and decoding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    wrap: Any = PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return wrap(
        tokenizer_object=tokenizer,
        unk_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[2],
        chat_template=CHATML,
        model_max_length=CONTEXT,
    )
