"""The end of the model as an ordinary module: it can be trained, and differentiated twice."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from codec import partition
from codec.lengths import positions
from silo_agent.audit.public import PublicModel
from workers.attention import Packing
from workers.families import span_config
from workers.span import Span


class PlainTail(nn.Module):
    """Blocks `[start, N)`, final norm and lm_head, fp32; the public weights, or new random ones."""

    def __init__(self, public: PublicModel, blocks: partition.Span, *, pretrained: bool = True) -> None:
        super().__init__()
        config = span_config(public.checkpoint.config, blocks, embeds=False)
        config.tie_word_embeddings = False  # Tied or not, there is nothing here to tie it to.
        self.model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        self.model.model.embed_tokens = None
        if pretrained:
            known = Span(public.checkpoint, blocks, predicts=True, device=public.device, tied=public.head)
            self.model.load_state_dict(known.model.state_dict())
        self.model.to(public.device).eval()

    @property
    def vocabulary(self) -> Tensor:
        """The lm_head's weight, `[vocabulary, hidden]`."""
        weight = self.model.lm_head.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, packed: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """What the lm_head is given `[T, hidden]`, and the logits `[T, vocabulary]`."""
        given: list[Tensor] = []

        def through(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            given.append(inputs[0][0])
            return (given[0][None],)

        hook = self.model.lm_head.register_forward_pre_hook(through)
        try:
            output = self.model(
                inputs_embeds=packed[None],
                position_ids=positions([0] * len(lengths), lengths, packed.device)[None],
                packing=Packing(lengths),
                use_cache=False,
            )
        finally:
            hook.remove()
        return given[0], output.logits[0]
