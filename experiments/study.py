"""Run a whole study from its file: float starts, trials, what they choose, final runs, the table.

    python -m experiments.study studies/digits.toml --jobs=2

What such a file says: `experiments/study_design/study_file.py`. All its flags are checked before
anything starts. The stages are run in order, several runs at a time; the same command again skips
what is done and resumes what was cut off. Finished records are copied to
RESULTS/STUDY/STAGE/RUN.json; one of another run that is there already stays.

    --dry_run            shows the runs and their commands, and what was added later
    --on=slurm           a job of Slurm for each run, queued again when its time is up
    --shard=0/16         a sixteenth of each stage, for array jobs; the next is 1/16

Exit code: 0 all done, 1 some failed, 2 refused, 75 some stopped or waiting for other shards' runs;
after a signal 128 and its number (130 by Ctrl-C).
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from experiments.execution.cluster import ClusterJobs, make_executor
from experiments.execution.combinations import PlanError
from experiments.execution.executor import (
    Engine,
    Outcome,
    copy_atomically,
    execute,
    exit_code,
    show,
)
from experiments.execution.lots import Form, Together, members_of_a_lot
from experiments.execution.processes import LocalProcesses, collect_signals
from experiments.execution.progress import Display, say, say_table
from experiments.execution.tasks import Task, check
from experiments.reporting.run_records import ReportError, read_records
from experiments.reporting.study_tables import study_tables
from experiments.study_design.choosing import choose
from experiments.study_design.design import Choice, Stage, Study, StudyError
from experiments.study_design.expansion import (
    Expanded,
    Settings,
    StudyRun,
    command_text,
    expand,
)
from experiments.study_design.study_file import read_study, seeds_of


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which study, and where it runs."""

    file: tyro.conf.Positional[Path]  # such as studies/digits.toml
    jobs: int = 1  # runs at a time; of Slurm, jobs in the queue
    cores_per_job: int = 1  # cores each process is pinned to; 0 pins nothing
    # Runs that one process trains, where they differ in seed, rates or ramps alone. auto: 8 on
    # accelerators of this machine, else 1.
    together: Together = "auto"
    form: Form = "auto"  # how these compute their steps (experiments.together)
    runs_dir: Path = Path("runs")  # a run lives in RUNS_DIR/STUDY/STAGE/RUN
    results: str = "results"  # finished records are copied below it; empty: nowhere
    data_dir: str | None = None  # where prepared data lie; None: $TFDS_DATA_DIR or TFDS's default
    compilation_cache: str | None = None  # where compiled steps are kept; None: the trainer's own
    stage: str | None = None  # run this stage alone
    shard: str | None = None  # I/N: of each stage the runs I, I + N, I + 2 N, ..., from 0
    seeds: str | None = None  # such as 0..4,7: the runs of these seeds, and those they need
    stop_after: float = 30.0  # seconds runs are given to save after Ctrl-C
    dry_run: bool = False  # print the runs and their commands, start nothing
    # This machine, Slurm, or this machine by the engine that submits to Slurm.
    on: Literal["local", "slurm", "submitit_local"] = "local"
    minutes: float = 60.0  # of a job; it is queued again until its run is complete
    partition: str | None = None  # of Slurm
    cpus: int = 2  # of a job
    gpus: int = 0  # of a job
    slurm: tuple[str, ...] = ()  # more of sbatch, as account=mine constraint=a100


@dataclass
class Conduct:
    """A study under way: what is chosen so far, and how its runs ended."""

    config: Config
    study: Study
    console: Console
    chosen: dict[Choice, Settings] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    kept_apart: int = 0

    def expanded(self) -> Expanded:
        """All runs, with the settings that are chosen so far."""
        c = self.config
        places = {"runs_dir": str(c.runs_dir)}
        places |= {} if c.data_dir is None else {"data_dir": c.data_dir}
        if c.compilation_cache is not None:
            places["compilation_cache"] = c.compilation_cache
        return expand(self.study, places, self.chosen)

    def share(self, runs: Sequence[StudyRun]) -> list[StudyRun]:
        """Those of a stage's runs that this process is for."""
        index, of = parse_shard(self.config.shard)
        names = self.names_of_seeds()
        return [run for run in runs if names is None or run.name in names][index::of]

    def names_of_seeds(self) -> set[str] | None:
        """The runs of the seeds that are asked for, and those they need; None: all.

        Raises:
          StudyError: the study has no such seed.
        """
        if self.config.seeds is None:
            return None
        asked = set(seeds_of(self.config.seeds, "--seeds"))
        stages = self.expanded()
        runs = [run for of_stage in stages.values() for run in of_stage]
        if none := sorted(asked - {run.config.seed for run in runs}):
            raise StudyError(f"--seeds={self.config.seeds}: {self.study.path} has no {none[0]}")
        names = {run.name for run in runs if run.config.seed in asked}
        for choice in (choice for stage in self.study.stages for choice in stage.choices):
            names |= {run.name for run in stages[choice.stage]}
        # Backwards, since a start may have started from another run.
        for run in reversed(runs):
            if run.name in names and run.start is not None:
                names.add(run.start)
        return names

    def record(self, name: str) -> Path:
        return self.config.runs_dir / name / "record.json"

    def is_done(self, run: StudyRun) -> bool:
        return not run.waits_for and self.record(run.name).exists()

    def stages(self) -> list[Stage]:
        """Those to be run."""
        asked = self.config.stage
        if asked is None:
            return list(self.study.stages)
        name = asked if "/" in asked else f"{self.study.name}/{asked}"
        if (found := self.study.stage(name)) is None:
            names = ", ".join(stage.name for stage in self.study.stages)
            raise StudyError(f"--stage={asked}: {self.study.path} has {names}")
        return [found]

    def settle(self, stage: Stage) -> str:
        """Choose a stage's settings; returns why that cannot be done yet, or an empty text."""
        for choice in stage.choices:
            if choice in self.chosen:
                continue
            trials = self.expanded()[choice.stage]
            if missing := [run for run in trials if not self.is_done(run)]:
                return f"{len(missing)} of {len(trials)} runs of {choice.stage} are not done"
            if others := [run.name for run in trials if run.task().differences()]:
                raise StudyError(f"{others[0]} was run with other flags than {self.study.path} has")
            try:
                records = read_records(self.record(run.name) for run in trials)
            except ReportError as error:
                raise StudyError(str(error)) from None
            self.chosen[choice] = choose(choice, records)
            for group, settings in self.chosen[choice].items():
                of = " ".join(map(str, group))
                told = ", ".join(f"{flag}={value}" for flag, value in settings.items())
                say(self.console, f"{choice.stage} chose {told} for {of}")
        return ""

    def run_stage(self, stage: Stage, engine: Engine, display: Display, signals: list[int]) -> None:
        """Run what can be run of a stage, and say what has to wait."""
        name = stage.name
        if reason := self.settle(stage):
            say(self.console, f"{name} waits: {reason}")
            return
        mine = self.share(self.expanded()[name])
        ready = [run for run in mine if run.start is None or self.record(run.start).exists()]
        if len(ready) < len(mine):
            starts = {run.start for run in mine if run not in ready}
            number = f"{len(mine) - len(ready)} of {len(mine)} runs"
            say(self.console, f"{name}: {number} wait for {', '.join(sorted(map(str, starts)))}")
        tasks = [run.task() for run in ready]
        check(tasks)
        together = together_at_most(self.config)
        how: dict[str, Any] = {"together": together, "jobs": self.config.jobs}
        how["form"] = self.config.form
        self.outcomes += execute(tasks, engine, display, signals, self.keep, **how)

    def keep(self, task: Task) -> None:
        """Copy a record to the results, unless another run's is there."""
        if not self.config.results:
            return
        target = Path(self.config.results) / f"{task.name}.json"
        if not target.exists():
            copy_atomically(task.record, target)
        elif target.read_bytes() != task.record.read_bytes():
            self.kept_apart += 1

    def missing(self) -> int:
        """How many runs of the whole study are not done."""
        return sum(not self.is_done(run) for runs in self.expanded().values() for run in runs)

    def table(self) -> str:
        """The table of the records, as Markdown."""
        expanded = self.expanded()
        starts = {run.start for runs in expanded.values() for run in runs}
        own = [
            stage.name
            for stage in self.study.stages
            if stage.is_own and not any(run.name in starts for run in expanded[stage.name])
        ]
        names = [run.name for stage in self.study.table_stages or own for run in expanded[stage]]
        records = read_records(map(self.record, names))
        return replace(study_tables(records, self.study.table), commands="").to_markdown()


def parse_shard(text: str | None) -> tuple[int, int]:
    """(0, 16) of `0/16`; all of it is (0, 1).

    Raises:
      StudyError: it is no such share.
    """
    if text is None:
        return 0, 1
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise StudyError(f"--shard={text}: it should be I/N with I from 0 to N - 1")
    return int(found[1]), int(found[2])


def together_at_most(config: Config) -> int:
    """How many runs a process makes.

    Raises:
      PlanError: a number that makes no sense, or of a cluster's jobs, which are a run each.
    """
    if config.on == "local":
        try:
            return members_of_a_lot(config.together)
        except ValueError as error:
            raise PlanError(str(error)) from None
    if config.together not in ("auto", 1):
        raise PlanError(f"--together={config.together}: --on={config.on} makes a run a job")
    return 1


def make_engine(config: Config) -> Engine:
    """Where the runs go.

    Raises:
      PlanError: that cannot be had here.
    """
    c = config
    if c.on == "local":
        return LocalProcesses(c.jobs, c.cores_per_job, c.stop_after)
    if c.jobs < 1 or not c.minutes > 0:
        raise PlanError(f"--jobs={c.jobs} and --minutes={c.minutes:g} should be above 0")
    if wrong := [word for word in c.slurm if "=" not in word]:
        raise PlanError(f"--slurm: {wrong[0]} should be NAME=VALUE, as sbatch has it")
    parameters = {"job_name": c.file.stem, "cpus_per_task": c.cpus}
    parameters |= {"partition": c.partition} if c.partition else {}
    parameters |= {"gpus_per_node": c.gpus} if c.gpus else {}
    parameters |= dict(word.split("=", 1) for word in c.slurm)
    cluster = "slurm" if c.on == "slurm" else "local"
    folder = (c.runs_dir / c.file.stem / "jobs").absolute()
    executor = make_executor(cluster, folder, minutes=c.minutes, parameters=parameters)
    return ClusterJobs(executor, c.jobs, c.stop_after)


def show_plan(conduct: Conduct) -> None:
    """Print every run with its state and command, and what the file says was added later."""
    for stage in conduct.stages():
        conduct.settle(stage)
        say(conduct.console, f"\n{stage.name}")
        for note in dict.fromkeys(part.later for part in stage.parts if part.later):
            say(conduct.console, f"  later: {note}")
        rows = []
        for run in conduct.share(conduct.expanded()[stage.name]):
            state = "waits" if run.waits_for else run.task().state
            rows.append((run.name, state, command_text(run)))
        say_table(conduct.console, [("run", "state", "command"), *rows])


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    config = tyro.cli(
        Config,
        prog="python -m experiments.study",
        args=list(argv),
        use_underscores=True,
        description=__doc__,
    )
    console = Console()
    try:
        return _run(Conduct(config, read_study(config.file), console))
    except (StudyError, PlanError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(conduct: Conduct) -> int:
    config, console = conduct.config, conduct.console
    stages = conduct.stages()
    parse_shard(config.shard)
    everything = conduct.expanded()
    if config.dry_run:
        show_plan(conduct)
        return 0
    engine = make_engine(config)
    at_a_time = config.jobs * together_at_most(config)
    runs = [run for stage in stages for run in conduct.share(everything[stage.name])]
    check(run.task() for run in runs if not run.waits_for)
    say(console, f"{conduct.study.name}: {len(stages)} stages, {len(runs)} runs")
    work = [run.config.epochs for run in runs]
    with collect_signals() as received, Display(console, work, at_a_time) as display:
        for stage in stages:
            if not received:
                conduct.run_stage(stage, engine, display, received)
    show(console, conduct.outcomes)
    if conduct.kept_apart:
        told = f"{conduct.kept_apart} records were not copied to {config.results}: others are there"
        say(console, told)
    if received:
        say(console, "stopped; the same command goes on where this one ended")
    code = exit_code(conduct.outcomes, received)
    if code:
        return code
    if missing := conduct.missing():
        own = len(conduct.outcomes) == len(runs)
        say(console, f"{missing} runs of the study are not done yet")
        return 0 if own else 75
    try:
        say(console, f"\n{conduct.table()}")
    except ReportError as error:
        print(f"error: the table cannot be made: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
