"""A span of decoder blocks: head, trunk and tail are all this one class.

A span is a transformers model of its own, cut down to the blocks `[start, stop)`, with the
embeddings if it begins the model and with final norm and lm_head if it ends it. Only its own
tensors are read. It runs packed sequences: the tokens of all sequences one after another.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from codec import partition
from codec.errors import MismatchError, ModelError
from codec.lengths import positions
from workers.attention import Packing
from workers.checkpoint import Checkpoint
from workers.families import span_config
from workers.kv import KVShape, RowCache

_EMBEDDINGS = "model.embed_tokens.weight"
_LM_HEAD = "lm_head.weight"


class Span:
    """Blocks `[start, stop)` of a model, ready to run. Frozen; LoRA is added by `workers.lora`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        blocks: partition.Span,
        *,
        embeds: bool = False,
        predicts: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        tied: "Span | None" = None,
    ) -> None:
        """Build the span and read its weights.

        `embeds` adds the embeddings (then it starts at block 0), `predicts` the final norm and
        lm_head. `tied` is a span on the same device whose embeddings a tied lm_head shares.
        Raises `ModelError` if a tensor is missing or has another shape.
        """
        if blocks.stop > checkpoint.blocks:
            raise MismatchError(f"{checkpoint.name} has {checkpoint.blocks} blocks, not {blocks.stop}")
        self.blocks = blocks
        self.device = torch.device(device)
        self.dtype = dtype
        self._embeds, self._predicts = embeds, predicts
        self.in_use: tuple[str | None] | None = None
        """The adapter that passes run with, kept by `workers.lora`; None while it is not known."""
        self._views: dict[partition.Span, Any] = {}
        config = span_config(checkpoint.config, blocks, embeds=embeds)
        with init_empty_weights(include_buffers=False):
            build: Any = AutoModelForCausalLM if predicts else AutoModel
            whole = build.from_config(config, dtype=dtype)
        self.model: Any = whole
        base = whole.model if predicts else whole
        if not embeds:
            base.embed_tokens = None
        if not predicts:
            base.norm = nn.Identity()
        self._base = base
        self._load(checkpoint, tied)
        self.model.to(self.device).eval().requires_grad_(False)

    def _load(self, checkpoint: Checkpoint, tied: "Span | None") -> None:
        wanted = {self._stored_name(name): name for name in self.model.state_dict()}
        state: dict[str, Tensor] = {}
        borrows = (
            self._predicts and _LM_HEAD not in checkpoint and bool(self.model.config.tie_word_embeddings)
        )
        if borrows:
            # A tied lm_head is the embeddings: another span's, its own span's, or read for it alone.
            del wanted[_LM_HEAD]
            if tied is not None:
                state[_LM_HEAD] = tied.embeddings
            elif not self._embeds:
                wanted[_EMBEDDINGS] = _LM_HEAD
        for name, tensor in checkpoint.read(wanted):
            state[wanted[name]] = tensor.to(self.device, self.dtype)
        if borrows and self._embeds:
            state[_LM_HEAD] = state[_EMBEDDINGS]
        try:
            self.model.load_state_dict(state, strict=True, assign=True)
        except RuntimeError as error:
            raise ModelError(f"{checkpoint.name} does not fit its own configuration: {error}") from None

    def _stored_name(self, name: str) -> str:
        """A tensor's name in the whole model's checkpoint."""
        name = name if self._predicts else f"model.{name}"
        return self.global_name(name)

    def global_name(self, name: str) -> str:
        """`model.layers.<local>.rest` with the block counted from the whole model's first."""
        parts = name.split(".")
        if parts[:2] == ["model", "layers"]:
            parts[2] = str(int(parts[2]) + self.blocks.start)
        return ".".join(parts)

    @property
    def embeddings(self) -> Tensor:
        """The embedding matrix `[vocabulary, hidden]` of a span that `embeds`."""
        weight = self._base.embed_tokens.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def weight_bytes(self) -> int:
        """Bytes of the span's own weights, adapters included."""
        return sum({p.data_ptr(): p.nbytes for p in self.model.parameters()}.values())

    def kv_shape(self, blocks: partition.Span | None = None) -> KVShape:
        """What a cached token takes in this span, or in its part `blocks`."""
        part = self.blocks if blocks is None else blocks
        config = self._base.config
        heads = config.num_attention_heads
        return KVShape(
            layers=len(part),
            first=part.start - self.blocks.start,
            groups=getattr(config, "num_key_value_heads", None) or heads,
            dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            dtype=self.dtype,
            device=self.device,
        )

    def run(
        self,
        packed: Tensor,
        lengths: Sequence[int],
        *,
        caches: Sequence[RowCache] | None = None,
        blocks: partition.Span | None = None,
        keep: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Run packed sequences through the span, or through its part `blocks`.

        `packed` is int64 `[T]` token ids if the span embeds, else `[T, hidden]`, with
        `T = sum(lengths)`. With `caches`, one per sequence, the tokens continue what each cache
        holds, and the caches advance. `mask`, bool `[T, T]`, says which new tokens of a sequence see
        which, where that is not causal; cached tokens are always seen. Returns `[T, hidden]`; from a
        span that predicts, logits `[len(keep), vocabulary]` of the packed positions `keep` (all if
        None). Raises `LimitError` if a cache has no room; nothing has happened then.
        """
        for cache, length in zip(caches or (), lengths, strict=bool(caches)):
            cache.check_room(length)
        starts = [cache.length for cache in caches] if caches else [0] * len(lengths)
        arguments: dict[str, object] = {
            "position_ids": positions(starts, lengths, self.device)[None],
            "packing": Packing(tuple(lengths), caches, None if mask is None else mask.to(self.device)),
            "use_cache": False,
        }
        if self._embeds:
            arguments["input_ids"] = packed.to(self.device)[None]
        else:
            arguments["inputs_embeds"] = packed.to(self.device, self.dtype)[None]
        if self._predicts and keep is not None:
            arguments["logits_to_keep"] = keep
        output = self.view(blocks)(**arguments)
        if caches:
            for cache, length in zip(caches, lengths, strict=True):
                cache.advance(length)
        result = output.logits if self._predicts else output.last_hidden_state
        assert isinstance(result, Tensor)
        return result[0]

    def layers(self, blocks: partition.Span | None = None) -> nn.ModuleList:
        """The decoder blocks themselves, of the span or of its part `blocks`."""
        view = self.view(blocks)
        layers = view.model.layers if view is self.model and self._predicts else view.layers
        assert isinstance(layers, nn.ModuleList)
        return layers

    def view(self, blocks: partition.Span | None) -> Any:
        """The model, or one that shares its modules and runs only the part `blocks`."""
        if blocks is None or blocks == self.blocks:
            return self.model
        if not self.blocks.contains(blocks):
            raise MismatchError(f"blocks {blocks} are not within the hosted {self.blocks}", side="worker")
        if blocks not in self._views:
            first = blocks.start - self.blocks.start
            local = partition.Span(first, first + len(blocks))
            view = copy.copy(self._base)
            view._modules = dict(self._base._modules)
            view.layers = nn.ModuleList(list(self._base.layers)[local.start : local.stop])
            view.config = span_config(self._base.config, local, embeds=self._embeds)
            self._views[blocks] = view
        return self._views[blocks]
