"""Adapters in PEFT's own format: one directory with head, trunk and tail merged.

Plain `peft.PeftModel.from_pretrained(whole_model, directory)` loads what is written here, and an
adapter that PEFT trained on the whole model can be read and split.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from codec.errors import ModelError, SaveError
from codec.partition import Span
from codec.plan import LoraPlan
from workers.lora import peft_config

_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """An adapter of the whole model: its plan, and tensors by global name."""

    plan: LoraPlan
    tensors: dict[str, Tensor]

    def within(self, span: Span) -> dict[str, Tensor]:
        """The tensors of blocks `[start, stop)`, in the order of their names."""
        return {
            name: tensor
            for name, tensor in sorted(self.tensors.items())
            if span.start <= int(name.split(".")[2]) < span.stop
        }


def read_adapter(directory: Path) -> SavedAdapter:
    """Read a PEFT LoRA directory.

    Raises `ModelError` if it is not one, or uses what a split model does not support.
    """
    try:
        config = LoraConfig.from_pretrained(str(directory))
        stored = load_file(directory / _WEIGHTS)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{directory} is not a PEFT LoRA adapter: {reason}") from None
    unsupported = [
        name
        for name in ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern")
        if getattr(config, name, None)
    ]
    if config.bias != "none" or unsupported:
        raise ModelError(f"{directory} uses {', '.join(unsupported) or 'bias'}, which cannot be split yet")
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in stored.items()}
    if strange := [name for name in tensors if not name.startswith("model.layers.")]:
        raise ModelError(f"{directory} adapts {strange[0]}, which is not within a decoder block")
    targets = tuple(sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors}))
    return SavedAdapter(LoraPlan(rank=config.r, alpha=float(config.lora_alpha), targets=targets), tensors)


def write_adapter(directory: Path, plan: LoraPlan, tensors: Mapping[str, Tensor], base: str) -> None:
    """Write a PEFT LoRA directory, whole or not at all; one that stands there is replaced.

    Raises `SaveError` if the disk is full or the place cannot be written.
    """
    config = peft_config(plan)
    config.base_model_name_or_path = base
    config.inference_mode = True
    stored = {f"{_PREFIX}{name}": tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    scratch = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        save_file(stored, scratch / _WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(_plain(config.to_dict()), indent=2, sort_keys=True)
        (scratch / "adapter_config.json").write_text(text + "\n")
        scratch.chmod(0o755)
        for file in scratch.iterdir():
            _flush(file)
        _swap(scratch, directory)
    except (OSError, SafetensorError) as error:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        raise SaveError(
            f"the adapter cannot be saved at {directory}: {error}",
            hint="Free some space or choose another --out; what stood there before is untouched.",
        ) from None


def _plain(config: dict[str, object]) -> dict[str, object]:
    return {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}


def _flush(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _swap(scratch: Path, directory: Path) -> None:
    """Put `scratch` in the place of `directory`, keeping the old one until the new one stands."""
    if not directory.exists():
        scratch.rename(directory)
        return
    if not (directory / "adapter_config.json").is_file() and any(directory.iterdir()):
        raise OSError(f"{directory} holds something other than an adapter")
    old = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old.", dir=directory.parent))
    directory.rename(old / "adapter")
    scratch.rename(directory)
    shutil.rmtree(old, ignore_errors=True)
