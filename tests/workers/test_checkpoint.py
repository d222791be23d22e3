"""Finding a model and reading no more of it than is asked for."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from codec.errors import ModelError
from codec.partition import Span as Blocks
from workers import catalog
from workers.checkpoint import Checkpoint
from workers.span import Span

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sharded(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Any]
) -> Callable[[str], Path]:
    """A tiny model again, its weights cut into many files."""
    built: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in built:
            built[name] = tmp_path_factory.mktemp("sharded")
            tiny_model(name).whole.save_pretrained(built[name], max_shard_size="20KB")
            assert not (built[name] / SINGLE).exists()
        return built[name]

    return get


def shards(directory: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((directory / INDEX).read_text())["weight_map"]
    return found


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target, dirs_exist_ok=True))


# --- reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-tied", "llama-untied", "gemma3_text"])
@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_tensors_are_read_as_stored(
    tiny_model: Callable[[str], Any], sharded: Callable[[str], Path], name: str, layout: str
) -> None:
    model = tiny_model(name)
    directory = model.path if layout == "single" else sharded(name)
    checkpoint = Checkpoint(str(directory))
    weights = {key: value for key, value in model.whole.named_parameters() if key in checkpoint}
    assert ("lm_head.weight" in checkpoint) is (name != "llama-tied")
    assert checkpoint.blocks == 4
    assert checkpoint.ref == str(directory)
    read = dict(checkpoint.read(weights))
    assert read.keys() == weights.keys()
    for key, value in weights.items():
        assert torch.equal(read[key], value)


@pytest.mark.parametrize("name", ["llama-tied", "llama-untied"])
def test_spans_of_a_sharded_model_are_exact(
    sharded: Callable[[str], Path], tiny_model: Callable[[str], Any], split: Callable[..., Any], name: str
) -> None:
    parts = split(Checkpoint(str(sharded(name))), 1, 2)
    ids = torch.arange(12)
    values: Any = ids
    with torch.no_grad():
        for part in parts:
            values = part.run(values, [12])
    torch.testing.assert_close(values, tiny_model(name).whole(ids[None]).logits[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_stored_dtype_becomes_the_one_asked_for(
    tmp_path: Path, tiny_model: Callable[[str], Any], stored: torch.dtype, dtype: torch.dtype
) -> None:
    source = tiny_model("llama-untied").path
    copied(source, tmp_path)
    weights = {key: value.to(stored) for key, value in load_file(source / SINGLE).items()}
    save_file(weights, tmp_path / SINGLE, metadata={"format": "pt"})
    checkpoint = Checkpoint(str(tmp_path))
    key = "model.layers.2.mlp.up_proj.weight"
    assert dict(checkpoint.read([key]))[key].dtype == stored
    span = Span(checkpoint, Blocks(2, 3), dtype=dtype)
    found = span.model.get_parameter("layers.0.mlp.up_proj.weight")
    assert torch.equal(found, weights[key].to(dtype))
    assert {p.dtype for p in span.model.parameters()} == {dtype}


def test_a_span_needs_only_the_files_of_its_own_tensors(
    tmp_path: Path, sharded: Callable[[str], Path], tiny_model: Callable[[str], Any]
) -> None:
    """Every other file is missing, or is garbage: what is not needed is not even looked at."""
    copied(sharded("llama-untied"), tmp_path)
    needed = {file for key, file in shards(tmp_path).items() if key.startswith("model.layers.2.")}
    others = sorted({*shards(tmp_path).values()} - needed)
    assert len(others) >= 4
    for file in others[::2]:
        (tmp_path / file).unlink()
    for file in others[1::2]:
        (tmp_path / file).write_bytes(b"garbage")
    hidden = torch.randn(5, 32)
    span = Span(Checkpoint(str(tmp_path)), Blocks(2, 3))
    whole = Span(tiny_model("llama-untied").checkpoint, Blocks(2, 3))
    assert torch.equal(span.run(hidden, [5]), whole.run(hidden, [5]))


class Listing(Checkpoint):
    """A checkpoint that keeps a list of the tensors it was asked for."""

    def read(self, names: Any) -> Any:
        self.asked = list(names)
        return super().read(self.asked)


@pytest.mark.parametrize("name", ["llama-tied", "llama-untied", "phi3"])
def test_each_part_asks_for_its_own_tensors(tiny_model: Callable[[str], Any], name: str) -> None:
    checkpoint = Listing(str(tiny_model(name).path))
    stored = set(load_file(tiny_model(name).path / SINGLE))
    own_head = {"lm_head.weight"} & stored

    def blocks(*wanted: int) -> set[str]:
        return {key for key in stored if any(key.startswith(f"model.layers.{i}.") for i in wanted)}

    head = Span(checkpoint, Blocks(0, 1), embeds=True)
    assert set(checkpoint.asked) == blocks(0) | {"model.embed_tokens.weight"}
    Span(checkpoint, Blocks(1, 3))
    assert set(checkpoint.asked) == blocks(1, 2)
    Span(checkpoint, Blocks(3, 4), predicts=True, tied=head)
    assert set(checkpoint.asked) == blocks(3) | {"model.norm.weight"} | own_head
    Span(checkpoint, Blocks(4, 4), predicts=True)
    assert set(checkpoint.asked) == {"model.norm.weight"} | (own_head or {"model.embed_tokens.weight"})


# --- what is wrong with a model ----------------------------------------------------------------------


def test_a_tensor_that_is_not_there_is_named(tmp_path: Path, tiny_model: Callable[[str], Any]) -> None:
    copied(tiny_model("llama").path, tmp_path)
    weights = load_file(tmp_path / SINGLE)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / SINGLE, metadata={"format": "pt"})
    checkpoint = Checkpoint(str(tmp_path))
    Span(checkpoint, Blocks(2, 4))
    with pytest.raises(ModelError, match=r"no tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        Span(checkpoint, Blocks(0, 2))


def test_a_shard_that_is_not_there_is_named(tmp_path: Path, sharded: Callable[[str], Path]) -> None:
    copied(sharded("llama"), tmp_path)
    file = shards(tmp_path)["model.layers.1.mlp.up_proj.weight"]
    (tmp_path / file).unlink()
    with pytest.raises(ModelError, match=f"has no {file}"):
        Span(Checkpoint(str(tmp_path)), Blocks(0, 2))


@pytest.mark.parametrize("damage", ["empty", "garbage", "half", "longer header", "text"])
def test_a_damaged_file_is_named(tmp_path: Path, tiny_model: Callable[[str], Any], damage: str) -> None:
    copied(tiny_model("llama").path, tmp_path)
    whole = (tmp_path / SINGLE).read_bytes()
    broken = {
        "empty": b"",
        "garbage": bytes(range(256)) * 40,
        "half": whole[: len(whole) // 2],
        "longer header": (1 << 62).to_bytes(8, "little") + whole[8:],
        "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    }
    (tmp_path / SINGLE).write_bytes(broken[damage])
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read as safetensors"):
        Checkpoint(str(tmp_path))


def test_a_damaged_shard_is_named_when_it_is_read(tmp_path: Path, sharded: Callable[[str], Path]) -> None:
    copied(sharded("llama"), tmp_path)
    file = shards(tmp_path)["model.layers.1.mlp.up_proj.weight"]
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:-1])
    with pytest.raises(ModelError, match=f"{file} cannot be read as safetensors"):
        Span(Checkpoint(str(tmp_path)), Blocks(0, 2))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": [1, 2]}'])
def test_a_damaged_index_is_named(tmp_path: Path, sharded: Callable[[str], Path], content: str) -> None:
    copied(sharded("llama"), tmp_path)
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json is not a shard index"):
        Checkpoint(str(tmp_path))


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/hostname", 7, None])
def test_an_index_cannot_point_outside_the_model(
    tmp_path: Path, sharded: Callable[[str], Path], file: Any
) -> None:
    model = copied(sharded("llama"), tmp_path / "model")
    save_file({"model.norm.weight": torch.zeros(32)}, tmp_path / "secret.safetensors")
    index = {"weight_map": {**shards(model), "model.norm.weight": file}}
    (model / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"is not a shard index"):
        Checkpoint(str(model))


@pytest.mark.parametrize("kind", ["gpt2", "mamba", "gpt_neox"])
def test_an_unsupported_architecture_is_named_before_its_weights_are_touched(
    tmp_path: Path, kind: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ModelError, match=f"architecture '{kind}'") as caught:
        Checkpoint(str(tmp_path))
    assert "llama" in caught.value.hint
    assert "gemma2" in caught.value.hint


def test_a_model_without_safetensors_says_so(tmp_path: Path, tiny_config: Callable[..., Any]) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match=r"has no model\.safetensors") as caught:
        Checkpoint(str(tmp_path))
    assert "convert" in caught.value.hint


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "no-such-kind"}', "{}"])
def test_a_configuration_that_cannot_be_read_is_an_error_of_the_model(
    tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"configuration of .* cannot be read"):
        Checkpoint(str(tmp_path))


@pytest.mark.parametrize("model", ["nowhere", "./no/such", "/no/such/model", "~/no-such-model", "a/b/c"])
def test_a_model_that_is_nowhere_is_an_error_that_says_what_to_give(model: str) -> None:
    with pytest.raises(ModelError, match=f"no model at '{model}'") as caught:
        Checkpoint(model)
    assert "owner/name" in caught.value.hint
    for known in catalog.MODELS:
        assert known in caught.value.hint


def test_a_file_is_not_a_model(tiny_model: Callable[[str], Any]) -> None:
    with pytest.raises(ModelError, match="no model at"):
        Checkpoint(str(tiny_model("llama").path / SINGLE))


# --- identity ----------------------------------------------------------------------------------------


def test_the_same_model_in_another_place_is_the_same(
    tmp_path: Path, tiny_model: Callable[[str], Any], sharded: Callable[[str], Path]
) -> None:
    """Copied, cut into shards, or said to hold another dtype: one model."""
    original = tiny_model("gemma3_text")
    copy = copied(original.path, tmp_path / "elsewhere")
    facts = json.loads((copy / "config.json").read_text())
    facts |= {"dtype": "bfloat16", "transformers_version": "4.0.0", "use_cache": False}
    (copy / "config.json").write_text(json.dumps(facts))
    cards = [Checkpoint(str(place)).card(range(4)) for place in (original.path, copy, sharded("gemma3_text"))]
    assert cards[0].samples.keys() == {0, 1, 2, 3}
    assert len(set(cards[0].samples.values())) == 4
    for card in cards[1:]:
        assert card.fingerprint == cards[0].fingerprint
        assert card.samples == cards[0].samples
        assert card.differs_from(cards[0]) == ""
    assert (cards[0].blocks, cards[0].hidden) == (4, 32)
    assert len(cards[0].fingerprint) == 32


def test_other_weights_are_another_model(
    tmp_path: Path, tiny_model: Callable[[str], Any], tiny_config: Callable[..., Any], random_model: Any
) -> None:
    random_model(tiny_config("llama"), seed=1).save_pretrained(tmp_path)
    one, other = tiny_model("llama").checkpoint, Checkpoint(str(tmp_path))
    assert one.card().differs_from(other.card()) == ""
    assert one.card([2]).differs_from(other.card([3])) == ""
    found = one.card(range(4)).differs_from(other.card([2, 3]))
    assert found == "their weights differ, first in block 2"


@pytest.mark.parametrize(
    "change", [{"rms_norm_eps": 1e-3}, {"intermediate_size": 40}, {"num_hidden_layers": 3}]
)
def test_another_architecture_is_another_model(
    tmp_path: Path,
    tiny_model: Callable[[str], Any],
    tiny_config: Callable[..., Any],
    random_model: Any,
    change: dict[str, Any],
) -> None:
    random_model(tiny_config("llama", **change)).save_pretrained(tmp_path)
    found = tiny_model("llama").checkpoint.card().differs_from(Checkpoint(str(tmp_path)).card())
    assert found == "their architectures or tensors differ"


def test_other_tensors_are_another_model(tmp_path: Path, tiny_model: Callable[[str], Any]) -> None:
    """Of one configuration, with an lm_head of its own where the other's is tied."""
    copied(tiny_model("llama-tied").path, tmp_path)
    weights = load_file(tmp_path / SINGLE)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * 2
    save_file(weights, tmp_path / SINGLE, metadata={"format": "pt"})
    found = tiny_model("llama-tied").checkpoint.card().differs_from(Checkpoint(str(tmp_path)).card())
    assert found == "their architectures or tensors differ"


# --- a hub -------------------------------------------------------------------------------------------

HUB = r'''
import http.server, json, pathlib, sys, threading

root = pathlib.Path(sys.argv[1])
asked = []
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves ROOT/OWNER/NAME/FILE as OWNER/NAME/resolve/REVISION/FILE."""

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def answer(self, whole):
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[0] == "api" and (root / "/".join(parts[2:4])).is_dir():
            facts = json.dumps({"id": "/".join(parts[2:4]), "sha": COMMIT}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(facts)))
            self.end_headers()
            return self.wfile.write(facts)
        asked.append((self.command, "/".join(parts[4:]) or self.path))
        folder = root / "/".join(parts[:2])
        found = folder / "/".join(parts[4:])
        known = len(parts) > 4 and parts[2] == "resolve" and found.is_file()
        body = found.read_bytes() if known else b""
        self.send_response(200 if known else 404)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body)))
        if known:
            self.send_header("ETag", '"%s"' % found.name.encode().hex())
        else:
            self.send_header("X-Error-Code", "EntryNotFound" if folder.is_dir() else "RepoNotFound")
        self.end_headers()
        if whole:
            self.wfile.write(body)

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()

import os

os.environ["HF_ENDPOINT"] = "http://127.0.0.1:%d" % server.server_port

import torch
from codec.errors import ModelError
from codec.partition import Span as Blocks
from workers.checkpoint import Checkpoint
from workers.span import Span

report = {}


def fetched():
    files = sorted({file for method, file in asked if method == "GET"})
    heads = len([file for method, file in asked if method == "HEAD"])
    asked.clear()
    return {"files": files, "heads": heads}


def failure(model):
    try:
        Checkpoint(model)
    except ModelError as error:
        return str(error)


def ends(model):
    checkpoint = Checkpoint(model)
    head = Span(checkpoint, Blocks(0, 1), embeds=True)
    return checkpoint, head, Span(checkpoint, Blocks(3, 4), predicts=True, tied=head)


checkpoint, head, tail = ends("someone/sharded")
report["ends"] = fetched()
report["samples"] = {str(i): d for i, d in checkpoint.card(range(4)).samples.items()}
report["card"] = fetched()
trunk = Span(checkpoint, Blocks(1, 3))
report["trunk"] = fetched()
with torch.no_grad():
    logits = tail.run(trunk.run(head.run(torch.arange(9), [9]), [9]), [9])
report["logits"] = logits.tolist()
ends("someone/single")
report["single"] = fetched()
report["no repository"] = failure("someone/nothing")
report["pickle"] = failure("someone/pickle")
report["not supported"] = failure("someone/other")
report["refused"] = fetched()

server.shutdown()
server.server_close()
report["offline"] = []
for model in ("someone/sharded", "someone/single"):
    checkpoint, head, tail = ends(model)
    report["offline"].append(float(head.run(torch.arange(9), [9]).abs().sum()))
(pathlib.Path(sys.argv[2])).write_text(json.dumps(report))
'''


@pytest.fixture(scope="module")
def hub(
    tmp_path_factory: pytest.TempPathFactory,
    repository: Path,
    tiny_model: Callable[[str], Any],
    tiny_config: Callable[..., Any],
    sharded: Callable[[str], Path],
) -> dict[str, Any]:
    """What a process saw that took models from a hub on this machine, and lost the hub at the end."""
    place = tmp_path_factory.mktemp("hub")
    owner = place / "served" / "someone"
    copied(sharded("llama-tied"), owner / "sharded")
    copied(tiny_model("llama-tied").path, owner / "single")
    copied(tiny_model("llama-tied").path, owner / "pickle")
    (owner / "pickle" / SINGLE).rename(owner / "pickle" / "pytorch_model.bin")
    copied(owner / "pickle", owner / "other")
    (owner / "other" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    settings = {
        **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
        "HF_HOME": str(place / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "*",
    }
    report = place / "report.json"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", HUB, str(place / "served"), str(report)],
        env=settings, cwd=repository, capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def weights(fetched: dict[str, Any]) -> set[str]:
    return {file for file in fetched["files"] if file.endswith(".safetensors")}


def holding(directory: Path, *prefixes: str) -> set[str]:
    return {file for key, file in shards(directory).items() if key.startswith(prefixes)}


def test_of_a_hub_model_only_the_shards_needed_are_downloaded(
    hub: dict[str, Any], sharded: Callable[[str], Path], tiny_model: Callable[[str], Any]
) -> None:
    directory = sharded("llama-tied")
    ends = holding(directory, "model.embed_tokens.", "model.layers.0.", "model.layers.3.", "model.norm.")
    trunk = holding(directory, "model.layers.1.", "model.layers.2.") - ends
    assert len(trunk) > 1
    assert weights(hub["ends"]) == ends
    assert weights(hub["trunk"]) == trunk
    expected = tiny_model("llama-tied").whole(torch.arange(9)[None]).logits[0]
    torch.testing.assert_close(torch.tensor(hub["logits"]), expected, atol=2e-5, rtol=0)


def test_a_hub_is_asked_once_for_each_file_and_not_for_each_tensor(
    hub: dict[str, Any], sharded: Callable[[str], Path]
) -> None:
    tensors = [key for key in shards(sharded("llama-tied")) if "layers.1." in key or "layers.2." in key]
    assert hub["trunk"]["heads"] <= len(weights(hub["trunk"])) < len(tensors)
    assert hub["single"]["heads"] <= 6


def test_samples_cost_no_download(
    hub: dict[str, Any], sharded: Callable[[str], Path], tiny_model: Callable[[str], Any]
) -> None:
    here = holding(sharded("llama-tied"), "model.embed_tokens.", "model.norm.")
    here |= holding(sharded("llama-tied"), "model.layers.0.", "model.layers.3.")
    samples = tiny_model("llama-tied").checkpoint.card(range(4)).samples
    known = {
        str(i): digest
        for i, digest in samples.items()
        if holding(sharded("llama-tied"), f"model.layers.{i}.") <= here
    }
    assert known.keys() >= {"0", "3"}
    assert known.keys() != {"0", "1", "2", "3"}
    assert hub["samples"] == known
    assert hub["card"] == {"files": [], "heads": 0}


def test_what_a_hub_does_not_have_is_an_error_of_the_model(hub: dict[str, Any]) -> None:
    assert "'someone/nothing' cannot be read" in hub["no repository"]
    assert "has no model.safetensors" in hub["pickle"]
    assert "architecture 'gpt2' cannot be split yet" in hub["not supported"]
    assert weights(hub["refused"]) == set()
    assert "pytorch_model.bin" not in hub["refused"]["files"]


def test_without_the_hub_what_was_downloaded_still_works(hub: dict[str, Any]) -> None:
    """Single-file models too: that they have no shard index is remembered."""
    one, other = hub["offline"]
    assert one == other > 0
