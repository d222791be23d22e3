"""Broker, worker and silos as a user starts them: real processes, the tiny model."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from silo_agent.processes import Processes
from workers import catalog

TINY = ("--model", "tiny", "--head", "1", "--tail", "2")


def pool(processes: Processes) -> tuple[str, str]:
    """A broker and a worker that hosts all of the tiny model."""
    broker = processes.broker()
    processes.start("worker", "worker", "--broker", broker, "--model", "tiny")
    return "--broker", broker


def test_two_silos_train_and_peft_loads_what_they_save(
    processes: Processes, trunkline: Callable[..., object], chats: Path, tmp_path: Path
) -> None:
    """The saved directory on the whole model, in plain PEFT, answers as the split model does."""
    from peft import PeftModel

    broker = pool(processes)
    common = [*broker, *TINY, "--data", str(chats), "--steps", "4", "--silos", "2", "--lr", "0.01"]
    silos = [
        processes.start(
            name,
            *("silo", "train", *common, "--name", name, "--out", str(tmp_path / name)),
            *("--json", str(tmp_path / f"{name}.json"), "--progress", "jsonl"),
        )
        for name in ("north", "south")
    ]
    for silo in silos:
        silo.wait(90)
    report = json.loads((tmp_path / "north.json").read_text())
    assert report["bench"] == "silo-train"
    assert len(report["results"]["steps"]) == 4
    assert report["results"]["loss_last"] < report["results"]["loss_first"]

    prompt = "Summarise for the ward board: a short note"
    answered = trunkline(
        *("silo", "generate", *broker, *TINY, "--prompt", prompt, "--max-tokens", "24"),
        *("--adapter", str(tmp_path / "north"), "--json", str(tmp_path / "answer.json")),
    )
    assert answered.returncode == 0, answered.stderr
    tokens = json.loads((tmp_path / "answer.json").read_text())["results"]["answers"][0]["tokens"]

    directory = catalog.fetch("tiny")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )["input_ids"]
    untrained = whole.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :].tolist()
    tuned = PeftModel.from_pretrained(whole, str(tmp_path / "north"))
    expected = tuned.generate(input_ids=ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :].tolist()
    assert tokens == expected
    assert tokens != untrained, "the adapter changed nothing, so this proves nothing"


def test_any_order_resume_and_eval(
    processes: Processes, trunkline: Callable[..., object], chats: Path, tmp_path: Path
) -> None:
    """A silo that starts before broker and worker waits for them; training goes on from an adapter."""
    endpoint = processes.broker()  # A free port; the broker itself is started again below.
    processes["broker"].stop()
    train = ["silo", "train", "--broker", endpoint, *TINY, "--data", str(chats), "--lr", "0.01"]
    first = processes.start("first", *train, "--steps", "6", "--out", str(tmp_path / "a"))
    time.sleep(1)
    processes.start("worker", "worker", "--broker", endpoint, "--model", "tiny")
    time.sleep(1)
    processes.start("broker", "broker", "--listen", endpoint)
    first.wait(90)

    more = trunkline(*train, "--steps", "6", "--resume", str(tmp_path / "a"), "--out", str(tmp_path / "b"))
    assert more.returncode == 0, more.stderr
    losses = []
    for adapter in ([], ["--adapter", "a"], ["--adapter", "b"]):
        scored = trunkline(
            "silo",
            "eval",
            "--broker",
            endpoint,
            *TINY,
            "--data",
            str(chats),
            *adapter,
            "--json",
            "score.json",
        )
        assert scored.returncode == 0, scored.stderr
        losses.append(json.loads((tmp_path / "score.json").read_text())["results"]["loss"])
    assert losses[0] > losses[1] > losses[2]


def patient(trunkline: Callable[..., Any], *arguments: str) -> Any:
    """Ask again while workers with the wrong blocks were faster than the others."""
    for _ in range(10):
        answer = trunkline(*arguments)
        if "are needed, the workers host" not in answer.stderr:
            break
    return answer


def test_several_workers_and_parts_of_a_span(
    processes: Processes, trunkline: Callable[..., object], tmp_path: Path
) -> None:
    """A silo's trunk may be a part of what a worker hosts; the worker that cannot serve it is not asked."""
    endpoint = processes.broker()
    processes.start("small", "worker", "--broker", endpoint, "--model", "tiny", "--blocks", "2:3")
    processes.start("large", "worker", "--broker", endpoint, "--model", "tiny", "--blocks", "1:5")
    texts = []
    for head, tail in (("1", "1"), ("2", "2")):
        answer = patient(
            trunkline,
            *("silo", "generate", "--broker", endpoint, "--model", "tiny", "--head", head, "--tail", tail),
            *("--prompt", "hello", "--max-tokens", "12", "--json", "a.json"),
        )
        assert answer.returncode == 0, answer.stderr
        texts.append(json.loads((tmp_path / "a.json").read_text())["results"]["answers"][0]["tokens"])
    assert texts[0] == texts[1]
    refused = trunkline(
        *("silo", "generate", "--broker", endpoint, "--model", "tiny", "--head", "0", "--tail", "0"),
        *("--prompt", "hello", "--wait", "20"),
    )
    assert refused.returncode == 1
    assert "blocks 0:6 are needed, the workers host" in refused.stderr


def test_workers_that_each_host_a_part_generate_as_one_that_hosts_all(
    processes: Processes, trunkline: Callable[..., object], tmp_path: Path
) -> None:
    texts = []
    for number, parts in enumerate((["0:6"], ["0:2", "2:4", "3:6"])):
        endpoint = processes.broker()
        for part in parts:
            processes.start(
                f"{number}-{part}", "worker", "--broker", endpoint, "--model", "tiny", "--blocks", part
            )
        answer = patient(
            trunkline,
            *("silo", "generate", "--broker", endpoint, "--model", "tiny", "--head", "1", "--tail", "1"),
            *("--prompt", "hello", "--prompt", "how are you", "--max-tokens", "12", "--json", "a.json"),
        )
        assert answer.returncode == 0, answer.stderr
        answers = json.loads((tmp_path / "a.json").read_text())["results"]["answers"]
        texts.append([answer["tokens"] for answer in answers])
    assert texts[0] == texts[1]


def test_another_model_on_the_worker_is_refused(
    processes: Processes, trunkline: Callable[..., object], tmp_path: Path
) -> None:
    """Same architecture, other weights: the fingerprint tells, and nothing is computed."""
    directory = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(catalog.fetch("tiny"))
    for weight in model.parameters():
        weight.data.mul_(1.5)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(catalog.fetch("tiny")).save_pretrained(directory)
    broker = pool(processes)
    refused = trunkline(
        *("silo", "generate", *broker, "--model", str(directory), "--head", "1", "--tail", "2"),
        *("--prompt", "hello", "--wait", "20"),
    )
    assert refused.returncode == 1
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("trunkline:")]
    assert "weights differ" in line
    assert "same --model" in line


@pytest.mark.parametrize("victim", ["worker", "broker"])
def test_a_death_in_the_pool_is_told_and_nothing_is_left(
    processes: Processes, chats: Path, tmp_path: Path, victim: str
) -> None:
    """Killed in the middle of training: a clear error within the deadline, no adapter, no scratch."""
    broker = pool(processes)
    stepped = threading.Event()
    out = tmp_path / "out" / "adapter"
    silo = processes.start(
        "silo",
        *("silo", "train", *broker, *TINY, "--data", str(chats), "--steps", "100000", "--wait", "5"),
        *("--progress", "jsonl", "--out", str(out), "--deadline", "60"),
        on_line=lambda _: stepped.set(),
    )
    assert stepped.wait(60), silo.last_words()
    processes[victim].stop(9)
    began = time.monotonic()
    while silo.running() and time.monotonic() - began < 40:
        time.sleep(0.1)
    assert not silo.running(), "the silo waits for ever"
    assert silo.code == 1
    assert f"[{victim}]" in silo.last_words()
    assert not out.exists()
    assert not out.parent.exists() or not list(out.parent.iterdir())
