"""`trunkline audit` as a person runs it: a table, a report, a picture, and nothing that listens anywhere."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from codec.errors import UsageError
from codec.plan import LoraPlan
from silo_agent.adapters import write_adapter
from silo_agent.audit.command import audit
from silo_agent.audit.subject import public_texts
from silo_agent.tasks.options import DataOptions
from workers.lora import adapter_tensors, add_adapter


def conversation(question: str, answer: str) -> str:
    said = zip(("user", "assistant"), (question, answer), strict=True)
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in said]}) + "\n"


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """Three short conversations."""
    file = tmp_path / "chats.jsonl"
    file.write_text(
        conversation("Who is it?", "The patient in the ward.")
        + conversation("What is the problem?", "Pain in the chest. A broken wrist.")
        + conversation("When?", "Tomorrow morning.")
    )
    return file


def run(tiny: Any, chats: Path, *arguments: str) -> str:
    given = ["--model", str(tiny.path), "--data", str(chats), "--examples", "2"]
    result = CliRunner().invoke(audit, [*given, *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_it_reports_every_attack(tiny: Any, chats: Path, tmp_path: Path) -> None:
    report, picture = tmp_path / "audit.json", tmp_path / "audit.png"
    names = ["unseen", "nearest", "averaged-nearest", "gradients"]
    options = ["--head", "0", "--noise", "0.05", "--wire", "steps", "--attacks", ",".join(names)]
    shown = run(tiny, chats, *options, "--json", str(report), "--plot", str(picture))
    written = json.loads(report.read_text())
    assert written["bench"] == "audit"
    assert written["settings"]["noise"] == 0.05
    rows = {row["name"]: row for row in written["results"]["attacks"]}
    assert list(rows) == names
    assert all(name in shown for name in names)
    recovered = {name: row["token_recovery"] for name, row in rows.items()}
    assert recovered["unseen"] < 0.1
    assert recovered["nearest"] == recovered["averaged-nearest"] == 1
    assert recovered["gradients"] > 0.9
    assert rows["nearest"]["rougeL"] == rows["nearest"]["exact_sentences"] == 1
    with Image.open(picture) as image:
        assert image.width > 500


def test_an_adapter_is_the_silos_alone(
    tiny: Any, chats: Path, tmp_path: Path, split: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head whose adapter moved it far is not the head that the attacker searches with."""
    monkeypatch.setenv("COLUMNS", "140")
    plan = LoraPlan(rank=4, alpha=400.0, targets=("o_proj", "down_proj"))
    tensors = {}
    for span in split(tiny.checkpoint, 2, 2):
        add_adapter(span, "silo", plan, seed=1)
        tensors |= adapter_tensors(span, "silo")
    for name, tensor in tensors.items():
        if ".lora_B." in name:
            tensor.data.normal_()
    write_adapter(tmp_path / "adapter", plan, tensors, "tiny")
    options = ["--attacks", "search", "--candidates", "512", "--wire", "exact"]
    assert "100.0%" in run(tiny, chats, *options)
    assert "100.0%" not in run(tiny, chats, *options, "--adapter", str(tmp_path / "adapter"))


def test_an_unknown_attack_is_told(tiny: Any, chats: Path) -> None:
    with pytest.raises(UsageError, match=r"no attack 'guess'.*nearest"):
        run(tiny, chats, "--attacks", "nearest,guess")


def test_the_attacker_has_other_texts(tiny: Any, chats: Path, clinics: list[Path]) -> None:
    own = DataOptions("chat", str(chats), None, "answer", "model", None, 400)
    examples = own.examples(tiny.tokenizer, "train")
    assert public_texts(own, tiny.tokenizer, None, examples[2:]) == (examples[2].ids,)
    theirs = public_texts(own, tiny.tokenizer, str(clinics[1]), examples[2:])
    assert theirs
    assert not set(theirs) & {example.ids for example in examples}
    assert public_texts(own, tiny.tokenizer, None, []), "the demo's stand in"
