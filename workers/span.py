"""A span of decoder blocks: head, trunk and tail are all this one class.

A span is a transformers model of its own, cut down to the blocks `[start, stop)`, with the
embeddings if it begins the model and with final norm and lm_head if it ends it. Only its own
tensors are read. It runs packed sequences: the tokens of all sequences one after another.
"""

import copy
from collections.abc import Mapping, Sequence
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
from workers.linear import freeze_linears
from workers.parts import Part, stretches
from workers.routing import Routing, shares_of

_EMBEDDINGS = "model.embed_tokens.weight"
_LM_HEAD = "lm_head.weight"


class Span:
    """Blocks `[start, stop)` of a model, ready to run. Frozen; LoRA is added by `workers.lora`.

    One thread at a time: adapted and fused layers look up what belongs to the pass under way.
    """

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
        self.adapters: set[str] = set()
        """Keys of its adapters, kept by `workers.lora`."""
        self.routing = Routing()
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
        self._load(checkpoint, tied, freeze_linears(whole, dtype, self.device))
        self.model.to(self.device).eval().requires_grad_(False)

    def _load(self, checkpoint: Checkpoint, tied: "Span | None", room: Mapping[str, Tensor]) -> None:
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
            own = room.get(wanted[name])
            if own is not None and own.shape == tensor.shape:
                state[wanted[name]] = own.copy_(tensor)
            else:
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

    @property
    def filling(self) -> int:
        """About how many tokens fill a pass: with more, a token takes no less time."""
        return 512 if self.device.type == "cpu" else 2048

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
        blocks: partition.Span | None = None,
        adapter: str | None = None,
        caches: Sequence[RowCache] | None = None,
        mask: Tensor | None = None,
        keep: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Run one part alone: see `Part` for the arguments and `run_parts` for result and errors."""
        return self.run_parts([Part(packed, lengths, blocks, adapter, caches, mask, keep, positions)])[0]

    def run_parts(self, parts: Sequence[Part]) -> list[Tensor]:
        """Run all parts in one pass; each joins it at its first block and leaves it after its last.

        Parts may differ in blocks, adapter and mask. All have caches or none has: what is trained and
        what is generated are not mixed. A span that embeds or predicts runs whole. Caches advance when
        the pass is complete. Returns for each part `[T, hidden]`; from a span that predicts, logits
        `[len(keep), vocabulary]`. Gradients flow to each part's `packed` and adapter, as if it ran alone.

        Raises `LimitError` if a cache has no room, `MismatchError` for blocks that are not hosted, and
        `ValueError` for an unknown adapter or a mixture of caches; nothing has happened then.
        """
        self._check(parts)
        dtype = torch.int64 if self._embeds else self.dtype
        values = [part.packed.to(self.device, dtype) for part in parts]
        present: tuple[int, ...] = ()
        joined = torch.empty(0)
        for blocks, members in stretches([part.blocks or self.blocks for part in parts]):
            if members != present:
                self._part(values, parts, present, joined)
                joined = _cat([values[index] for index in members])
                present = members
            joined = self._pass(self.view(blocks), joined, [parts[index] for index in members])
        self._part(values, parts, present, joined)
        for part in parts:
            part.advance()
        return values

    def _check(self, parts: Sequence[Part]) -> None:
        whole = self._embeds or self._predicts
        for part in parts:
            if part.blocks is not None and not self.blocks.contains(part.blocks):
                raise MismatchError(
                    f"blocks {part.blocks} are not within the hosted {self.blocks}", side="worker"
                )
            if whole and part.blocks not in (None, self.blocks):
                raise MismatchError(f"the ends of a model run whole, not their blocks {part.blocks} alone")
            if part.adapter is not None and part.adapter not in self.adapters:
                raise ValueError(f"the span has no adapter {part.adapter!r}")
            part.check_room()
        if len({part.caches is None for part in parts}) > 1:
            raise ValueError("parts with caches and parts without cannot share a pass")

    def _pass(self, view: Any, joined: Tensor, parts: Sequence[Part]) -> Tensor:
        """The packed tokens of `parts` through one stretch of blocks, in which all of them are."""
        lengths = tuple(length for part in parts for length in part.lengths)
        caches = [cache for part in parts for cache in part.caches or ()]
        masked = any(part.mask is not None for part in parts)
        squares = [square for part in parts for square in part.squares(self.device)] if masked else None
        starts = [cache.length for cache in caches] if caches else [0] * len(lengths)
        arguments: dict[str, object] = {
            "position_ids": _positions(parts, starts, lengths, self.device)[None],
            "packing": Packing(lengths, caches or None, squares),
            "use_cache": False,
            "input_ids" if self._embeds else "inputs_embeds": joined[None],
        }
        if self._predicts and any(part.keep is not None for part in parts):
            arguments["logits_to_keep"] = _kept(parts, self.device)
        with self.routing.to(shares_of((part.adapter, part.tokens) for part in parts)):
            output = view(**arguments)
        result = output.logits if self._predicts else output.last_hidden_state
        assert isinstance(result, Tensor)
        return result[0]

    def _part(
        self, values: list[Tensor], parts: Sequence[Part], members: tuple[int, ...], joined: Tensor
    ) -> None:
        """Give each member its own of what they computed together."""
        if len(members) == 1:
            values[members[0]] = joined
            return
        for index, value in zip(members, joined.split([parts[i].rows for i in members]), strict=True):
            values[index] = value

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
        if blocks not in self._views:
            first = blocks.start - self.blocks.start
            local = partition.Span(first, first + len(blocks))
            view = copy.copy(self._base)
            view._modules = dict(self._base._modules)
            view.layers = nn.ModuleList(list(self._base.layers)[local.start : local.stop])
            view.config = span_config(self._base.config, local, embeds=self._embeds)
            self._views[blocks] = view
        return self._views[blocks]


def _cat(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _positions(
    parts: Sequence[Part], starts: Sequence[int], lengths: Sequence[int], device: torch.device
) -> Tensor:
    """Position of every packed token: as its part says, else counted up from its sequence's start."""
    counted = positions(starts, lengths, device)
    if all(part.positions is None for part in parts):
        return counted
    own = counted.split([part.tokens for part in parts])
    told = [c if p.positions is None else p.positions.to(device) for p, c in zip(parts, own, strict=True)]
    return _cat(told)


def _kept(parts: Sequence[Part], device: torch.device) -> Tensor:
    """The packed positions of all parts that get logits."""
    at, kept = 0, []
    for part in parts:
        own = torch.arange(part.tokens) if part.keep is None else part.keep
        kept.append(own.to(device) + at)
        at += part.tokens
    return _cat(kept)
