"""Trains a study seed by seed on a machine whose networks are lost in the end: records come back.

    python gpu/whole_seeds.py studies/binarynet_full_size.toml --minutes=8 --out=DIRECTORY

Methods that share a start are compared within a seed, so that only whole seeds are of use, from the
float start to all methods. Several seeds train together. What lies under `results/STUDY` is done,
whatever machine made it. Into the directory go `STUDY.tar.gz`, which holds the records and the
study's file, and `STUDY.logs.tar.gz`.

Exit code: 0 all seeds are there; 2 refused; 75 some have to wait for the next time.
"""

import contextlib
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from experiments import study
from experiments.study_design.design import StudyError
from experiments.study_design.expansion import StudyRun
from experiments.study_design.study_file import read_study, seeds_of

RUNS, RESULTS = Path("runs"), Path("results")
_TO_SAVE = 20.0  # seconds left for packing


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which study, and how long."""

    file: tyro.conf.Positional[Path]  # such as studies/binarynet_full_size.toml
    out: Path  # what comes back
    minutes: float = 8.0  # from the start of this command
    seeds: str = "0..9"  # such as 0..4,7
    together: int = 5  # seeds at a time
    form: Literal["auto", "vmap", "unrolled", "in_turn"] = "auto"  # as of experiments.study


class Seeds:
    """The runs of a study by seed, and which of them are whole."""

    def __init__(self, file: Path) -> None:
        self.study = read_study(file)
        stages = study.Conduct(study.Config(file=file), self.study, Console(quiet=True)).expanded()
        self._runs = [run for runs in stages.values() for run in runs]
        chosen_from = {choice.stage for stage in self.study.stages for choice in stage.choices}
        self.trials = [run for stage in chosen_from for run in stages[stage]]

    def of(self, seed: int) -> list[StudyRun]:
        """All runs of a seed."""
        return [run for run in self._runs if run.config.seed == seed]

    def is_whole(self, seed: int) -> bool:
        """Whether each of its runs has ended."""
        return all(map(_has_ended, self.of(seed)))

    def worth_keeping(self, seeds: Iterable[int]) -> list[StudyRun]:
        """Those of the runs that have ended that a later machine can use."""
        kept = [run for run in self.trials if _has_ended(run)]
        for seed in seeds:
            of_seed = self.of(seed)
            share_a_start = any(run.start for run in of_seed)
            if self.is_whole(seed) or not share_a_start:
                kept += filter(_has_ended, of_seed)
        if all(map(_has_ended, self.trials)):
            # No trial needs the networks of their starts any more.
            starts = {run.start for run in self.trials}
            kept += [run for run in self._runs if run.name in starts and _has_ended(run)]
        return list({run.name: run for run in kept}.values())

    def take_over(self) -> None:
        """Let runs that were recorded elsewhere count as done."""
        for run in self._runs:
            record, there = RESULTS / f"{run.name}.json", RUNS / run.name
            if record.exists() and not there.exists():
                there.mkdir(parents=True)
                shutil.copyfile(record, there / "record.json")

    def pack(self, seeds: Iterable[int], out: Path) -> int:
        """Copy the records worth keeping to the results, and all results into `out`."""
        for run in self.worth_keeping(seeds):
            target = RESULTS / f"{run.name}.json"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(RUNS / run.name / "record.json", target)
        name, results = self.study.name, RESULTS / self.study.name
        results.mkdir(parents=True, exist_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        with tarfile.open(out / f"{name}.tar.gz", "w:gz") as archive:
            archive.add(self.study.path)
            archive.add(results)
        with tarfile.open(out / f"{name}.logs.tar.gz", "w:gz") as archive:
            for log in (RUNS / name).rglob("log.txt"):
                archive.add(log)
        return len(list(results.rglob("*.json")))


def _has_ended(run: StudyRun) -> bool:
    return (RUNS / run.name / "record.json").exists()


def main(config: Config) -> int:
    """Train; returns the exit code."""
    c, end = config, time.monotonic() + 60 * config.minutes
    try:
        seeds, of = seeds_of(c.seeds, "--seeds"), Seeds(c.file)
        if none := [seed for seed in seeds if not of.of(seed)]:
            raise StudyError(f"--seeds={c.seeds}: {c.file} has no seed {none[0]}")
    except (StudyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))  # ends the study too, see below
    of.take_over()
    needed = _TO_SAVE  # seconds, as the last seeds took, and what packing takes
    while left := [seed for seed in seeds if not of.is_whole(seed)][: c.together]:
        begun, tried = time.monotonic(), sum(map(_has_ended, of.trials))
        named = ",".join(map(str, left))
        if end - begun <= needed:
            print(f"seeds {named} have to wait: {end - begun:.0f} s are left", flush=True)
            return _packed(of, seeds, c.out, 75)
        command = [sys.executable, "-m", "experiments.study", str(c.file), f"--seeds={named}"]
        command += [f"--together={max(c.together, 2)}", f"--form={c.form}", "--cores_per_job=0"]
        process = subprocess.Popen([*command, "--stop_after=10", "--results="])
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(end - begun - _TO_SAVE)
        finally:
            process.terminate()  # it then gives its runs ten seconds
            process.wait()
        if missing := [seed for seed in left if not of.is_whole(seed)]:
            print(f"not whole: {', '.join(f'seed {seed}' for seed in missing)}", flush=True)
            return _packed(of, seeds, c.out, 75)
        if sum(map(_has_ended, of.trials)) == tried:
            needed = time.monotonic() - begun + _TO_SAVE
        _packed(of, seeds, c.out, 0)  # in case that somebody else ends it all
    return _packed(of, seeds, c.out, 0)


def _packed(of: Seeds, seeds: Iterable[int], out: Path, code: int) -> int:
    print(f"{of.pack(seeds, out)} records in {out}", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(
        main(tyro.cli(Config, prog="gpu/whole_seeds.py", description=__doc__, use_underscores=True))
    )
