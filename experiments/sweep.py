"""Run an experiment over the product of its flags, several processes at a time.

    python -m experiments.sweep binarynet_cifar10 --jobs=2 --keep=results/binarynet_cifar10 -- \\
        --method=float,ste,ab --seed=0..4 --learning_rate=0.01,0.02 --epochs=4 \\
        --name='study/{method}_lr{learning_rate}_seed{seed}'

The sweep's own flags stand before the lone `--`, the experiment's after it (how lists, ranges and
templates are written: `experiments/sweeping/plan.py`). The same command again skips what is done
and resumes what was cut off; a run that exists with other flags is an error before anything starts.
Ctrl-C ends the runs and waits for them to save. A run that another SIGTERM has stopped counts as
stopped, not as failed. Exit code: 0 all done, 1 some failed, 2 refused, 75 some stopped.
"""

import json
import os
import pkgutil
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from experiments.sweeping.plan import PlanError, Run, differing_flags, plan
from experiments.sweeping.processes import (
    collect_signals,
    core_groups,
    end_processes,
    is_being_written,
    start_process,
)

# Beside the experiments, and not to be swept: they make no runs.
TOOLS = {
    *("bench_data", "bench_deploy", "bench_step", "classify", "compare_exports", "export", "plan"),
    *("report", "sharded_blend", "sweep"),
}
POLL_SECONDS = 0.1
EXIT_STOPPED = os.EX_TEMPFAIL  # 75: a run was asked to stop, and has saved its state


@dataclass(frozen=True, kw_only=True)
class Config:
    """The sweep's own flags; those of the experiment follow after a lone --."""

    experiment: tyro.conf.Positional[str]  # module in experiments/, e.g. binarynet_cifar10
    jobs: int = 1  # processes at a time
    cores_per_job: int = 1  # cores each process is pinned to; 0 pins nothing
    runs_dir: Path = Path("runs")  # a run lives in RUNS_DIR/NAME
    keep: Path | None = None  # copy each finished record to KEEP/NAME.json
    stop_after: float = 30.0  # seconds a run is given to end after Ctrl-C before it is killed
    dry_run: bool = False  # print the runs and their commands, start nothing


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `status` is done, skipped, failed, stopped or not started."""

    run: Run
    status: str
    reason: str = ""


@dataclass(frozen=True)
class Job:
    """A run's process, the cores it holds and its row in the progress display."""

    run: Run
    process: subprocess.Popen[bytes]
    cores: tuple[int, ...]
    row: TaskID
    started: float


@dataclass(frozen=True)
class Sweep:
    """The runs of one sweep, where they live and where their progress is shown."""

    config: Config
    runs: Sequence[Run]
    console: Console

    @property
    def module(self) -> str:
        return f"experiments.{self.config.experiment}"

    def directory(self, run: Run) -> Path:
        return self.config.runs_dir / run.name

    def command(self, run: Run) -> list[str]:
        place = f"--runs_dir={self.config.runs_dir}"
        return [sys.executable, "-m", self.module, *run.arguments(), place]

    def state(self, run: Run) -> str:
        """`done`, `cut off` (a directory without record.json) or `new`."""
        if (self.directory(run) / "record.json").exists():
            return "done"
        return "cut off" if self.directory(run).exists() else "new"

    def check(self) -> None:
        """Raise PlanError, naming every culprit, if a run's directory is in the way."""
        problems = []
        for run in self.runs:
            directory = self.directory(run)
            if lines := self.differences(run):
                problems.append(
                    f"{directory} exists with other flags:\n"
                    + "".join(f"    {line}\n" for line in lines)
                    + f"  give another --name, or remove {directory}"
                )
            elif is_being_written(directory / "log.txt"):
                problems.append(f"{directory} is still being written: wait, or end its process")
        if problems:
            raise PlanError("\n".join(problems))

    def differences(self, run: Run) -> list[str]:
        """The flags in which what is stored of this run differs from what is asked."""
        directory = self.directory(run)
        if (record := directory / "record.json").exists():
            return differing_flags(run, self.module, _read_json(record))
        if run.flags.get("allow_changed", "").lower() == "true":
            return []
        # Without a line of metrics there is nothing to resume, and a run may begin anew.
        if (config := directory / "config.json").exists() and (
            directory / "metrics.jsonl"
        ).exists():
            return differing_flags(run, self.module, _read_json(config))
        return []

    def execute(self, stop_signals: Sequence[int]) -> list[Outcome]:
        """Run all; ends its processes and returns early once `stop_signals` is not empty."""
        outcomes: list[Outcome] = []

        def end(outcome: Outcome) -> None:
            outcomes.append(outcome)
            self._report(outcome, len(outcomes))

        pending = [run for run in self.runs if self.state(run) != "done"]
        for run in self.runs:
            if run not in pending:
                end(Outcome(run, "skipped", "done before"))
        free = core_groups(self.config.jobs, self.config.cores_per_job)
        jobs: list[Job] = []
        with _progress(self.console) as progress:
            total = progress.add_task("runs", total=len(self.runs), count="")
            try:
                while (pending or jobs) and not stop_signals:
                    while pending and free:
                        run = pending.pop(0)
                        try:
                            jobs.append(self._start(run, free[0], progress))
                            free.pop(0)
                        except BlockingIOError:
                            end(Outcome(run, "failed", "another process is writing its log"))
                    time.sleep(POLL_SECONDS)
                    for job in [job for job in jobs if job.process.poll() is not None]:
                        jobs.remove(job)
                        free.append(job.cores)
                        progress.remove_task(job.row)
                        end(self._judge(job))
                    count = f"{len(outcomes)}/{len(self.runs)}"
                    progress.update(total, completed=len(outcomes), count=count)
            finally:
                end_processes([job.process for job in jobs], self.config.stop_after)
                for job in jobs:
                    outcome = self._judge(job)
                    end(outcome if outcome.status == "done" else Outcome(job.run, "stopped"))
        return outcomes + [Outcome(run, "not started") for run in pending]

    def _start(self, run: Run, cores: tuple[int, ...], progress: Progress) -> Job:
        process = start_process(self.command(run), self.directory(run) / "log.txt", cores)
        if not self.console.is_terminal:
            _say(self.console, f"started {run.name}")
        row = progress.add_task(f"  {run.name}", total=None, count="")
        return Job(run, process, cores, row, time.monotonic())

    def _judge(self, job: Job) -> Outcome:
        code = job.process.returncode
        if code == EXIT_STOPPED:
            return Outcome(job.run, "stopped", "the same command resumes it")
        if code != 0:
            reason = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
            return Outcome(job.run, "failed", reason)
        if self.state(job.run) != "done":
            return Outcome(job.run, "failed", "ended without record.json")
        if lines := self.differences(job.run):
            return Outcome(job.run, "failed", f"record.json disagrees: {'; '.join(lines)}")
        return Outcome(job.run, "done", f"{time.monotonic() - job.started:.0f} s")

    def _report(self, outcome: Outcome, count: int) -> None:
        if self.config.keep is not None and outcome.status in ("done", "skipped"):
            kept = self.config.keep / f"{outcome.run.name}.json"
            copy_atomically(self.directory(outcome.run) / "record.json", kept)
        reason = f" ({outcome.reason})" if outcome.reason else ""
        text = f"[{count}/{len(self.runs)}] {outcome.status} {outcome.run.name}{reason}"
        _say(self.console, text)

    def show(self, outcomes: Sequence[Outcome]) -> None:
        """Print how many runs ended how, and for each failed one its reason and its log."""
        counts = Counter(outcome.status for outcome in outcomes)
        _say(self.console, ", ".join(f"{n} {status}" for status, n in counts.items()))
        failed = [outcome for outcome in outcomes if outcome.status == "failed"]
        rows = [(o.run.name, o.reason, str(self.directory(o.run) / "log.txt")) for o in failed]
        if rows:
            _say_table(self.console, [("failed", "reason", "log"), *rows])


def copy_atomically(source: Path, target: Path) -> None:
    """Copy a file so that `target` is at any time absent, the old file, or the whole new one."""
    from ab_jax.files import write_whole, writing  # here, since JAX comes with it

    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, source.read_bytes())


def experiment_names() -> list[str]:
    """The modules beside this one that a sweep can run."""
    modules = pkgutil.iter_modules([str(Path(__file__).parent)])
    return sorted({module.name for module in modules if not module.ispkg} - TOOLS)


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    words = list(argv)
    cut = words.index("--") if "--" in words else len(words)
    config = tyro.cli(Config, args=words[:cut], use_underscores=True, description=__doc__)
    console = Console()
    try:
        if config.experiment not in experiment_names():
            names = ", ".join(experiment_names())
            raise PlanError(f"there is no experiment {config.experiment!r}; there are: {names}")
        sweep = Sweep(config, plan(config.experiment, words[cut + 1 :]), console)
        core_groups(config.jobs, config.cores_per_job)
        sweep.check()
    except PlanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if config.dry_run:
        rows = [(run.name, sweep.state(run), shlex.join(sweep.command(run))) for run in sweep.runs]
        _say_table(console, [("run", "state", "command"), *rows])
        return 0
    try:
        with collect_signals() as received:
            outcomes = sweep.execute(received)
    except OSError as error:  # such as a full disk; the runs that went on were asked to stop
        print(f"error: {error}", file=sys.stderr)
        return 1
    sweep.show(outcomes)
    if received:
        _say(console, "stopped; the same command goes on where this one ended")
        return 128 + received[0]
    statuses = {outcome.status for outcome in outcomes}
    return 1 if "failed" in statuses else EXIT_STOPPED if "stopped" in statuses else 0


def _progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,  # a plain log gets one line for each start and end
    )


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _say_table(console: Console, rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        _say(console, "  ".join(cells).rstrip())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():  # a pipe would be waited for
            raise ValueError("it is no file")
        stored = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(stored, dict) or not isinstance(stored.get("config", {}), dict):
            raise ValueError("it holds no flags")
    except (ValueError, OSError, RecursionError) as error:
        raise PlanError(f"{path} is damaged ({error}): remove it, or its directory") from None
    return stored


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
