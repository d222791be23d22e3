"""Where a model's weights are, and reading only the tensors that are asked for.

A model is a local directory, a name that `trunkline models fetch` knows, or a hub repository; of a
repository only the shards that hold needed tensors are downloaded. The whole checkpoint is never
materialised.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from codec.errors import ModelError
from codec.plan import ModelCard
from workers import catalog
from workers.families import family_of

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_VOLATILE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "use_cache"}
_SAMPLE_ROWS = 2


class Checkpoint:
    """A readable model: its configuration, and where each tensor is.

    `ref` is what transformers' own `from_pretrained` calls take for tokenizer and generation config.
    """

    def __init__(self, model: str) -> None:
        """Find `model`. Raises `ModelError` if it does not exist, or cannot be split or read."""
        self.name = model
        self._root = _local_directory(model)
        self.ref = str(self._root) if self._root else model
        self.config = _read_config(self.ref, model)
        family_of(self.config)
        self._commit = None if self._root else _cached_commit(model)
        self._files = self._index()

    @property
    def blocks(self) -> int:
        """How many decoder blocks the model has."""
        return int(self.config.num_hidden_layers)

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._files

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The named tensors, one at a time, as stored. Raises `ModelError` for one that is missing.

        Files are closed as soon as their last tensor was read, so their pages can go.
        """
        by_file: dict[str, list[str]] = {}
        for name in names:
            if name not in self._files:
                raise ModelError(f"{self.name} has no tensor {name!r}", hint="Is it a complete checkpoint?")
            by_file.setdefault(self._files[name], []).append(name)
        for file, wanted in by_file.items():
            path = self._path(file)
            for name in wanted:
                with self._open(path) as shard:
                    tensor = shard.get_tensor(name)
                yield name, tensor

    def card(self, blocks: Iterable[int] = ()) -> ModelCard:
        """This model's identity, with samples of those `blocks` that can be read without a download."""
        facts = {k: v for k, v in self.config.to_dict().items() if k not in _VOLATILE}
        text = json.dumps([facts, sorted(self._files)], sort_keys=True, default=str)
        samples = {i: digest for i in blocks if (digest := self._sample(i))}
        return ModelCard(
            name=self._public_name(),
            fingerprint=hashlib.sha256(text.encode()).hexdigest()[:32],
            blocks=self.blocks,
            hidden=int(self.config.hidden_size),
            samples=samples,
        )

    def _public_name(self) -> str:
        """What others may know the model as: a local directory's own name, not where it lies."""
        return (self._root.name if self._root and self.name not in catalog.MODELS else self.name)[:512]

    def _sample(self, block: int) -> str:
        prefix = f"model.layers.{block}."
        digest = hashlib.sha256()
        for name in sorted(name for name in self._files if name.startswith(prefix)):
            path = self._cached(self._files[name])
            if path is None:
                return ""
            with self._open(path) as shard:
                rows = shard.get_slice(name)[:_SAMPLE_ROWS]
                digest.update(rows.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def _index(self) -> dict[str, str]:
        """Tensor name to file name, from the shard index or the single file's own header."""
        index = self._try_path(_INDEX)
        try:
            if index is not None:
                files = dict(json.loads(index.read_text())["weight_map"])
                if strange := [file for file in files.values() if Path(str(file)).name != file]:
                    raise ValueError(f"{strange[0]!r} is not a file beside it")
                return files
            with self._open(self._path(_SINGLE)) as shard:
                return dict.fromkeys(shard.keys(), _SINGLE)
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{self.name}: {_INDEX} is not a shard index: {error}") from None

    @contextmanager
    def _open(self, path: Path) -> Iterator[safe_open]:
        try:
            with safe_open(path, framework="pt") as shard:
                yield shard
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} cannot be read as safetensors: {error}") from None

    def _path(self, file: str) -> Path:
        path = self._try_path(file)
        if path is None:
            raise ModelError(
                f"{self.name} has no {file}", hint="Trunkline reads safetensors; convert the model first."
            )
        return path

    def _try_path(self, file: str) -> Path | None:
        if self._root is not None:
            path = self._root / file
            return path if path.is_file() else None
        # Only a hub model needs a hub client.
        from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

        if (
            self._commit
            and try_to_load_from_cache(self.name, file, revision=self._commit) is _CACHED_NO_EXIST
        ):
            return None  # asked before: without this a single-file model could not be used offline
        try:
            return Path(hf_hub_download(self.name, file, revision=self._commit))
        except LocalEntryNotFoundError as error:
            raise ModelError(f"{self.name}: the hub cannot be reached for {file}: {error}") from None
        except EntryNotFoundError:
            return None
        except (HfHubHTTPError, OSError) as error:
            raise ModelError(f"{self.name}: {file} cannot be downloaded: {error}") from None

    def _cached(self, file: str) -> Path | None:
        if self._root is not None:
            return self._root / file
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.name, file, revision=self._commit)
        return Path(found) if isinstance(found, str) else None


def _local_directory(model: str) -> Path | None:
    """The directory of a local or fetched model; None for a hub repository."""
    if model in catalog.MODELS:
        return catalog.fetch(model)
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ModelError(
            f"no model at {model!r}",
            hint=f"Give a directory, a hub id (owner/name), or one of {', '.join(catalog.MODELS)}.",
        )
    return None


def _cached_commit(model: str) -> str | None:
    """The revision of a hub model whose configuration was just read: all its files come from that one,
    even if the repository changes between two shards, and offline what it lacks is known."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "config.json")
    return Path(found).parent.name if isinstance(found, str) else None


def _read_config(ref: str, model: str) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(ref)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"the configuration of {model!r} cannot be read: {reason}",
            hint="Check the name and the connection to the hub, or give a local directory.",
        ) from None
    assert isinstance(config, PreTrainedConfig)
    return config
