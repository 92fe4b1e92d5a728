"""A study's file and its stages, with a stand-in for training; one small study in earnest."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.reporting.run_records import Record
from experiments.study import main
from experiments.study_design.choosing import choose
from experiments.study_design.design import Choice, StudyError
from experiments.study_design.study_file import seeds_of
from tests.experiments.fake_runs import House, house
from tests.fast_compilation import FAST_COMPILATION

__all__ = ["house"]
ROOT = Path(__file__).parents[2]

# Two seeds, two methods, two rates of each; `fake_training` finds 0.1 best for STE, 0.2 for AB.
STUDY = """
about = "Does it work?"

[flags]
dataset = "digits"
epochs = 2

[[stages]]
name = "start"
seeds = "0..1, 100"
run_name = "seed{seed}"
method = "float"
read_test = false

[[stages]]
name = "trials"
seeds = 100
run_name = "{method}_lr{learning_rate}_seed{seed}"
init_from = "start/seed{seed}"
read_test = false
method = ["ste", "ab"]
learning_rate = [0.1, 0.2]

[[stages]]
name = "final"
seeds = "0..1"
run_name = "{method}_seed{seed}"
init_from = "start/seed{seed}"
method = ["ste", "ab"]
learning_rate = "chosen"
choose = { from = "trials", flags = ["learning_rate"] }
"""
ALL = {
    "start": ["seed0", "seed1", "seed100"],
    "trials": [f"{m}_lr{r}_seed100" for m in ("ab", "ste") for r in (0.1, 0.2)],
    "final": [f"{m}_seed{s}" for m in ("ab", "ste") for s in (0, 1)],
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(STUDY)
    return path


def done(house: House) -> dict[str, list[str]]:
    """The runs that are complete, by stage."""
    paths = sorted((house.path / "runs/small").glob("*/*/record.json"))
    stages = {path.parts[-3]: [] for path in paths}
    for path in paths:
        stages[path.parts[-3]].append(path.parts[-2])
    return stages


# The file


def test_a_study_is_run_in_order_with_what_its_trials_choose(house: House, file: Path) -> None:
    code, output = house.call(main, str(file), "--jobs=2", "--cores_per_job=0")
    assert code == 0, output
    assert done(house) == ALL
    for name, rate in (("ste", 0.1), ("ab", 0.2)):
        assert f"small/trials chose learning_rate={rate} for {name}" in output
        for seed in (0, 1):
            config = house.record(f"small/final/{name}_seed{seed}")["config"]
            assert config["learning_rate"] == rate
            assert config["init_from"] == f"runs/small/start/seed{seed}"  # paired by seed
            assert config["read_test"]
    for stage, names in ALL.items():
        for name in names:
            kept = house.path / f"results/small/{stage}/{name}.json"
            record = house.path / f"runs/small/{stage}/{name}/record.json"
            assert kept.read_bytes() == record.read_bytes()
    # It ends with the table of trials and final runs, not of the starts.
    assert "| STE | 0.1 | 2 | 90.05 ± 0.07 |" in output
    assert "**Validation accuracy (%) by learning rate**" in output
    assert "float" not in output.partition("**Test accuracy (%)**")[2].partition("Mean")[0]

    log = (house.path / "runs/small/final/ab_seed0/log.txt").read_text()
    again, output = house.call(main, str(file))
    assert again == 0
    assert "11 skipped" in output
    assert "| STE | 0.1 | 2 |" in output
    assert (house.path / "runs/small/final/ab_seed0/log.txt").read_text() == log


def test_records_that_are_there_are_not_overwritten(house: House, file: Path) -> None:
    other = house.path / "results/small/start/seed0.json"
    other.parent.mkdir(parents=True)
    other.write_text("of another run")
    code, output = house.call(main, str(file))
    assert code == 0, output
    assert other.read_text() == "of another run"
    assert "1 records were not copied to results: others are there" in output
    code, _ = house.call(main, str(file), "--results=", "--runs_dir=others")
    assert code == 0
    assert sorted(p.name for p in (house.path / "results").iterdir()) == ["small"]


def test_a_stopped_study_goes_on(house: House, file: Path) -> None:
    second = house.path / "runs/small/start/seed1/count"
    stop = (second.exists, signal.SIGTERM)
    code, output = house.call(main, str(file), fake="steps=20 sleep=0.1", stop=stop)
    assert code == 128 + signal.SIGTERM
    assert "the same command goes on" in output
    assert "trials" not in done(house)
    reached = int(second.read_text())
    code, output = house.call(main, str(file), fake="steps=20")
    assert code == 0, output
    assert f"first step {reached}\n" in (second.parent / "log.txt").read_text()
    assert done(house) == ALL


def test_what_fails_keeps_what_needs_it_from_starting(house: House, file: Path) -> None:
    code, output = house.call(main, str(file), fake="fail=100")
    assert code == 1
    assert "small/trials: 4 of 4 runs wait for small/start/seed100" in output
    assert "small/final waits: 4 of 4 runs of small/trials are not done" in output
    assert done(house) == {"start": ["seed0", "seed1"]}


def test_shards_share_each_stage_and_wait_for_each_other(house: House, file: Path) -> None:
    code, output = house.call(main, str(file), "--shard=1/2")
    assert code == 75
    assert done(house) == {"start": ["seed1"]}
    assert "small/trials: 2 of 2 runs wait for small/start/seed100" in output
    for shard in ("0/2", "1/2", "0/2", "1/2"):
        code, output = house.call(main, str(file), f"--shard={shard}")
    assert done(house) == ALL
    assert code == 0
    assert "**Test accuracy (%)**" in output


def test_one_stage_alone(house: House, file: Path) -> None:
    code, output = house.call(main, str(file), "--stage=start")
    assert code == 0
    assert done(house) == {"start": ALL["start"]}
    code, output = house.call(main, str(file), "--stage=final")
    assert code == 75
    assert "small/final waits: 4 of 4 runs of small/trials are not done" in output
    code, output = house.call(main, str(file), "--stage=finals")
    assert code == 2
    assert "has small/start, small/trials, small/final" in output


def test_dry_run_tells_all_and_starts_nothing(house: House, file: Path) -> None:
    file.write_text(STUDY + 'later = "more seeds"\n')
    code, output = house.call(main, str(file), "--dry_run")
    assert code == 0
    assert "later: more seeds" in output
    rows = [line for line in output.splitlines() if line.startswith("small/") and " " in line]
    assert len(rows) == 11
    assert sum("--learning_rate=chosen" in row for row in rows) == 4
    assert not (house.path / "runs").exists()


def test_a_run_with_other_flags_stops_everything(house: House, file: Path) -> None:
    assert house.call(main, str(file), "--stage=start")[0] == 0
    file.write_text(STUDY.replace("epochs = 2", "epochs = 3"))
    code, output = house.call(main, str(file))
    assert code == 2
    assert "runs/small/start/seed0 exists with other flags:\n    --epochs was 2.0, is 3.0" in output
    assert "trials" not in done(house)


def test_trials_with_other_flags_choose_nothing(house: House, file: Path) -> None:
    for stage in ("start", "trials"):
        assert house.call(main, str(file), f"--stage={stage}")[0] == 0
    file.write_text(STUDY.replace("epochs = 2", "epochs = 3"))
    code, output = house.call(main, str(file), "--stage=final")
    assert code == 2
    assert "small/trials/ste_lr0.1_seed100 was run with other flags than" in output


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("epochs = 2", "epochs = -2", "stage start: small/start/seed0: --epochs=-2: should be"),
        ("epochs = 2", 'epochs = "2"', "--epochs='2': should be a valid number"),
        ("epochs = 2", "epoch = 2", "[flags]: there is no epoch"),
        ("[0.1, 0.2]", "[0.1, nan]", "--learning_rate=nan: should be a finite number"),
        ("[0.1, 0.2]", "[0.1, 0.1]", "stage trials: learning_rate is a list without values, or"),
        ('["ste", "ab"]', '["ste", "abc"]', "--method=abc is not known"),
        (
            '"start/seed{seed}"',
            '"start/seed"',
            "init_from=start/seed is no run of an earlier",
        ),
        ("_lr{learning_rate}", "", "two runs are named small/trials/ab_seed100"),
        ("{learning_rate}", "{rate}", "there is no flag rate"),
        ('"0..1, 100"', '"0..1, 1"', "has no seed, or one twice"),
        ('"0..1, 100"', '"1..0"', "has no seed, or one twice"),
        ('"0..1, 100"', "true", 'seeds should be as in "0..4, 100"'),
        ("seeds = 100", "", "stage trials: it has no seeds"),
        ('from = "trials"', 'from = "trial"', "choose.from=small/trial is no earlier stage"),
        (
            'flags = ["learning_rate"]',
            'flags = ["ramp_stop"]',
            "choose has no learning_rate in",
        ),
        ("choose = {", "chose = {", "stage final: there is no chose"),
        ('name = "final"', 'name = "trials"', "there are two stages of that name"),
        ('name = "final"', 'name = "other/final"', "there is no choose, init_from"),
        ('"Does it work?"', '""', "about should say what is asked"),
        ("[flags]", "[flags", "is not TOML"),
    ],
)
def test_a_bad_file_is_refused_naming_the_place(
    house: House, file: Path, old: str, new: str, message: str
) -> None:
    assert old in STUDY
    file.write_text(STUDY.replace(old, new))
    code, output = house.call(main, str(file))
    assert code == 2
    assert message in output
    assert str(file) in output
    assert not (house.path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shard=2/2"], "--shard=2/2: it should be I/N with I from 0 to N - 1"),
        (["--shard=a"], "--shard=a: it should be I/N"),
        (["--jobs=0"], "--jobs must be at least 1"),
        (["--on=submitit_local", "--minutes=0"], "--minutes=0 should be above 0"),
        (["--on=slurm", "--slurm", "x"], "--slurm: x should be NAME=VALUE"),
    ],
)
def test_bad_options_are_refused(house: House, file: Path, words: list[str], message: str) -> None:
    code, output = house.call(main, str(file), *words)
    assert code == 2
    assert message in output


def test_a_stage_of_another_study_is_run_there(house: House, file: Path) -> None:
    other = house.path / "other.toml"
    other.write_text(
        """
about = "More of it."
[[stages]]
name = "small/start"
seeds = "1"
[[stages]]
name = "more"
seeds = 1
run_name = "seed{seed}"
init_from = "small/start/seed{seed}"
dataset = "digits"
epochs = 2
"""
    )
    code, output = house.call(main, str(other), "--results=")
    assert code == 0, output
    assert done(house) == {"start": ["seed1"]}
    assert house.record("other/more/seed1")["config"]["init_from"] == "runs/small/start/seed1"
    code, output = house.call(main, str(file), "--results=")
    assert code == 0
    assert "1 skipped, 10 done" in output


def trial(method: str, rate: float, seed: int, running: float, fresh: float) -> Record:
    kinds = ("blended", "quantized")
    validation = dict.fromkeys(kinds, running) | {f"{kind}_recalibrated": fresh for kind in kinds}
    if method == "float":  # its codes are no better for a better float network
        validation |= {"quantized": 1 - running, "quantized_recalibrated": 1 - fresh}
    config = {"method": method, "learning_rate": rate, "seed": seed}
    return Record(name=f"{method}_{rate}_{seed}", config=config, summary={"validation": validation})


def test_the_rule_takes_the_best_mean_and_of_equals_the_smaller_rate() -> None:
    trials = [
        *(trial("ste", 0.1, seed, 0.75, 0.5) for seed in (1, 2)),
        *(trial("ste", 0.05, seed, 0.5, 0.5) for seed in (1, 2)),
        trial("ste", 0.2, 1, 0.5, 0.25),
        trial("ste", 0.2, 2, 0.5, 0.7),
        trial("float", 0.1, 1, 0.5, 0.75),
        trial("float", 0.2, 1, 0.75, 0.5),
        trial("float", 0.4, 1, math.nan, math.nan),
    ]
    rule = Choice(stage="s/trials", flags=("learning_rate",))
    rates = {group: settings["learning_rate"] for group, settings in choose(rule, trials).items()}
    assert rates == {("ste",): 0.05, ("float",): 0.1}
    running = dataclasses.replace(rule, statistics="running")
    rates = {group: found["learning_rate"] for group, found in choose(running, trials).items()}
    assert rates == {("ste",): 0.1, ("float",): 0.2}
    with pytest.raises(StudyError, match="the trials of method=ste have different seeds"):
        choose(rule, trials[1:])


@pytest.mark.parametrize(
    ("value", "seeds"),
    [(3, (3,)), ("0..2, 7", (0, 1, 2, 7)), ([1, "4..5"], (1, 4, 5)), ("9", (9,))],
)
def test_seeds(value: Any, seeds: tuple[int, ...]) -> None:
    assert seeds_of(value, "") == seeds


@pytest.mark.parametrize("value", ["", "a", -1, "1,1", [], 1.5, True])
def test_bad_seeds(value: Any) -> None:
    with pytest.raises(StudyError, match="seed"):
        seeds_of(value, "here")


# In earnest

# A layer compiles in a moment.
NETWORK = """
import flax.linen as nn

class Network(nn.Module):
    num_classes: int
    axis_name: str | None = None
    batch_stats_momentum: float = 0.9

    @nn.compact
    def __call__(self, images, *, train, alpha=1.0):
        x = images.reshape(images.shape[0], -1)
        x = nn.relu(nn.Dense(8, name="stem")(x))
        return nn.Dense(self.num_classes, name="head")(x)
"""
TINY = """
about = "The smallest study."
[flags]
network = "one_layer:Network"
dataset = "digits"
batch_size = 256
flip = false
epochs = 1.0
warmup = 0.0
[[stages]]
name = "start"
run_name = "float"
seeds = 0
method = "float"
read_test = false
[[stages]]
name = "trials"
seeds = 0
run_name = "lr{learning_rate}"
init_from = "start/float"
method = "ste"
learning_rate = [0.01, 0.1]
read_test = false
[[stages]]
name = "final"
seeds = 0
run_name = "ste"
init_from = "start/float"
method = "ste"
learning_rate = "chosen"
choose = { from = "trials", flags = ["learning_rate"] }
"""


def test_a_small_study_of_digits_from_its_file_to_its_table(tmp_path: Path) -> None:
    (tmp_path / "one_layer.py").write_text(NETWORK)
    (tmp_path / "tiny.toml").write_text(TINY)
    words = [str(tmp_path / "tiny.toml"), "--jobs=2", "--cores_per_job=0"]
    words += [f"--{of}={tmp_path / of}" for of in ("runs_dir", "results", "compilation_cache")]
    finished = subprocess.run(
        [sys.executable, "-m", "experiments.study", *words],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": FAST_COMPILATION, "PYTHONPATH": f"{ROOT}:{tmp_path}"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "4 done" in finished.stdout
    records = {
        path.stem: json.loads(path.read_text())
        for path in (tmp_path / "results/tiny").glob("*/*.json")
    }
    assert records.keys() == {"float", "lr0.01", "lr0.1", "ste"}
    by_rate = {
        rate: records[f"lr{rate}"]["summary"]["validation"]["quantized_recalibrated"]
        for rate in ("0.01", "0.1")
    }
    best = max(by_rate, key=lambda rate: by_rate[rate])
    assert records["ste"]["config"]["learning_rate"] == float(best)
    accuracy = 100 * records["ste"]["summary"]["test"]["quantized"]
    assert f"| STE | {best} | 1 | {accuracy:.2f}" in finished.stdout
