"""The models that Trunkline knows by name, and the cache that holds them.

`fetch` turns a name into a complete Hugging Face model directory. A directory is built beside its
place and renamed into it, so what stands there is whole, whoever was killed or fetched at once.
"""

import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from codec.errors import ModelError, SaveError
from workers import smollm2, tiny

Report = Callable[[str], None]

MODELS: Final[dict[str, Callable[[Path, Report], Path]]] = {
    "smollm2-135m": smollm2.build,
    "tiny": tiny.build,
}
"""Known names, each with the function that builds it in a scratch directory."""

FILES: Final = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
"""What a complete model directory holds; the chat template is in `tokenizer_config.json`."""

STALE_S: Final = 6 * 3600.0
"""Age in seconds after which the scratch directory of a killed fetch is swept away."""


def _silent(_: str) -> None:
    pass


def cache_dir() -> Path:
    """`$TRUNKLINE_CACHE`, else `$XDG_CACHE_HOME/trunkline`, else `~/.cache/trunkline`."""
    if own := os.environ.get("TRUNKLINE_CACHE"):
        return Path(own).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "trunkline"


def is_complete(directory: Path) -> bool:
    """Whether every file of a model is in `directory` and its weights are as long as they say."""
    return all((directory / name).is_file() for name in FILES) and _whole(directory / "model.safetensors")


def fetch(name: str, report: Report = _silent) -> Path:
    """The directory of the model `name`, built first where the cache lacks it.

    `report` gets one line per stage. Any number of processes may fetch the same name at once.

    Raises ModelError for an unknown name or a failed download, SaveError where the cache cannot be
    written.
    """
    if name not in MODELS:
        raise ModelError(
            f"no model named {name!r} is known.", hint=f"Known names: {', '.join(sorted(MODELS))}."
        )
    home = cache_dir() / "models" / name
    if is_complete(home):
        return home
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        _sweep(home)
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=home.parent) as scratch:
            built = MODELS[name](Path(scratch), report)
            if missing := [file for file in FILES if not (built / file).is_file()]:
                raise ModelError(f"building {name} left out {', '.join(missing)}.")
            _settle(built)
            _publish(built, home)
    except OSError as error:
        raise SaveError(
            f"the model {name} could not be stored in {home.parent}: {error}.",
            hint="Free some space there, or set TRUNKLINE_CACHE to another directory.",
        ) from error
    report(f"{name} is ready in {home}")
    return home


def _publish(built: Path, home: Path) -> None:
    """Rename `built` to `home`; a complete `home` that another process put there first stays."""
    for attempt in range(8):
        try:
            built.rename(home)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        else:
            return
        if is_complete(home):
            return
        with suppress(FileNotFoundError):  # another process may have moved it aside already
            home.rename(built.parent / f"torn-{attempt}")
    built.rename(home)  # still taken: let its error speak


def _settle(directory: Path) -> None:
    """Before the rename: others who share the cache may read, and a power cut tears no file."""
    for file in directory.iterdir():
        file.chmod(0o644)
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def _sweep(home: Path) -> None:
    """Remove what killed fetches left beside `home`, once no living one can own it."""
    for left in home.parent.glob(f".{home.name}.*"):
        with suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > STALE_S:
                shutil.rmtree(left, ignore_errors=True)


def _whole(weights: Path) -> bool:
    """Whether a safetensors file has the length that its header gives it."""
    with weights.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = os.fstat(file.fileno()).st_size
        if not 0 < length <= size - 8:
            return False
        try:
            header: dict[str, dict[str, list[int]]] = json.loads(file.read(length))
        except ValueError:
            return False
    ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
    return size == 8 + length + max(ends, default=0)
