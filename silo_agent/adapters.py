"""Adapters in PEFT's own format: one directory with head, trunk and tail merged.

Plain `peft.PeftModel.from_pretrained(whole_model, directory)` loads what is written here, and an
adapter that PEFT trained on the whole model can be read and split.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from codec.errors import ModelError, SaveError
from codec.partition import Span
from codec.plan import LoraPlan
from silo_agent.snapshot import FILE
from workers.lora import peft_config

_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_SCRATCH = ".saving-"
_PREFIX = "base_model.model."
_TENSOR = re.compile(r"model\.layers\.\d+\.[\w.]+\.lora_[AB]\.weight")
_UNSUPPORTED = (
    "use_dora",
    "use_rslora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""First values that leave the base model as it is; PiSSA, OLoRA and others change its weights too."""


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
    for name in (_CONFIG, _WEIGHTS):
        # PEFT would look for a directory that is not there on the hub.
        if not (directory / name).is_file():
            raise ModelError(f"{directory} is not a PEFT LoRA adapter: it has no {name}")
    try:
        config = LoraConfig.from_pretrained(str(directory))
        if not isinstance(config, LoraConfig):
            raise ValueError("it is of another kind")
        stored = load_file(directory / _WEIGHTS)
        if not stored:
            raise ValueError("it holds no tensor")
        tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in stored.items()}
        targets = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors})
        facts = {"rank": config.r, "alpha": config.lora_alpha, "targets": targets}
        plan = msgspec.convert(facts, LoraPlan)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{directory} is not a PEFT LoRA adapter: {reason}") from None
    unsupported = [name for name in _UNSUPPORTED if getattr(config, name, None)]
    if config.bias != "none":
        unsupported.append("bias")
    if config.init_lora_weights not in _PLAIN_STARTS:
        unsupported.append(f"init_lora_weights={config.init_lora_weights}")
    if unsupported:
        raise ModelError(f"{directory} uses {', '.join(unsupported)}, which cannot be split yet")
    if strange := [name for name in tensors if not _TENSOR.fullmatch(name)]:
        raise ModelError(f"{directory} adapts {strange[0]}, which is not a linear layer of a decoder block")
    return SavedAdapter(plan, tensors)


def check_place(directory: Path) -> None:
    """Raise `SaveError` if an adapter could not be written at `directory`: before hours of training."""
    try:
        _refuse_foreign(directory)
    except OSError as error:
        raise _not_saved(directory, error) from None
    parent = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise _not_saved(directory, OSError(f"{parent} cannot be written"))


def write_adapter(directory: Path, plan: LoraPlan, tensors: Mapping[str, Tensor], base: str) -> None:
    """Write a PEFT LoRA directory, whole or not at all; an adapter that stands there is replaced.

    The files are written within `directory` and then renamed into place, so it may be a mount point.
    Raises `SaveError` if the disk is full or the place cannot be written or holds something else.
    """
    config = peft_config(plan)
    config.base_model_name_or_path = base
    config.inference_mode = True
    text = json.dumps(_plain(config.to_dict()), indent=2, sort_keys=True) + "\n"
    stored = {f"{_PREFIX}{name}": tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    fresh, scratch = False, None
    try:
        fresh = not directory.exists()
        directory.mkdir(parents=True, exist_ok=True)
        _refuse_foreign(directory)
        scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=directory))
        save_file(stored, scratch / _WEIGHTS, metadata={"format": "pt"})
        (scratch / _CONFIG).write_text(text, encoding="utf-8")
        for name in (_WEIGHTS, _CONFIG):
            _settle(scratch / name)
        for name in (_WEIGHTS, _CONFIG):
            (scratch / name).replace(directory / name)
    except (OSError, SafetensorError) as error:
        raise _not_saved(directory, error) from None
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        if fresh:
            with suppress(OSError):  # It is empty only if nothing was saved.
                directory.rmdir()


def _refuse_foreign(directory: Path) -> None:
    if (
        directory.exists()
        and not (directory / _CONFIG).is_file()
        and not all(_left_over(path) for path in directory.iterdir())
    ):
        raise OSError(f"{directory} holds something other than an adapter")


def _not_saved(directory: Path, error: Exception) -> SaveError:
    return SaveError(
        f"the adapter cannot be saved at {directory}: {error}",
        hint="Free some space or choose another --out; what stood there before is untouched.",
    )


def _plain(config: dict[str, object]) -> dict[str, object]:
    return {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}


def _left_over(path: Path) -> bool:
    """Whether a killed save left this, or it belongs to a run that is to become the adapter here."""
    return path.name.startswith((_SCRATCH, FILE))


def _settle(file: Path) -> None:
    """Before the rename: others may read it (safetensors writes 0600), and a power cut tears nothing."""
    file.chmod(0o644)
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
