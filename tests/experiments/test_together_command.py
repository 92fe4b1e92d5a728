"""Runs that one process trains together, from the command line, a sweep or a study."""

import dataclasses
import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from ab_jax.training.stopping import StoppedError
from experiments import sweep, together
from experiments.execution.devices import environment_of, gpus, has_accelerator
from experiments.execution.lots import in_lots, members_of_a_lot, task_of
from experiments.execution.tasks import Task
from experiments.settings.config import Config, FlagError, recorded
from tests.fast_compilation import FAST_COMPILATION, fast_compilation  # noqa: F401

SMALL = Config(dataset="digits", width=1 / 32, epochs=1, warmup=0, batch_size=64, read_test=False)


def record_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "record.json").read_text())
    return found


def test_a_sweep_trains_several_runs_in_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_FLAGS", FAST_COMPILATION)
    words = ["train", "--together=9", "--form=vmap", "--cores_per_job=0", f"--runs_dir={tmp_path}"]
    flags = [
        *("--dataset=digits", "--width=0.03", "--epochs=1", "--batch_size=64", "--no_read_test"),
        *("--warmup=0", "--seed=0..1", "--learning_rate=0.1,1e6", "--compilation_cache="),
        "--name=study/lr{learning_rate}_seed{seed}",
    ]
    # The rate that diverges is no hindrance to the others.
    assert sweep.main([*words, "--", *flags]) == 1
    losses = set()
    for seed in range(2):
        record = record_of(tmp_path / f"study/lr0.1_seed{seed}")
        assert record["config"]["seed"] == seed
        assert record["config"]["learning_rate"] == 0.1
        assert record["experiment"] == "experiments.train"
        assert record["summary"]["together"] == {"members": 4, "form": "vmap", "seconds": {}}
        losses.add(record["metrics"][0]["train_loss"])
        log = tmp_path / f"study/lr1e6_seed{seed}" / "log.txt"
        assert "error: The loss is" in log.read_text().splitlines()[-1]
        assert not log.with_name("record.json").exists()
    assert len(losses) == 2  # each is the run of its own seed


@pytest.mark.usefixtures("fast_compilation")
def test_a_run_that_is_complete_does_not_end_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = dataclasses.replace(SMALL, name="first", runs_dir=str(tmp_path), method="float")
    second = dataclasses.replace(first, name="second", seed=1)
    ends = together.run(together.Config(form="in_turn"), [first])
    assert together.tell([first], ends) == 0
    ends = together.run(together.Config(form="in_turn"), [first, second])
    capsys.readouterr()
    assert together.tell([first, second], ends) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"{tmp_path / 'first'} is complete already")
    assert "validation accuracy" in said.out
    assert record_of(tmp_path / "second")["config"]["seed"] == 1
    # With other flags it is another run, which is in the way.
    other = dataclasses.replace(first, learning_rate=0.3)
    assert together.tell([other], ends[:1]) == 1
    assert capsys.readouterr().err.startswith(f"first: error: The run {tmp_path / 'first'}")


def test_how_runs_ended_is_told_of_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = [dataclasses.replace(SMALL, name=n, runs_dir=str(tmp_path)) for n in "abcd"]
    for name in "abd":  # c came to nothing
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "log.txt").mkdir()  # cannot be written
    stopped = StoppedError(tmp_path / "b", 3, "SIGTERM")
    ends = [ValueError("mine"), stopped, OSError("no"), KeyError(1)]
    assert together.tell(members, ends) == 1
    told = capsys.readouterr().err
    assert "a: error: mine" in told
    assert "c: error: no" in told
    assert "KeyError: 1" in (tmp_path / "d" / "log.txt").read_text()
    assert "stopped at step 3" in (tmp_path / "b" / "log.txt").read_text()
    assert together.tell(members[1:2], ends[1:2]) == 75


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 2.0}, "--epochs is 1.0 in a and 2.0 in b: such runs are other programs"),
        ({"method": "ste"}, "--method is ab in a and ste in b"),
        ({"name": "a"}, "--name: two runs are "),
        ({"processes": 2, "process": 0, "coordinator": "h:1"}, "--coordinator is for one run"),
        ({"process": 0}, "--process is for one run"),
        ({"teacher": "t", "init_from": "s"}, "--teacher is None in a and t in b"),
    ],
)
def test_runs_that_are_other_programs_are_refused(changes: dict[str, Any], message: str) -> None:
    a = dataclasses.replace(SMALL, name="a")
    b = dataclasses.replace(SMALL, **{"name": "b", **changes})
    with pytest.raises(FlagError) as caught:
        together.check([b, a] if "process" in changes else [a, b])
    assert message in str(caught.value)
    together.check([a, dataclasses.replace(a, name="b", seed=3, learning_rate=0.3, ramp_stop=0.5)])


@pytest.mark.parametrize("changes", [{"float_epochs": 1.0}, {"profile": True}])
def test_runs_of_their_own_are_refused(changes: dict[str, Any]) -> None:
    members = [dataclasses.replace(SMALL, name=name, **changes) for name in "ab"]
    with pytest.raises(FlagError, match=f"--{next(iter(changes))}"):
        together.check(members)


def task(name: str, **changes: Any) -> Task:
    config = dataclasses.replace(SMALL, name=name, ramp="cubic", **changes)
    command = (sys.executable, "-m", "experiments.train", "--whatever")
    return Task(name=name, directory=Path(name), command=command, flags=recorded(config))


def test_lots_hold_what_differs_in_numbers_alone() -> None:
    tasks = [
        task("a0", seed=0),
        task("b0", method="ste"),
        task("a1", seed=1, learning_rate=0.3),
        task("two_phases", float_epochs=1.0),
        task("a2", weight_decay=0.1, ramp_start=0.2, init_from="elsewhere"),
        task("b1", method="ste", momentum=0.5),
        task("two_phases_too", float_epochs=1.0),
        Task(name="decoder", directory=Path("d"), command=(), flags={"steps": 3}),
    ]
    names = [[one.name for one in lot] for lot in in_lots(tasks, 2)]
    assert names == [
        *(["a0"], ["b0", "b1"], ["a1", "a2"], ["two_phases"], ["two_phases_too"], ["decoder"]),
    ]
    assert [len(lot) for lot in in_lots(tasks, 1)] == [1] * len(tasks)
    taught = task("a3", teacher="start", init_from="s")
    assert [len(lot) for lot in in_lots([tasks[0], taught], 9)] == [1, 1]
    # Enough for every job, and even: one program serves lots of one size.
    many = [task(f"a{seed}", seed=seed) for seed in range(10)]
    assert [len(lot) for lot in in_lots(many, 8)] == [5, 5]
    assert sorted(len(lot) for lot in in_lots(many, 8, jobs=4)) == [2, 2, 3, 3]
    assert [len(lot) for lot in in_lots(many[:2], 8, jobs=4)] == [1, 1]
    assert [len(lot) for lot in in_lots(tasks, 9)] == [3, 2, 1, 1, 1]


def test_a_lot_is_a_command_that_makes_its_runs() -> None:
    lot = [task("a0", seed=0), task("a1", seed=1, learning_rate=0.3)]
    assert task_of(lot[:1]) is lot[0]
    made = task_of(lot)
    assert made.log == lot[0].log
    own, *flags = together.split(made.command[3:])
    assert own == ["--form=auto", "--experiment=train"]
    for words, one in zip(flags, lot, strict=True):
        (config,) = sweep.tasks_of("train", [_run_of(words)], Path("runs"))
        differing = {k for k, v in config.flags.items() if v != one.flags[k]}
        assert differing == set()


def _run_of(words: list[str]) -> Any:
    flags = dict(word.removeprefix("--").split("=") for word in words if "=" in word)
    switches = {word.removeprefix("--no_"): "false" for word in words if "=" not in word}
    name = flags.pop("name")
    return sweep.Run(name, {**flags, **switches})


def test_cpus_train_one_run_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not has_accelerator()
    assert members_of_a_lot("auto") == 1
    assert members_of_a_lot(5) == 5
    with pytest.raises(ValueError, match="--together=0 should be at least 1, or auto"):
        members_of_a_lot(0)


@pytest.fixture
def three_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host on which `nvidia-smi` tells of three."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '0\\n1\\n2\\n'\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("three_gpus")
def test_each_job_has_a_gpu_or_its_part_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpus() == ["0", "1", "2"]
    assert members_of_a_lot("auto") > 1
    assert environment_of(0, 1, gpus()) == {}  # a single job has them all
    own = [environment_of(job, 3, gpus()) for job in range(3)]
    assert [found["CUDA_VISIBLE_DEVICES"] for found in own] == ["0", "1", "2"]
    assert not any("XLA_PYTHON_CLIENT_MEM_FRACTION" in found for found in own)
    shared = [environment_of(job, 5, gpus()) for job in range(5)]
    on = {name: [] for name in gpus()}
    for found in shared:
        share = found.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "1")
        on[found["CUDA_VISIBLE_DEVICES"]].append(float(share))
    assert sorted(map(len, on.values())) == [1, 2, 2]
    assert all(sum(shares) <= 1 for shares in on.values())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,1")
    assert gpus() == ["2", "1"]
    assert environment_of(1, 2, gpus()) == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.2")
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in environment_of(1, 4, gpus())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert gpus() == []


@pytest.mark.usefixtures("three_gpus")
def test_jobs_are_started_with_their_gpu(tmp_path: Path) -> None:
    from experiments.execution.processes import LocalProcesses

    engine = LocalProcesses(2, 0, stop_after=1)
    say = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    tasks = [
        Task(name=n, directory=tmp_path / n, command=(sys.executable, "-c", say), flags={})
        for n in "ab"
    ]
    jobs = [engine.start(task) for task in tasks]
    assert not engine.has_room()
    for job in jobs:
        assert job.wait(60) == 0
        assert engine.code(job) == 0
    assert engine.has_room()
    assert [one.log.read_text().splitlines()[-1] for one in tasks] == ["0", "1"]
