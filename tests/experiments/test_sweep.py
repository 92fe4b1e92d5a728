"""The sweep: its plan as pure functions, its processes with a stand-in for training."""

import contextlib
import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import experiments
from experiments.execution import combinations as sweep_plan
from experiments.execution import processes as sweep_processes
from experiments.execution.combinations import PlanError, Run, plan
from experiments.execution.executor import copy_atomically
from experiments.sweep import EXPERIMENTS, main
from tests.experiments.fake_runs import House, alive, house, wait_for

__all__ = ["house"]

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


# The flags


def test_flags_are_checked_before_anything_starts(house: House) -> None:
    for words, message in [
        (["--epochs=1,-1"], "--epochs=-1.0: should be greater than 0"),
        (["--width=nan"], "--width=nan: should be a finite number"),
        (["--method=ste,abc"], "--method=abc is not known. Choose one of float, ste"),
        (["--weights=int9"], "--weights=int9 is not known"),
        (["--learning_rat=0.1"], "--learning_rat=0.1: Unrecognized options"),
        (["--act_start=0.1"], "--act_start and --act_stop are for --act_bits"),
    ]:
        code, output = house.call(main, "train", "--", *words)
        assert code == 2
        assert message in output
    assert not (house.path / "runs").exists()


def test_what_can_be_swept_is_what_makes_runs_by_flags() -> None:
    """The trainer, all that has defaults for it, and the decoder; nothing else."""
    makes_runs = {"train", "decoder_text"}
    for path in Path(experiments.__path__[0]).glob("*.py"):
        if "\n    train.main(DEFAULTS" in path.read_text("utf-8"):
            makes_runs.add(path.stem)
    assert {*EXPERIMENTS} == makes_runs


# The processes


def test_all_runs_are_done_kept_and_then_skipped(house: House) -> None:
    words = ("train", "--keep=results/s", "--", "--seed=0..1", "--learning_rate=1e-1")
    code, output = house.call(main, *words, "--name=s/seed{seed}")
    assert code == 0, output
    assert "2 done" in output
    for seed in (0, 1):
        kept = house.path / f"results/s/s/seed{seed}.json"
        assert kept.read_bytes() == (house.path / f"runs/s/seed{seed}/record.json").read_bytes()
        assert house.record(f"s/seed{seed}")["config"]["seed"] == seed
    found = sorted(path.name for path in (house.path / "results/s/s").iterdir())
    assert found == ["seed0.json", "seed1.json"]

    (house.path / "results/s/s/seed0.json").unlink()
    log = (house.path / "runs/s/seed0/log.txt").read_text()
    code, output = house.call(main, *words[:-1], "--learning_rate=0.1", "--name=s/seed{seed}")
    assert code == 0, output
    assert "2 skipped" in output
    assert (house.path / "runs/s/seed0/log.txt").read_text() == log
    assert (house.path / "results/s/s/seed0.json").exists()


def test_a_finished_run_with_other_flags_stops_everything(house: House) -> None:
    words = ("train", "--", "--name=s{seed}", "--seed=0..1")
    code, output = house.call(main, *words, "--epochs=4", "--learning_rate=0.1")
    assert code == 0, output
    words = ("train", "--", "--name=s{seed}", "--seed=0..2")
    # What is not given, and cannot change a result, may differ: here where data lie.
    code, output = house.call(
        main, *words, "--epochs=8", "--learning_rate=0.2", "--flip=false", "--data_dir=x"
    )
    assert code == 2
    for seed in (0, 1):
        expected = (
            f"runs/s{seed} exists with other flags:\n"
            "    --epochs was 4, is 8.0\n"
            "    --flip was True, is False\n"
            "    --learning_rate was 0.1, is 0.2\n"
            f"  give another name, or remove runs/s{seed}"
        )
        assert expected in output
    assert not (house.path / "runs/s2").exists()


def test_a_failing_run_does_not_stop_the_others(house: House) -> None:
    words = ("train", "--runs_dir=out", "--", "--seed=0..2", "--name=s{seed}")
    code, output = house.call(main, *words, fake="fail=1")
    assert code == 1
    assert "2 done, 1 failed" in output
    (row,) = [line for line in output.splitlines() if line.endswith("out/s1/log.txt")]
    assert row.split() == ["s1", "exit", "code", "1", "out/s1/log.txt"]
    assert "  RuntimeError: the loss is not finite\n" in output
    assert (house.path / "out/s2/record.json").exists()


def test_a_run_that_ends_without_its_record_has_failed(house: House) -> None:
    code, output = house.call(main, "train", "--", "--name=a", fake="mute")
    assert code == 1
    assert "failed a (ended without record.json)" in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_sweep_ends_its_runs_and_goes_on_later(
    house: House, number: signal.Signals
) -> None:
    words = ("train", "--", "--seed=0..1", "--name=s{seed}")
    fake = "worker steps=100 sleep=0.1"
    count = house.path / "runs/s0/count"
    pids = [house.path / "runs/s0/pid", house.path / "runs/s0/worker"]

    def is_under_way() -> bool:
        return count.exists() and count.read_text() not in ("", "1") and all(map(alive, pids))

    code, output = house.call(main, *words, fake=fake, stop=(is_under_way, number))
    assert code == 128 + number
    wait_for(lambda: not any(map(alive, pids)), seconds=5)
    assert "stopped s0" in output
    assert "1 stopped, 1 not started" in output
    assert not list(house.path.rglob("record.json"))

    # The same command resumes: cut the rest short by setting the count near the end.
    reached = count.read_text()
    assert 2 <= int(reached) < 100
    count.write_text("99")
    (house.path / "runs/s1").mkdir()
    (house.path / "runs/s1/count").write_text("98")
    code, output = house.call(main, *words, fake=fake)
    assert code == 0, output
    log = (house.path / "runs/s0/log.txt").read_text()
    assert log.count("first step 0\n") == 1
    assert log.count("first step 99\n") == 1
    assert (house.path / "runs/s1/count").read_text() == "100"


def test_a_run_that_was_asked_to_stop_has_not_failed(house: House) -> None:
    words = ("train", "--", "--seed=0..1", "--name=s{seed}")
    code, output = house.call(main, *words, fake="stop=0")
    assert code == 75
    assert "stopped s0 (the same command resumes it)" in output
    assert "1 stopped, 1 done" in output
    code, output = house.call(main, *words, fake="stop=0")
    assert code == 0, output
    assert (house.path / "runs/s0/record.json").exists()


def test_the_end_reaches_a_run_before_its_workers(house: House) -> None:
    """A run needs its workers on the way to where it saves its state."""
    stop = ((house.path / "runs/a/count").exists, signal.SIGTERM)
    fake = "worker patient steps=600 sleep=0.1"
    code, _ = house.call(main, "train", "--", "--name=a", fake=fake, stop=stop)
    assert code == 128 + signal.SIGTERM
    assert (house.path / "runs/a/worker_at_the_end").read_text() == "alive"
    wait_for(lambda: not alive(house.path / "runs/a/worker"), seconds=5)


def test_a_run_that_ignores_the_end_is_killed(house: House) -> None:
    stop = ((house.path / "runs/a/count").exists, signal.SIGTERM)
    words = ("train", "--stop_after=0.3", "--", "--name=a")
    code, _ = house.call(main, *words, fake="deaf steps=600 sleep=0.1", stop=stop)
    assert code == 128 + signal.SIGTERM
    assert not alive(house.path / "runs/a/pid")


def test_a_run_that_outlived_its_sweep_is_not_started_twice(house: House) -> None:
    (house.path / "runs/a").mkdir(parents=True)
    process = house.train("--name=a", fake="steps=600 sleep=0.1")
    wait_for((house.path / "runs/a/count").exists)
    code, output = house.call(main, "train", "--", "--name=a")
    assert code == 2
    assert "runs/a is in use: wait, or end its process" in output
    assert process.poll() is None
    process.kill()
    process.wait()
    code, output = house.call(main, "train", "--", "--name=a")
    assert code == 0, output


def test_jobs_run_side_by_side_on_their_own_cores(house: House) -> None:
    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores to pin processes to")
    # Each run waits for the other to have started: one at a time, neither would end.
    words = ("train", "--jobs=2", "--", "--seed=0,1", "--name=s{seed}")
    code, output = house.call(main, *words, fake="meet=2")
    assert code == 0, output
    cores = [house.record(name)["summary"]["cores"] for name in ("s0", "s1")]
    assert [len(group) for group in cores] == [1, 1]
    assert cores[0] != cores[1]


def test_more_jobs_than_cores_are_refused(house: House) -> None:
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system does not pin processes to cores")
    code, output = house.call(main, "train", "--jobs=10000", "--", "--name=a")
    assert code == 2
    assert "--jobs=10000 with --cores_per_job=1 needs 10000 cores" in output


def test_dry_run_shows_every_command_and_starts_nothing(house: House) -> None:
    (house.path / "runs/s1").mkdir(parents=True)
    words = ("train", "--dry_run", "--", "--seed=0,1", "--flip=false", "--name=s{seed}")
    code, output = house.call(main, *words)
    assert code == 0
    rows = [line.split() for line in output.splitlines()]
    assert rows[0] == ["run", "state", "command"]
    assert rows[1][:2] == ["s0", "new"]
    assert rows[2][:3] == ["s1", "cut", "off"]
    command = "-m experiments.train --seed=0 --no_flip --name=s0 --runs_dir=runs"
    assert rows[1][3:] == command.split()
    assert not (house.path / "runs/s0").exists()
    assert not list((house.path / "runs/s1").iterdir())


def test_the_time_left_is_told_once_a_run_has_ended(house: House) -> None:
    words = ("train", "--", "--seed=0..2", "--name=s{seed}")
    code, output = house.call(main, *words, fake="steps=2 sleep=0.1")
    assert code == 0, output
    done = [line for line in output.splitlines() if "] done " in line]
    assert [" left" in line for line in done] == [True, True, False]


@pytest.mark.parametrize("name", ["binarynet_cifar", "bench_peers", "sweep", "report"])
def test_an_unknown_experiment_names_those_that_exist(house: House, name: str) -> None:
    code, output = house.call(main, name, "--", "--seed=0")
    assert code == 2
    assert f"there is no experiment {name!r}; there are: binarynet_cifar10, decoder_text" in output


def test_a_copy_that_a_full_disk_ends_leaves_the_old_one(
    tmp_path: Path, full_disk: Callable[[int], contextlib.AbstractContextManager[None]]
) -> None:
    source, kept = tmp_path / "record.json", tmp_path / "kept" / "run.json"
    source.write_bytes(b"old")
    copy_atomically(source, kept)
    source.write_bytes(bytes(100))
    with (
        full_disk(50),
        pytest.raises(OSError, match=r"run\.json cannot be written: File too large"),
    ):
        copy_atomically(source, kept)
    assert [path.read_bytes() for path in kept.parent.iterdir()] == [b"old"]


@pytest.mark.parametrize("name", ["record.json", "config.json"])
@pytest.mark.parametrize(
    "text", [b"[]", b"", b"\xff", b"{", b'{"config": 5}', b"[" * 100_000, None]
)
def test_a_damaged_file_of_a_run_is_named_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: bytes | None
) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "metrics.jsonl").write_text("{}\n")
    if text is None:
        (tmp_path / "x" / name).mkdir()
    else:
        (tmp_path / "x" / name).write_bytes(text)
    words = ["train", f"--runs_dir={tmp_path}", "--", "--seed=0", "--name=x"]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'x' / name} is damaged")
    assert f"Remove {tmp_path / 'x'}" in line
