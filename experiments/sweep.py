"""Run an experiment over the product of its flags, several processes at a time.

    python -m experiments.sweep binarynet_cifar10 --jobs=2 --keep=results/binarynet_cifar10 -- \\
        --method=float,ste,ab --seed=0..4 --learning_rate=0.01,0.02 --epochs=4 \\
        --name='study/{method}_lr{learning_rate}_seed{seed}'

The sweep's own flags stand before the lone `--`, the experiment's after it (how lists, ranges and
templates are written: `experiments/execution/combinations.py`). The same command again skips what
is done and resumes what was cut off; a run that exists with other flags, or flags that make no
sense, are an error before anything starts. Ctrl-C ends the runs and waits for them to save. A run
that another SIGTERM has stopped counts as stopped, not as failed. Exit code: 0 all done, 1 some
failed, 2 refused, 75 some stopped; after a signal 128 and its number (130 by Ctrl-C).

Where runs depend on each other, and settings are chosen by trials: `experiments.study`.
"""

import contextlib
import dataclasses
import importlib
import io
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from experiments.execution.combinations import PlanError, Run, plan
from experiments.execution.executor import copy_atomically, execute, exit_code, show
from experiments.execution.lots import Form, Together, members_of_a_lot
from experiments.execution.processes import LocalProcesses, collect_signals
from experiments.execution.progress import Display, say, say_table
from experiments.execution.tasks import Task, check
from experiments.settings.config import FlagError, recorded
from experiments.train import last_phase

#: What makes runs by flags: the trainer, what is it with defaults of its own, and the decoder.
EXPERIMENTS = (
    *("binarynet_cifar10", "decoder_text", "mobilenet_v1_imagenet", "resnet20_cifar10"),
    *("resnet50_imagenet", "train"),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The sweep's own flags; those of the experiment follow after a lone --."""

    experiment: tyro.conf.Positional[str]  # module in experiments/, e.g. binarynet_cifar10
    jobs: int = 1  # processes at a time
    cores_per_job: int = 1  # cores each process is pinned to; 0 pins nothing
    # Runs that one process trains, where they differ in seed, rates or ramps alone. auto: 8 on
    # accelerators, 1 on CPUs.
    together: Together = "auto"
    form: Form = "auto"  # how these compute their steps (experiments.together)
    runs_dir: Path = Path("runs")  # a run lives in RUNS_DIR/NAME
    keep: Path | None = None  # copy each finished record to KEEP/NAME.json
    stop_after: float = 30.0  # seconds a run is given to end after Ctrl-C before it is killed
    dry_run: bool = False  # print the runs and their commands, start nothing


def tasks_of(experiment: str, runs: Sequence[Run], runs_dir: Path) -> list[Task]:
    """The runs as tasks, with all their flags.

    Raises:
      PlanError: flags that the experiment does not have, or that do not go together.
    """
    module = importlib.import_module(f"experiments.{experiment}")
    defaults = getattr(module, "DEFAULTS", None) or module.Config()
    values: dict[tuple[str, str], dict[str, Any]] = {}  # each value is parsed once
    tasks = []
    for run in runs:
        config = defaults
        try:
            for word in run.arguments():
                if (experiment, word) not in values:
                    values[experiment, word] = _parsed(word, defaults)
                config = dataclasses.replace(config, **values[experiment, word])
            place = {"runs_dir": type(config.runs_dir)(runs_dir)}
            config = dataclasses.replace(config, **place)
            is_ours = experiment != "decoder_text"
            flags = recorded(last_phase(config)) if is_ours else dataclasses.asdict(config)
        except (FlagError, ValueError) as error:
            raise PlanError(f"{run.name}: {error}") from None
        command = (sys.executable, "-m", f"experiments.{experiment}", *run.arguments())
        tasks.append(
            Task(
                name=run.name,
                directory=runs_dir / run.name,
                command=(*command, f"--runs_dir={runs_dir}"),
                flags=flags,
            )
        )
    return tasks


def _parsed(word: str, defaults: Any) -> dict[str, Any]:
    """The field that an argument sets, as the experiment's own command line reads it."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            config = tyro.cli(type(defaults), default=defaults, args=[word], use_underscores=True)
    except SystemExit:
        lines = [line.strip("│ ") for line in said.getvalue().splitlines()]
        told = next((line for line in lines if word.partition("=")[0] in line), "it is refused")
        raise ValueError(f"{word}: {told}") from None
    known = {field.name for field in dataclasses.fields(config)}
    flag = word.partition("=")[0].removeprefix("--")
    name = flag if flag in known else flag.removeprefix("no_")
    return {name: getattr(config, name)}


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    words = list(argv)
    cut = words.index("--") if "--" in words else len(words)
    config = tyro.cli(
        Config,
        prog="python -m experiments.sweep",
        args=words[:cut],
        use_underscores=True,
        description=__doc__,
    )
    console = Console()
    try:
        if config.experiment not in EXPERIMENTS:
            names = ", ".join(EXPERIMENTS)
            raise PlanError(f"there is no experiment {config.experiment!r}; there are: {names}")
        runs = plan(config.experiment, words[cut + 1 :])
        tasks = tasks_of(config.experiment, runs, config.runs_dir)
        engine = LocalProcesses(config.jobs, config.cores_per_job, config.stop_after)
        members = members_of_a_lot(config.together)
        check(tasks)
    except (PlanError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if config.dry_run:
        rows = [(task.name, task.state, shlex.join(task.command)) for task in tasks]
        say_table(console, [("run", "state", "command"), *rows])
        return 0

    def keep(task: Task) -> None:
        if config.keep is not None:
            copy_atomically(task.record, config.keep / f"{task.name}.json")

    work = [task.work for task in tasks]
    try:
        with (
            collect_signals() as received,
            Display(console, work, config.jobs * members) as display,
        ):
            outcomes = execute(
                tasks,
                engine,
                display,
                received,
                keep,
                together=members,
                jobs=config.jobs,
                form=config.form,
            )
    except OSError as error:  # such as a full disk; the runs that went on were asked to stop
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(console, outcomes)
    if received:
        say(console, "stopped; the same command goes on where this one ended")
    return exit_code(outcomes, received)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
