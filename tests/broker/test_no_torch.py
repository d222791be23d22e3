"""The broker runs where no torch is, and on machines where importing it would cost seconds."""

import json
import subprocess
import sys
from pathlib import Path

HEAVY = ("torch", "transformers", "peft", "accelerate", "numpy", "safetensors")

PROGRAM = """
import importlib, json, pkgutil, sys, threading
import broker

modules = [f"broker.{module.name}" for module in pkgutil.iter_modules(broker.__path__)]
for module in modules:
    importlib.import_module(module)

from broker.commands import broker as command
from broker.link import ZmqLink
from broker.metrics import BrokerMetrics, serve_metrics
from broker.parcel import Parcel
from broker.router import Router
from broker.server import Server
from codec.messages import Attach, CloseSession

server, stop = Server("tcp://127.0.0.1:0", Router()), threading.Event()
serve_metrics("127.0.0.1:0", BrokerMetrics(server), "broker")
thread = threading.Thread(target=server.serve, args=(stop,))
thread.start()
link = ZmqLink(server.endpoint, Attach(role="silo", name="s", peer=bytes(16)))
link.send(Parcel.of(CloseSession(id=1, session="s"), [b"x"]))
answer = link.receive(10).header
link.close()
stop.set()
thread.join()
print(json.dumps({"modules": modules, "answer": answer.code, "loaded": sorted(sys.modules)}))
"""


def test_importing_and_running_the_broker_loads_nothing_heavy(repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM], cwd=repository, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["answer"] == "unknown-name"
    assert {"broker.router", "broker.server", "broker.link", "broker.commands"} <= set(report["modules"])
    assert [name for name in report["loaded"] if name.partition(".")[0] in HEAVY] == []


def test_the_front_door_loads_nothing_heavy_for_the_broker(repository: Path) -> None:
    program = f"""
import sys
from trunkline import cli
try:
    cli.main(["broker", "--listen", "tcp://10.0.0.1:0"])
except Exception as error:
    print(type(error).__name__)
print([name for name in sys.modules if name.partition(".")[0] in {HEAVY}])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=repository, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["UsageError", "[]"], done.stderr
