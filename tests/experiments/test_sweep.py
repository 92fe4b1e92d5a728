"""The sweep: its plan as pure functions, its processes with a tiny experiment of our own."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from experiments import sweep
from experiments.recipes import free_flags
from experiments.sweeping import plan as sweep_plan
from experiments.sweeping import processes as sweep_processes
from experiments.sweeping.plan import PlanError, Run, differing_flags, plan

# An experiment without JAX. It counts to --steps, keeps its count in the run's directory and goes
# on from there, as real ones do with their checkpoints.
FAKE = """
import json, os, pathlib, signal, subprocess, sys, time

flags = dict(word.removeprefix("--").split("=", 1) if "=" in word
             else ((word[5:], "False") if word.startswith("--no_") else (word[2:], "True"))
             for word in sys.argv[1:])
directory = pathlib.Path(flags["runs_dir"]) / flags["name"]
config = {key: json.loads(text) if text[:1].isdigit() else text for key, text in flags.items()}
stored = {"experiment": "experiments.fake", "config": config}
(directory / "config.json").write_text(json.dumps(stored))
if "deaf" in flags:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "worker" in flags:
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (directory / "worker").write_text(str(worker.pid))
    def look(*_):
        time.sleep(0.2)
        state = "alive" if worker.poll() is None else "dead"
        (directory / "worker_at_the_end").write_text(state)
        sys.exit(75)
    if "patient" in flags:
        signal.signal(signal.SIGTERM, look)
(directory / "pid").write_text(str(os.getpid()))
if flags.get("stop") == flags.get("seed", "-") and not (directory / "count").exists():
    (directory / "count").write_text("0")
    sys.exit(75)
if flags.get("fail") == flags.get("seed", "-"):
    raise RuntimeError("the loss is not finite")

count = directory / "count"
first = int(count.read_text()) if count.exists() else 0
print("first step", first, flush=True)
for step in range(first, int(flags.get("steps", 1))):
    (directory / "next").write_text(str(step + 1))
    (directory / "next").replace(count)
    time.sleep(float(flags.get("sleep", 0)))
deadline = time.monotonic() + 30
while len(list(directory.parent.glob("*/pid"))) < int(flags.get("meet", 1)):
    assert time.monotonic() < deadline, "the other run never came"
    time.sleep(0.02)
if "mute" not in flags:
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    record = {"name": flags["name"], **stored, "metrics": [], "summary": {"cores": cores}}
    (directory / "record.json").write_text(json.dumps(record))
"""


# The plan


def flags_of(runs: list[Run]) -> list[dict[str, str]]:
    return [dict(run.flags) for run in runs]


def test_plan_is_the_product_with_the_last_flag_fastest(rng: np.random.Generator) -> None:
    names = [f"flag_{i}" for i in range(rng.integers(1, 4))]
    values = [[f"v{k}" for k in range(rng.integers(1, 4))] for _ in names]
    words = [f"--{name}={','.join(items)}" for name, items in zip(names, values, strict=True)]
    expected = [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*values)]
    runs = plan("fake", words)
    assert flags_of(runs) == expected
    assert len({run.name for run in runs}) == len(expected)


def test_ranges_include_both_ends_and_mix_with_values() -> None:
    values = sweep_plan.parse_flags(["--seed=3..5,9,-2..-1"])["seed"]
    assert values == ["3", "4", "5", "9", "-2", "-1"]
    assert sweep_plan.parse_flags(["--init_from=../1..2/x"])["init_from"] == ["../1..2/x"]


def test_flags_may_be_written_with_space_dashes_or_alone() -> None:
    words = ["--learning-rate", "0.1,0.2", "--profile", "--shift=-1", "--offset", "-2"]
    assert sweep_plan.parse_flags(words) == {
        "learning_rate": ["0.1", "0.2"],
        "profile": ["true"],
        "shift": ["-1"],
        "offset": ["-2"],
    }


def test_a_backslash_keeps_a_comma() -> None:
    assert sweep_plan.parse_flags([r"--note=one\, two,three"])["note"] == ["one, two", "three"]


def test_templates_are_filled_from_the_same_run() -> None:
    words = ["--seed=0,1", "--root=a/{seed}", "--init_from={root}/x", "--name=n{seed}"]
    runs = plan("fake", words)
    assert [run.name for run in runs] == ["n0", "n1"]
    assert [run.flags["init_from"] for run in runs] == ["a/0/x", "a/1/x"]


def test_a_template_may_stand_in_a_list() -> None:
    runs = plan("fake", ["--seed=0,1", "--init_from=None,a/{seed}"])
    assert [run.flags["init_from"] for run in runs] == ["None", "a/0", "None", "a/1"]


def test_true_and_false_become_switches() -> None:
    (run,) = plan("fake", ["--a=true", "--b=False", "--c", "--d=1", "--name=x"])
    assert run.arguments() == ["--a", "--no_b", "--c", "--d=1", "--name=x"]


def test_default_name_holds_what_is_swept_and_nothing_else() -> None:
    runs = plan("fake", ["--method=ab,ste", "--init_from=a/b,c", "--epochs=4"])
    assert runs[0].name == "fake/method-ab_init_from-a-b"
    assert runs[3].name == "fake/method-ste_init_from-c"
    assert plan("fake", ["--epochs=4"])[0].name == "fake/single"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed=0,,1"], "--seed=0,,1 has an empty item: remove a comma, or escape it as \\,"),
        (["--seed=4..0"], "--seed: the range 4..0 is empty; write 0..4"),
        (["--seed=0", "--seed=1"], "--seed is given twice: write its values as --seed=a,b"),
        (["seed=0"], "'seed=0' is not a flag: write each as --flag=value"),
        (["-s=0"], "'-s=0' is not a flag"),
        (["--a=1", "--name={seed}"], "--name={seed}: there is no --seed to fill it from"),
        (["--a={b}", "--b={a}"], "the template of --a refers to itself: {b}"),
        (["--runs_dir=x"], "--runs_dir belongs to the sweep: give it before the lone --"),
        (["--name=/x"], "--name=/x must be a relative path below the runs directory"),
        (["--name=a/../../x"], "must be a relative path below the runs directory"),
        (["--name="], "must be a relative path below the runs directory"),
        (["--seed=1,1"], "remove the value given twice"),
    ],
)
def test_a_bad_plan_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        plan("fake", words)
    assert message in str(caught.value)


def test_two_runs_of_one_name_are_refused_naming_both() -> None:
    with pytest.raises(PlanError) as caught:
        plan("fake", ["--method=ab,ste", "--seed=0,1", "--name=s{seed}"])
    assert str(caught.value) == (
        "two runs are named s0:\n"
        "  --method=ab --seed=0 --name=s0\n"
        "  --method=ste --seed=0 --name=s0\n"
        "add {method} to --name"
    )


@pytest.mark.parametrize(
    ("asked", "stored"),
    [
        ("1e-1", 0.1),
        ("4", 4),
        ("4", 4.0),
        ("True", True),
        ("true", "True"),
        ("FALSE", False),
        ("None", None),
        ("null", None),
        ("nan", float("nan")),
        ("ab", "ab"),
        ("", ""),
    ],
)
def test_equal_values_agree_however_they_are_written(asked: str, stored: object) -> None:
    assert differing_flags(Run("n", {"x": asked}), "m", {"config": {"x": stored}}) == []


@pytest.mark.parametrize(
    ("asked", "stored"),
    [("0.1", 0.2), ("1", True), ("0", False), ("None", 0), ("ab", "AB"), ("", None), ("3", [3])],
)
def test_different_values_differ(asked: str, stored: object) -> None:
    lines = differing_flags(Run("n", {"x": asked}), "m", {"config": {"x": stored}})
    assert lines == [f"x: asked {asked}, stored {stored}"]


def test_differences_name_the_experiment_missing_flags_and_negated_switches() -> None:
    run = Run("n", {"seed": "1", "no_flip": "true", "old": "2", "no_test": "true"})
    stored = {
        "experiment": "experiments.other",
        "config": {"seed": 1, "flip": True, "no_test": True, "name": "elsewhere"},
    }
    assert differing_flags(run, "experiments.fake", stored) == [
        "experiment: asked experiments.fake, stored experiments.other",
        "flip: asked true, stored True",
        "old: asked 2, stored nothing",
    ]
    assert differing_flags(Run("n", {"no_flip": "true"}), "m", {"config": {"flip": False}}) == []


def test_core_groups_are_disjoint_and_never_more_than_there_are() -> None:
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system does not pin processes to cores")
    cores = os.sched_getaffinity(0)
    groups = sweep_processes.core_groups(len(cores), 1)
    assert {core for group in groups for core in group} == cores
    assert [len(group) for group in groups] == [1] * len(cores)
    assert sweep_processes.core_groups(3 * len(cores), 0) == [()] * (3 * len(cores))
    with pytest.raises(PlanError, match=f"needs {2 * len(cores)} cores, there are {len(cores)}"):
        sweep_processes.core_groups(len(cores), 2)
    with pytest.raises(PlanError, match="--jobs must be at least 1"):
        sweep_processes.core_groups(0, 1)


# The processes


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A folder whose `experiments` holds the sweep and one experiment, `fake`."""
    folder = tmp_path / "experiments"
    folder.mkdir()
    shutil.copy(str(sweep.__file__), folder)
    shutil.copytree(Path(str(sweep_plan.__file__)).parent, folder / "sweeping")
    (folder / "recipes").mkdir()
    shutil.copy(str(free_flags.__file__), folder / "recipes")
    (folder / "__init__.py").touch()
    (folder / "fake.py").write_text(FAKE)
    return tmp_path


@pytest.fixture
def start(house: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a sweep over `fake` with the given words; whatever is left at the end is killed."""
    processes = []
    # A process in the background may ignore SIGINT, and those it starts would too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def start(*words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "experiments.sweep", "fake", *words]
        process = subprocess.Popen(
            command, cwd=house, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        processes.append(process)
        return process

    yield start
    signal.signal(signal.SIGINT, before)
    for process in processes:
        process.kill()
        process.communicate()
    for file in house.rglob("pid"):
        if alive(file):
            os.kill(int(file.read_text()), signal.SIGKILL)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def alive(pid_file: Path) -> bool:
    """Whether that process runs (one that has ended and waits to be reaped does not)."""
    try:
        status = Path(f"/proc/{pid_file.read_text()}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 40
    while not condition():
        assert time.monotonic() < deadline, "waited 40 s in vain"
        time.sleep(0.02)


def record(house: Path, name: str) -> dict:
    return json.loads((house / "runs" / name / "record.json").read_text())


def test_all_runs_are_done_kept_and_then_skipped(house: Path, start: Callable) -> None:
    words = ("--keep=results/s", "--", "--seed=0..1", "--rate=1e-1", "--name=s/seed{seed}")
    code, output = finish(start(*words))
    assert code == 0, output
    assert "2 done" in output
    for seed in (0, 1):
        kept = house / f"results/s/s/seed{seed}.json"
        assert kept.read_bytes() == (house / f"runs/s/seed{seed}/record.json").read_bytes()
        assert record(house, f"s/seed{seed}")["config"]["seed"] == seed
    assert sorted(path.name for path in (house / "results/s/s").iterdir()) == [
        "seed0.json",
        "seed1.json",
    ]

    (house / "results/s/s/seed0.json").unlink()
    log = (house / "runs/s/seed0/log.txt").read_text()
    code, output = finish(start(*words[:3], "--rate=0.1", words[4]))
    assert code == 0, output
    assert "2 skipped" in output
    assert (house / "runs/s/seed0/log.txt").read_text() == log
    assert (house / "results/s/s/seed0.json").exists()


def test_a_finished_run_with_other_flags_stops_everything(house: Path, start: Callable) -> None:
    code, _ = finish(start("--", "--seed=0..1", "--epochs=4", "--rate=0.1", "--name=s{seed}"))
    assert code == 0
    code, output = finish(
        start("--", "--seed=0..2", "--epochs=8", "--rate=0.2", "--name=s{seed}", "--flip=false")
    )
    assert code == 2
    for seed in (0, 1):
        expected = (
            f"runs/s{seed} exists with other flags:\n"
            "    epochs: asked 8, stored 4\n"
            "    rate: asked 0.2, stored 0.1\n"
            "    flip: asked false, stored nothing\n"
            f"  give another --name, or remove runs/s{seed}"
        )
        assert expected in output
    assert not (house / "runs/s2").exists()


def test_a_failing_run_does_not_stop_the_others(house: Path, start: Callable) -> None:
    words = ("--runs_dir=out", "--", "--seed=0..2", "--fail=1", "--name=s{seed}")
    code, output = finish(start(*words))
    assert code == 1
    assert "2 done, 1 failed" in output
    (row,) = [line for line in output.splitlines() if line.endswith("out/s1/log.txt")]
    assert row.split() == ["s1", "exit", "code", "1", "out/s1/log.txt"]
    assert "RuntimeError: the loss is not finite" in (house / "out/s1/log.txt").read_text()
    assert (house / "out/s2/record.json").exists()


def test_a_run_that_ends_without_its_record_has_failed(start: Callable) -> None:
    code, output = finish(start("--", "--mute", "--name=a"))
    assert code == 1
    assert "failed a (ended without record.json)" in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_sweep_ends_its_runs_and_goes_on_later(
    house: Path, start: Callable, number: signal.Signals
) -> None:
    words = ("--", "--seed=0..1", "--worker", "--steps=100", "--sleep=0.1", "--name=s{seed}")
    process = start(*words)
    count, pids = house / "runs/s0/count", [house / "runs/s0/pid", house / "runs/s0/worker"]
    wait_for(lambda: count.exists() and count.read_text() not in ("", "1"))
    assert all(map(alive, pids))
    process.send_signal(number)
    code, output = finish(process)
    assert code == 128 + number
    assert not any(map(alive, pids))
    assert "stopped s0" in output
    assert "1 stopped, 1 not started" in output
    assert not list(house.rglob("record.json"))

    # The same command resumes: cut the rest short by setting the count near the end.
    reached = count.read_text()
    assert 2 <= int(reached) < 100
    count.write_text("99")
    (house / "runs/s1").mkdir()
    (house / "runs/s1/count").write_text("98")
    code, output = finish(start(*words))
    assert code == 0, output
    log = (house / "runs/s0/log.txt").read_text()
    assert log.count("first step 0\n") == 1
    assert log.count("first step 99\n") == 1
    assert record(house, "s1")["config"]["steps"] == 100


def test_a_run_that_was_asked_to_stop_has_not_failed(house: Path, start: Callable) -> None:
    words = ("--", "--seed=0..1", "--stop=0", "--name=s{seed}")
    code, output = finish(start(*words))
    assert code == 75
    assert "stopped s0 (the same command resumes it)" in output
    assert "1 stopped, 1 done" in output
    code, output = finish(start(*words))
    assert code == 0, output
    assert (house / "runs/s0/record.json").exists()


def test_the_end_reaches_a_run_before_its_workers(house: Path, start: Callable) -> None:
    """A run needs its workers on the way to where it saves its state."""
    process = start("--", "--worker", "--patient", "--steps=600", "--sleep=0.1", "--name=a")
    wait_for(lambda: (house / "runs/a/count").exists())
    process.terminate()
    assert finish(process)[0] == 128 + signal.SIGTERM
    assert (house / "runs/a/worker_at_the_end").read_text() == "alive"
    assert not alive(house / "runs/a/worker")


def test_a_run_that_ignores_the_end_is_killed(house: Path, start: Callable) -> None:
    process = start("--stop_after=0.3", "--", "--deaf", "--steps=600", "--sleep=0.1", "--name=a")
    wait_for(lambda: (house / "runs/a/count").exists())
    process.terminate()
    assert finish(process)[0] == 128 + signal.SIGTERM
    assert not alive(house / "runs/a/pid")


def test_a_run_that_outlived_its_sweep_is_not_started_twice(house: Path, start: Callable) -> None:
    words = ("--", "--steps=600", "--sleep=0.1", "--name=a")
    process = start(*words)
    wait_for(lambda: (house / "runs/a/count").exists())
    process.kill()
    process.wait()
    code, output = finish(start(*words))
    assert code == 2
    assert "runs/a is still being written: wait, or end its process" in output
    assert (house / "runs/a/log.txt").read_text().count("first step") == 1


def test_jobs_run_side_by_side_on_their_own_cores(house: Path, start: Callable) -> None:
    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores to pin processes to")
    # Each run waits for the other to have started: one at a time, neither would end.
    code, output = finish(start("--jobs=2", "--", "--seed=0,1", "--meet=2", "--name=s{seed}"))
    assert code == 0, output
    cores = [record(house, name)["summary"]["cores"] for name in ("s0", "s1")]
    assert [len(group) for group in cores] == [1, 1]
    assert cores[0] != cores[1]


def test_more_jobs_than_cores_are_refused(start: Callable) -> None:
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system does not pin processes to cores")
    code, output = finish(start("--jobs=10000", "--", "--name=a"))
    assert code == 2
    assert "--jobs=10000 with --cores_per_job=1 needs 10000 cores" in output


def test_dry_run_shows_every_command_and_starts_nothing(house: Path, start: Callable) -> None:
    (house / "runs/s1").mkdir(parents=True)
    code, output = finish(start("--dry_run", "--", "--seed=0,1", "--flip=false", "--name=s{seed}"))
    assert code == 0
    rows = [line.split() for line in output.splitlines()]
    assert rows[0] == ["run", "state", "command"]
    assert rows[1][:2] == ["s0", "new"]
    assert rows[2][:3] == ["s1", "cut", "off"]
    command = "-m experiments.fake --seed=0 --no_flip --name=s0 --runs_dir=runs"
    assert rows[1][3:] == command.split()
    assert not (house / "runs/s0").exists()
    assert not list((house / "runs/s1").iterdir())


def test_an_unknown_experiment_names_those_that_exist(house: Path) -> None:
    (house / "experiments/other.py").touch()
    command = [sys.executable, "-m", "experiments.sweep", "fakes", "--", "--seed=0"]
    result = subprocess.run(command, cwd=house, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "there is no experiment 'fakes'; there are: fake, other" in result.stderr


def test_a_copy_that_a_full_disk_ends_leaves_the_old_one(
    tmp_path: Path, full_disk: Callable[[int], contextlib.AbstractContextManager[None]]
) -> None:
    source, kept = tmp_path / "record.json", tmp_path / "kept" / "run.json"
    source.write_bytes(b"old")
    sweep.copy_atomically(source, kept)
    source.write_bytes(bytes(100))
    with (
        full_disk(50),
        pytest.raises(OSError, match=r"run\.json cannot be written: File too large"),
    ):
        sweep.copy_atomically(source, kept)
    assert [path.read_bytes() for path in kept.parent.iterdir()] == [b"old"]


@pytest.mark.parametrize("name", ["record.json", "config.json"])
@pytest.mark.parametrize(
    "text", [b"[]", b"", b"\xff", b"{", b'{"config": 5}', b"[" * 100_000, None]
)
def test_a_damaged_file_of_a_run_is_named_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: bytes | None
) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "metrics.jsonl").touch()
    if text is None:
        (tmp_path / "x" / name).mkdir()
    else:
        (tmp_path / "x" / name).write_bytes(text)
    words = ["binarynet_cifar10", f"--runs_dir={tmp_path}", "--", "--seed=0", "--name=x"]
    assert sweep.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'x' / name} is damaged")
    assert "remove it, or its directory" in line
