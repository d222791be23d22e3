"""What Trunkline is compared with: plain transformers and PEFT on the unsplit model, one process."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, get_scheduler

from codec.plan import RunPlan
from silo_agent.microbatch import Example

_SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def whole_model(ref: str) -> Any:
    """The unsplit model in fp32, with transformers' default attention; it never stops by itself."""
    model = AutoModelForCausalLM.from_pretrained(ref, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@torch.no_grad()
def greedy(model: Any, prompt: Sequence[int], new: int) -> tuple[list[int], Tensor]:
    """`new` tokens by `transformers.generate`, greedy, and the logits `[new, vocabulary]` of each."""
    out = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits)


@torch.no_grad()
def padded_logits(model: Any, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits `[len, vocabulary]` of each sequence, from one right-padded batch with its mask."""
    ids, mask = _padded(sequences)
    logits = model(input_ids=ids, attention_mask=mask).logits
    return [logits[i, : len(sequence)] for i, sequence in enumerate(sequences)]


class Reference:
    """Plain LoRA training of the whole model by silos that share what `plan.ends` says.

    With shared ends there is one adapter, trained on the union of the silos' batches: centralised
    training. With own ends each silo has an adapter, and their trunk tensors are one parameter:
    a simulation of the split run in one process.
    """

    def __init__(
        self, model: Any, plan: RunPlan, initial: Mapping[str, Tensor] | None = None, trunk: range = range(0)
    ) -> None:
        """`initial` is the first adapter by global name, PEFT's own without it; `trunk` are the blocks
        that are shared where the ends are not.
        """
        self._plan = plan
        self._owners = plan.silos if plan.ends == "own" else 1
        config = LoraConfig(
            r=plan.lora.rank,
            lora_alpha=plan.lora.alpha,  # type: ignore[arg-type]  # declared int, used as a float
            target_modules=list(plan.lora.targets),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT 0.21 uses a name transformers gave up.
            self._model: Any = get_peft_model(model, config, adapter_name="silo0")
        for owner in range(1, self._owners):
            self._model.add_adapter(f"silo{owner}", config)
        if initial is not None:
            for owner in range(self._owners):
                for name, parameter in self._adapter(owner).items():
                    parameter.data.copy_(initial[name])
        self._share(trunk)
        self._train_all()
        self._parameters = list(
            {id(p): p for o in range(self._owners) for p in self._adapter(o).values()}.values()
        )
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=plan.learning_rate,
            betas=plan.betas,
            eps=plan.eps,
            weight_decay=plan.weight_decay,
        )
        self._scheduler = get_scheduler(
            _SCHEDULES[plan.schedule],
            self._optimizer,
            num_warmup_steps=plan.warmup_steps,
            num_training_steps=plan.steps,
        )

    def step(self, batches: Sequence[Sequence[Example]]) -> list[float]:
        """One optimizer step on one batch a silo; each silo's mean loss."""
        groups = [list(batch) for batch in batches]
        tokens = [sum(sum(e.answer[1:]) for e in group) for group in groups]
        losses = []
        for silo, group in enumerate(groups):
            self._model.set_adapter(f"silo{silo if self._owners > 1 else 0}")
            self._train_all()
            loss = self._summed_loss(group)
            (loss / sum(tokens)).backward()
            losses.append(loss.item() / tokens[silo])
        if self._plan.clip_norm:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._plan.clip_norm)
        self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad()
        return losses

    def adapter(self, silo: int) -> dict[str, Tensor]:
        """A silo's adapter by global name."""
        return {n: p.detach() for n, p in self._adapter(silo if self._owners > 1 else 0).items()}

    def _adapter(self, owner: int) -> dict[str, Any]:
        found = {}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            left, marker, right = name.removeprefix("base_model.model.").partition(f".silo{owner}.")
            if marker:
                found[f"{left}.{right}"] = parameter
        return found

    def _share(self, trunk: range) -> None:
        for index in trunk:
            for module in self._model.base_model.model.model.layers[index].modules():
                for part in ("lora_A", "lora_B"):
                    if hasattr(module, part):
                        for owner in range(1, self._owners):
                            getattr(module, part)[f"silo{owner}"].weight = getattr(module, part)[
                                "silo0"
                            ].weight

    def _train_all(self) -> None:
        for owner in range(self._owners):
            for parameter in self._adapter(owner).values():
                parameter.requires_grad_(True)

    def _summed_loss(self, examples: Sequence[Example]) -> Tensor:
        ids, mask = _padded([example.ids for example in examples])
        labels = torch.full_like(ids, -100)
        for i, example in enumerate(examples):
            for t, learned in enumerate(example.answer):
                if learned:
                    labels[i, t] = example.ids[t]
        logits = self._model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def _padded(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    width = max(len(sequence) for sequence in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, sequence in enumerate(sequences):
        ids[i, : len(sequence)] = torch.tensor(sequence)
        mask[i, : len(sequence)] = 1
    return ids, mask
