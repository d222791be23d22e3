"""The commands from end to end, over real sockets, against what the whole model says."""

import json
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from broker.link import ZmqLink
from broker.router import Router
from broker.server import Server
from codec.errors import UsageError
from codec.messages import Attach
from codec.partition import Span as Blocks
from silo_agent.commands import silo
from silo_agent.data import chat_examples, prompt_ids
from workers.serve import serve
from workers.service import TrunkService
from workers.span import Span

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def endpoint(tiny: Any) -> Iterator[str]:
    """A broker and a worker, as threads, on a free port."""
    stop = threading.Event()
    server = Server("tcp://127.0.0.1:0", Router())
    card = tiny.checkpoint.card(range(6))
    attach = Attach(role="worker", name="pool", peer=secrets.token_bytes(16), model=card, stop=6)
    link = ZmqLink(server.endpoint, attach)
    service = TrunkService(Span(tiny.checkpoint, Blocks(0, 6)), card, 1 << 26)
    work = [
        threading.Thread(target=server.serve, args=(stop,), daemon=True),
        threading.Thread(target=serve, args=(link, service, stop), daemon=True),
    ]
    for thread in work:
        thread.start()
    yield server.endpoint
    stop.set()
    work[1].join(10)
    link.close()
    work[0].join(10)


@pytest.fixture
def run(endpoint: str, tiny: Any, own_log: None) -> Run:
    """Run a silo's command; it must not fail."""

    def call(name: str, *arguments: object, text: str = "") -> Result:
        shared = ["--broker", endpoint, "--model", str(tiny.path), "--device", "cpu", "--wait", "20"]
        words = [name, *shared, *map(str, arguments)]
        result = CliRunner().invoke(silo, words, input=text, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result

    return call


def whole_answer(tiny: Any, text: str, tokens: int) -> str:
    prompt = prompt_ids(tiny.tokenizer, [{"role": "user", "content": text}], answer_next=True)
    return str(tiny.tokenizer.decode(tiny.greedy(prompt, tokens), skip_special_tokens=True))


def test_generate_streams_the_whole_models_answer(run: Run, tiny: Any, tmp_path: Path) -> None:
    done = run("generate", "--prompt", "Who is it?", "--max-tokens", 12, "--json", tmp_path / "r.json")
    expected = whole_answer(tiny, "Who is it?", 12)
    assert done.stdout == f"{expected}\n"
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["bench"] == "silo-generate"
    (answer,) = report["results"]["answers"]
    assert (answer["prompt"], answer["text"]) == ("Who is it?", expected)
    assert report["results"]["tokens_per_s"] > 0
    assert report["results"]["traffic"]["bytes"]["extend up"] > 0


def test_generate_answers_a_batch_from_options_and_a_file(run: Run, tiny: Any) -> None:
    lines = ["Why?", "", "And when\tthen?"]
    done = run("generate", "--prompt", "Who?", "--prompts", "-", "--max-tokens", 8, text="\n".join(lines))
    texts = ["Who?", "Why?", "And when\tthen?"]
    assert done.stdout == "".join(f"> {text}\n{whole_answer(tiny, text, 8)}\n\n" for text in texts)


def test_generate_answers_more_prompts_than_go_on_together(run: Run, tiny: Any) -> None:
    texts = ["Who?", "Why?", "And when then?", "hello", "No?"]
    done = run("generate", "--prompts", "-", "--max-tokens", 8, "--batch", 2, text="\n".join(texts))
    assert done.stdout == "".join(f"> {text}\n{whole_answer(tiny, text, 8)}\n\n" for text in texts)


def test_auto_keeps_what_memory_bears_and_answers_the_same(
    run: Run, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tmp_path / "r.json"
    for usable, kept in ((1 << 33, (2, 2)), (660_000, (1, 1))):
        monkeypatch.setattr("silo_agent.planning.measuring.usable_memory", lambda _, usable=usable: usable)
        asked = ["--prompt", "Who is it?", "--max-tokens", 12, "--partition", "auto", "--json", report]
        done = run("generate", *asked)
        assert done.stdout == f"{whole_answer(tiny, 'Who is it?', 12)}\n"
        settings = json.loads(report.read_text())["settings"]
        assert (settings["head"], settings["tail"]) == kept
        assert done.stderr.startswith(f"partition: {kept[0]}, {kept[1]} (")


def test_auto_is_there_for_every_command(run: Run, tmp_path: Path, clinics: list[Path]) -> None:
    data = ["--data", clinics[0], "--limit", 2, "--max-length", 150]
    learn = ["--steps", 1, "--batch", 1, "--accumulate", 1, "--out", tmp_path / "adapter"]
    for words in (["train", *data, *learn], ["eval", *data], ["chat", "--context", 100]):
        assert "partition: 2, 2 (as wished, takes " in run(*words, "--partition", "auto").stderr


def test_a_plan_measures_the_way_to_the_trunk(run: Run, tmp_path: Path, clinics: list[Path]) -> None:
    done = run("plan", "--data", clinics[0], "--wire", "bf16", "--json", tmp_path / "r.json")
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert results["line"]["trunk_s"] > 0
    assert results["line"]["silent"] == ""
    assert set(results["seconds"]) == {"silo", "line", "trunk"}
    assert set(results["wires"].values()) == {"bf16"}
    assert "the trunk's forward takes" in done.stdout


def test_generate_continues_raw_text_up_to_a_stop_string(run: Run, tiny: Any) -> None:
    full = tiny.tokenizer.decode(tiny.greedy(tiny.ids("hello"), 20), skip_special_tokens=True)
    stop = full[9:12]
    done = run("generate", "--raw", "--prompt", "hello", "--max-tokens", 20, "--stop", stop)
    assert done.stdout == full[: full.index(stop)] + "\n"


def test_chat_goes_on_until_an_empty_line(run: Run, tiny: Any) -> None:
    done = run("chat", "--max-tokens", 6, "--context", 200, text="Who is it?\nWhy?\n\nnever read\n")
    first = whole_answer(tiny, "Who is it?", 6)
    turns = [("user", "Who is it?"), ("assistant", first), ("user", "Why?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    prompt = prompt_ids(tiny.tokenizer, messages, answer_next=True)
    second = tiny.tokenizer.decode(tiny.greedy(prompt, 6), skip_special_tokens=True)
    assert done.stdout == f"> {first}\n> {second}\n> "


def test_train_then_generate_and_evaluate_with_the_adapter(
    run: Run, tiny: Any, tmp_path: Path, clinics: list[Path]
) -> None:
    data = tmp_path / "few.jsonl"
    data.write_text("".join(clinics[0].read_text().splitlines(keepends=True)[:4]))
    out, report = tmp_path / "adapter", tmp_path / "r.json"
    steps = ["--steps", 4, "--batch", 2, "--accumulate", 2, "--lr", 0.02, "--max-length", 150]
    done = run(
        "train",
        "--data",
        data,
        "--out",
        out,
        *steps,
        "--progress",
        "jsonl",
        "--noise",
        0.01,
        "--json",
        report,
    )
    assert [json.loads(line)["step"] for line in done.stdout.splitlines()] == [1, 2, 3, 4]
    results = json.loads(report.read_text())["results"]
    assert results["loss_last"] < results["loss_first"] - 0.5
    assert all(2 <= step["window"] <= 64 for step in results["steps"])
    scores = {}
    for name, options in {"base": [], "tuned": ["--adapter", out]}.items():
        done = run("eval", "--data", data, "--max-length", 150, "--json", report, *options)
        scores[name] = json.loads(report.read_text())["results"]
        assert f"{scores[name]['loss']:.4f}" in done.stdout
    learned = sum(sum(e.answer[1:]) for e in chat_examples(data, tiny.tokenizer, max_tokens=150))
    assert scores["base"]["tokens"] == scores["tuned"]["tokens"] == learned
    assert scores["base"]["loss"] == pytest.approx(results["loss_first"], abs=0.3)
    assert scores["tuned"]["loss"] < scores["base"]["loss"] - 0.5
    done = run("generate", "--prompt", "Who is it?", "--max-tokens", 6, "--adapter", out)
    assert done.stdout != whole_answer(tiny, "Who is it?", 6) + "\n"


def test_a_task_is_learned_and_scored(run: Run, tmp_path: Path) -> None:
    """Whether the sky is grey, which the tiny model cannot know before."""
    data, out, report = tmp_path / "sky.jsonl", tmp_path / "adapter", tmp_path / "r.json"
    rows = [{"question": f"is {n} so", "passage": "The sky is grey.", "label": n % 4 == 0} for n in range(4)]
    data.write_text("\n".join(map(json.dumps, rows)))
    learn = ["--steps", 6, "--batch", 4, "--accumulate", 1, "--lr", 0.03, "--max-length", 90]
    run("train", "--task", "boolq", "--data", data, "--out", out, *learn, "--json", report)
    losses = json.loads(report.read_text())["results"]
    assert losses["loss_last"] < losses["loss_first"] - 1
    done = run("eval", "--task", "boolq", "--data", data, "--adapter", out, "--json", report)
    tuned = json.loads(report.read_text())
    assert (tuned["bench"], tuned["settings"]["task_name"]) == ("silo-eval", "boolq")
    assert tuned["results"]["accuracy"] >= 0.75
    assert tuned["results"]["examples"] == 4
    assert tuned["results"]["seconds"] > 0
    assert f"{tuned['results']['accuracy']:.1%}" in done.stdout
    assert "accuracy" in done.stdout


def test_a_budget_ends_a_run_before_it_is_exceeded_and_saves(
    run: Run, tmp_path: Path, clinics: list[Path]
) -> None:
    data, out, report = tmp_path / "few.jsonl", tmp_path / "out", tmp_path / "r.json"
    data.write_text("".join(clinics[0].read_text().splitlines(keepends=True)[:2]))
    words = ["--data", data, "--out", out, "--json", report, "--batch", 1, "--max-length", 150]
    words += ["--freeze-head", "--noise-clip", 1, "--delta", 1e-5, "--progress", "jsonl", "--steps", 4]
    words += ["--accumulate", 2]  # Each step sends both examples once.
    done = run("train", *words, "--epsilon", 8)
    totals = [json.loads(line)["epsilon"] for line in done.stdout.splitlines()]
    assert totals == sorted(totals)
    assert len(set(totals)) == 4
    assert totals[-1] == pytest.approx(8)
    account = json.loads(report.read_text())["results"]["account"]
    assert account["epsilon"] == totals[-1]
    assert "ε = 8 at δ = 1e-05 for each sequence" in done.stderr
    assert "gradients cross too and are not covered" in done.stderr

    other = tmp_path / "other"
    words[words.index(out)] = other
    sigma, budget = account["sigma"], (totals[1] + totals[2]) / 2
    with pytest.raises(UsageError, match=r"stopped after step 2 of 4: .* over the budget"):
        run("train", *words, "--noise-abs", sigma, "--budget", budget)
    results = json.loads(report.read_text())["results"]
    assert [step["epsilon"] for step in results["steps"]] == pytest.approx(totals[:2])
    assert results["account"]["epsilon"] < budget
    assert (other / "adapter_model.safetensors").exists()


def test_what_a_session_sent_is_accounted_for(run: Run, tiny: Any, tmp_path: Path) -> None:
    noisy = ["--noise-clip", 1, "--noise-abs", 10, "--delta", 1e-5]
    done = run("generate", "--prompt", "Who?", "--max-tokens", 3, *noisy, "--json", tmp_path / "r.json")
    account = json.loads((tmp_path / "r.json").read_text())["results"]["account"]
    prompt = prompt_ids(tiny.tokenizer, [{"role": "user", "content": "Who?"}], answer_next=True)
    assert account["vectors"] == len(prompt) + 2  # The last token chosen is not sent.
    assert f"ε = {account['epsilon']:.4g} at δ = 1e-05 for all that this command sent" in done.stderr


def test_a_dialogue_is_answered_in_writing(run: Run, tiny: Any, tmp_path: Path) -> None:
    data, report = tmp_path / "dialogue.json", tmp_path / "r.json"
    turns = [{"input_text": "Who?"}, {"input_text": "Why?"}]
    story = {"story": "Ann left.", "questions": turns, "answers": turns}
    data.write_text(json.dumps({"version": "1", "data": [story]}))
    done = run("eval", "--task", "coqa", "--data", data, "--max-new-tokens", 3, "--json", report)
    results = json.loads(report.read_text())["results"]
    assert (results["f1"], results["em"], results["examples"]) == (0, 0, 2)
    assert "0.0%" in done.stdout
    # The second turn sends what is new, and each of two written tokens is a pass of one.
    tokens = results["traffic"]["tokens"]["extend up"]
    content = "Read the story, then answer each question in as few words as possible.\n\nAnn left.\n\nWho?"
    messages = [{"role": "user", "content": content}]
    messages += [{"role": role, "content": text} for role, text in [("assistant", "Who?"), ("user", "Why?")]]
    last = prompt_ids(tiny.tokenizer, messages, answer_next=True)
    assert tokens < len(last) + 12
