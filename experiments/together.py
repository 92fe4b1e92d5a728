"""Train several runs in one program: they differ in seed, rates, decay, ramps, start and name.

    python -m experiments.together -- --name=a --seed=0 -- --name=b --seed=1

Behind each lone `--` stand the flags of one run, as `experiments.train` has them. Each is what it
would be alone, in a directory of its own, but for rounding; its record says with how many others it
trained. One that fails leaves the others behind. `experiments.study` and `experiments.sweep` train
runs together by themselves where that is faster: on accelerators.

Exit code: 0 all done, 1 some failed, 75 some stopped by SIGTERM or SIGINT, to be resumed.
"""

import contextlib
import dataclasses
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from ab_jax.training.distributed import all_devices
from ab_jax.training.existing_run import differences, stored_run
from ab_jax.training.finite import NonFiniteLossError
from ab_jax.training.members import Member, run_together
from ab_jax.training.parallel import Parallel
from ab_jax.training.stopping import EXIT_CODE, StoppedError
from experiments import train
from experiments.execution.lots import OF_MEMBERS, Form
from experiments.settings.build import Images, settled
from experiments.settings.command_line import end_with_a_line
from experiments.settings.config import FREE_FLAGS, PLACES, FlagError, recorded
from experiments.settings.datasets import load_dataset


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How runs train together; their own flags follow, each behind a lone --."""

    # One program for all of them, by vmap or written out; or the calls in turn. auto: the fastest,
    # which is measured before the first step.
    form: Form = "auto"
    experiment: str = "train"  # the module in experiments/ that the records name


def run(config: Config, members: Sequence[train.Config]) -> list[dict[str, Any] | BaseException]:
    """Train; returns the record of each run, or what ended it.

    Raises:
      FlagError: flags that make no sense, or differ where runs that train together cannot.
        ValueError, FileNotFoundError: as the data.
    """
    settled_members = [settled(member) for member in members]
    check(settled_members)
    first = settled_members[0]
    dataset = load_dataset(first)
    parallel = Parallel(first.parallel, all_devices(), norm_group=first.norm_group)
    experiment = f"experiments.{config.experiment}"
    jobs = [_job(member, dataset, experiment) for member in settled_members]
    return run_together(jobs, parallel, form=None if config.form == "auto" else config.form)


def check(members: Sequence[train.Config]) -> None:
    """Whether these runs can train together.

    Raises:
      FlagError: names the flag in which they differ, or that trains alone.
    """
    if not members:
        raise FlagError("There are no runs: give the flags of each behind a lone --.")
    first, *others = members
    names = [Path(member.runs_dir) / member.name for member in members]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise FlagError(f"--name: two runs are {twice}. Give each a name of its own.")
    for field in dataclasses.fields(first):
        name, value = field.name, getattr(first, field.name)
        if name in PLACES and value is not None and value is not False:
            raise FlagError(f"--{name} is for one run that several processes train.")
        differing = [o for o in others if getattr(o, name) != value]
        if name == "teacher":
            differing = [o for o in others if (o.teacher is None) != (value is None)]
        if differing and (name not in OF_MEMBERS or name == "teacher"):
            raise FlagError(
                f"--{name} is {value} in {first.name} and {getattr(differing[0], name)} in "
                f"{differing[0].name}: such runs are other programs. Train them one by one."
            )
    if first.float_epochs:
        raise FlagError(
            "--float_epochs trains two phases, one after the other. Train the float networks "
            "first, and give them as --init_from."
        )
    if first.profile:
        raise FlagError("--profile is for one run. Omit it.")


def _job(
    config: train.Config, dataset: Images, experiment: str
) -> Callable[[Member], dict[str, Any]]:
    return lambda member: train.train_phase(config, dataset, experiment, parallel=member)


def tell(members: Sequence[train.Config], ends: Sequence[Any]) -> int:
    """Say how each run ended, here and in its log; returns the exit code."""
    codes = set()
    for member, end in zip(members, ends, strict=True):
        path = Path(member.runs_dir) / member.name
        if isinstance(end, dict):
            told, code = train.summary_of(end, path), 0
        elif isinstance(end, StoppedError):
            told, code = str(end), EXIT_CODE
        elif isinstance(end, FileExistsError) and _is_that_run(path, member):
            told, code = f"{path} is complete already", 0
        elif isinstance(end, FlagError | ValueError | OSError | NonFiniteLossError):
            told, code = f"error: {end}", 1
        else:
            told, code = "".join(traceback.format_exception(end)).rstrip(), 1
        codes.add(code)
        print(told if code == 0 else f"{member.name}: {told}", file=sys.stderr if code else None)
        with contextlib.suppress(OSError):  # of a full disk, say: the others are told of too
            if path.is_dir() and not _is_standard_output(path / "log.txt"):
                with (path / "log.txt").open("a", encoding="utf-8") as log:
                    log.write(f"{told}\n")
    return 1 if 1 in codes else max(codes)


def _is_that_run(path: Path, member: train.Config) -> bool:
    """Whether a complete run has these flags."""
    stored = stored_run(path)
    flags = recorded(train.last_phase(member))
    return stored is not None and not differences(stored["config"], flags, FREE_FLAGS | PLACES, {})


def _is_standard_output(log: Path) -> bool:
    """Whether what this process prints goes there: the log of the first run of a lot."""
    return log.exists() and os.path.samestat(log.stat(), os.fstat(1))


def split(words: Sequence[str]) -> list[list[str]]:
    """The words before, between and behind lone `--`."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word == "--":
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    own, *flags = split(argv)
    prog = "python -m experiments.together"
    config = tyro.cli(Config, prog=prog, args=own, use_underscores=True, description=__doc__)
    codes = []

    def command() -> None:
        members = [
            tyro.cli(train.Config, prog=prog, args=words, use_underscores=True) for words in flags
        ]
        try:
            codes.append(tell(members, run(config, members)))
        except KeyboardInterrupt:  # a second one: threads still compute, and would be in the way
            sys.stdout.flush()
            os._exit(128 + signal.SIGINT)

    end_with_a_line(command)
    return codes[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
