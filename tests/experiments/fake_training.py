"""Stands in for `experiments.train` in tests of what starts it: no JAX, no training.

Copied into a folder of its own as `experiments/train.py`. It counts to `steps`, keeps its count in
the run's directory and goes on from there, as real runs do with their checkpoints. Beside the
flags it has orders in $FAKE, such as "steps=100 sleep=0.1 fail=1":

    steps, sleep    how far it counts, and the seconds that a step takes
    fail, stop      the seed that fails, and the one that once asks to be started again
    method          the only one that fails
    meet            how many runs have to be there before it ends
    mute            leave no record
    deaf            ignore SIGTERM
    worker          start a process of its own; patient: look at SIGTERM whether it still lives
"""

import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

orders = dict((f"{word}=true").split("=")[:2] for word in os.environ.get("FAKE", "").split())


def parsed(text):
    try:
        return json.loads(text)
    except ValueError:
        return {"None": None, "True": True, "False": False}.get(text, text)


given = {}
for word in sys.argv[1:]:
    flag, equals, text = word.removeprefix("--").partition("=")
    negated = flag.startswith("no_") and not equals
    given[flag.removeprefix("no_") if negated else flag] = parsed(text) if equals else not negated
config = {**json.loads(pathlib.Path("defaults.json").read_text()), **given}
if config["method"] == "parq":
    config["ramp"] = "sigmoid"
seed = str(config["seed"])

directory = pathlib.Path(config["runs_dir"]) / config["name"]
lock = (directory / "lock").open("w")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit("error: the run is in use")
if config["init_from"] and not (pathlib.Path(config["init_from"]) / "record.json").exists():
    sys.exit(f"error: {config['init_from']} is not complete")

stored = {"experiment": "experiments.train", "config": config}
(directory / "config.json").write_text(json.dumps(stored))
if "deaf" in orders:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "worker" in orders:
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (directory / "worker").write_text(str(worker.pid))

    def look(*_):
        time.sleep(0.2)
        state = "alive" if worker.poll() is None else "dead"
        (directory / "worker_at_the_end").write_text(state)
        sys.exit(75)

    if "patient" in orders:
        signal.signal(signal.SIGTERM, look)
(directory / "pid").write_text(str(os.getpid()))
if orders.get("stop") == seed and not (directory / "count").exists():
    (directory / "count").write_text("0")
    sys.exit(75)
if orders.get("fail") == seed and orders.get("method", config["method"]) == config["method"]:
    raise RuntimeError("the loss is not finite")

count = directory / "count"
first = int(count.read_text()) if count.exists() else 0
print("first step", first, flush=True)
for step in range(first, int(orders.get("steps", 1))):
    (directory / "next").write_text(str(step + 1))
    (directory / "next").replace(count)
    time.sleep(float(orders.get("sleep", 0)))
deadline = time.monotonic() + 30
while len(list(directory.parent.glob("*/pid"))) < int(orders.get("meet", 1)):
    assert time.monotonic() < deadline, "the other run never came"
    time.sleep(0.02)
if "mute" not in orders:
    # The better, the nearer the rate is to the method's best.
    best = {"float": 0.05, "ste": 0.1}.get(config["method"], 0.2)
    value = 0.9 - abs(config["learning_rate"] - best) + config["seed"] / 1000
    keys = ("blended", "blended_recalibrated", "quantized", "quantized_recalibrated")
    readings = dict.fromkeys(keys, value)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    summary = {
        "validation": readings,
        "test": readings if config["read_test"] else None,
        "cores": cores,
    }
    record = {"name": config["name"], **stored, "metrics": [], "summary": summary}
    (directory / "next").write_text(json.dumps(record))
    (directory / "next").replace(directory / "record.json")
