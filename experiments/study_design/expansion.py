"""From a study's stages to runs, each with all its flags.

Pure functions: what trials chose is an argument.
"""

import itertools
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from experiments.execution.tasks import Task
from experiments.settings.build import settled
from experiments.settings.config import Config, FlagError, recorded
from experiments.study_design.design import CHOSEN, Choice, Part, Stage, Study, StudyError

#: What a choice's `flags` are, by the values of its `per` flags.
Settings = Mapping[tuple[Any, ...], Mapping[str, Any]]
_UNKNOWN = "?"  # in a run's name, for what is not chosen yet
_DEFAULTS = Config()


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """A run of a study.

    Attributes:
      name: `STUDY/STAGE/RUN`.
      config: all its flags.
      start: name of the run that it starts from.
      waits_for: the flags that are not chosen yet; `config` then has some value that was tried.
    """

    name: str
    config: Config
    start: str | None = None
    waits_for: tuple[str, ...] = ()

    def task(self) -> Task:
        """The process that makes it.

        Raises:
          ValueError: its settings are not chosen yet.
        """
        if self.waits_for:
            raise ValueError(f"{self.name}: {', '.join(self.waits_for)} is not chosen yet")
        flags = settled(self.config)
        return Task(
            name=self.name,
            directory=Path(self.config.runs_dir) / self.name,
            command=(sys.executable, "-m", "experiments.train", *arguments(self.config)),
            flags=recorded(flags),
        )


Expanded = dict[str, list[StudyRun]]


def expand(
    study: Study, places: Mapping[str, str], chosen: Mapping[Choice, Settings] | None = None
) -> Expanded:
    """The runs of each stage, by its full name, in order.

    Args:
      places: flags of this machine, `runs_dir` among them; no file has that one.
      chosen: what trials chose; runs whose choice is not in it wait.

    Raises:
      StudyError: flags that make no sense, a start that there is not, two runs of one name; names
        the file, the stage and the flag.
    """
    expanded: Expanded = {}
    for stage in study.stages:
        where = f"{study.path}: stage {stage.name.rpartition('/')[2]}"
        for choice in stage.choices:
            if choice.stage not in expanded:
                raise StudyError(f"{where}: choose.from={choice.stage} is no earlier stage")
        runs = [
            _run(stage, part, flags, seed, places, expanded, chosen or {}, where)
            for part in stage.parts
            for flags in _combinations(part)
            for seed in part.seeds
        ]
        names = [run.name for run in runs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise StudyError(
                f"{where}: two runs are named {twice[0]}: its run_name tells too little"
            )
        expanded[stage.name] = runs
    return expanded


def group_of(choice: Choice, flags: Mapping[str, Any]) -> tuple[Any, ...]:
    """The values of a choice's `per` flags."""
    return tuple(flags[flag] for flag in choice.per)


def arguments(config: Config) -> list[str]:
    """The flags that are not the defaults, as the command line takes them."""
    words = []
    for f in fields(Config):
        value = getattr(config, f.name)
        if value == getattr(_DEFAULTS, f.name):
            continue
        if isinstance(value, bool):
            words.append(f"--{f.name}" if value else f"--no_{f.name}")
        else:
            words.append(f"--{f.name}={value}")
    return words


def command_text(run: StudyRun) -> str:
    """A run's command, to be shown; flags that are not chosen yet are said to be."""
    known = [word for word in arguments(run.config) if _flag(word) not in run.waits_for]
    waiting = [f"--{flag}={CHOSEN}" for flag in run.waits_for]
    return shlex.join(["python", "-m", "experiments.train", *known, *waiting])


def _flag(word: str) -> str:
    return word.partition("=")[0].removeprefix("--")


def _combinations(part: Part) -> list[dict[str, Any]]:
    combined = itertools.product(*part.values.values())
    return [dict(zip(part.values, values, strict=True)) for values in combined]


def _run(
    stage: Stage,
    part: Part,
    flags: dict[str, Any],
    seed: int,
    places: Mapping[str, str],
    earlier: Expanded,
    chosen: Mapping[Choice, Settings],
    where: str,
) -> StudyRun:
    """One run; see `expand`."""
    told: dict[str, Any] = {**asdict(_DEFAULTS), **flags, "seed": seed}
    waits_for: tuple[str, ...] = ()
    if part.asks and part.choose is not None:
        found, is_known = _looked_up(part, told, earlier, chosen, where)
        waits_for = () if is_known else part.asks
        flags = {**flags, **{flag: found[flag] for flag in part.asks}}
        told |= {flag: flags[flag] if is_known else _UNKNOWN for flag in part.asks}
    name = f"{stage.name}/{_filled(part.run_name, told, f'{where}: run_name')}"
    start = None
    template = flags.get("init_from")
    if isinstance(template, str) and not template.endswith((".h5", ".safetensors")):
        start = _start(_filled(template, told, f"{where}: init_from"), stage, earlier, where)
        flags = {**flags, "init_from": f"{places['runs_dir']}/{start}"}
    try:
        config = Config(**{**flags, **places, "seed": seed, "name": name})
        settled(config)
    except FlagError as error:
        raise StudyError(f"{where}: {name}: {error}") from None
    return StudyRun(name=name, config=config, start=start, waits_for=waits_for)


def _looked_up(
    part: Part,
    flags: Mapping[str, Any],
    earlier: Expanded,
    chosen: Mapping[Choice, Settings],
    where: str,
) -> tuple[Mapping[str, Any], bool]:
    """What was chosen for such runs and True; before that, some flags that are tried and False."""
    assert part.choose is not None
    choice = part.choose
    group = group_of(choice, {**flags, **part.chosen_for})
    tried = [run for run in earlier[choice.stage] if group_of(choice, asdict(run.config)) == group]
    if not tried:
        of = ", ".join(f"{flag}={value}" for flag, value in zip(choice.per, group, strict=True))
        raise StudyError(f"{where}: {choice.stage} has no trials of {of}")
    if choice in chosen:
        return chosen[choice][group], True
    return asdict(tried[0].config), False


def _start(name: str, stage: Stage, earlier: Expanded, where: str) -> str:
    full = name if name.count("/") == 2 else f"{stage.study}/{name}"
    runs = earlier.get(full.rpartition("/")[0], [])
    if not any(run.name == full for run in runs):
        raise StudyError(f"{where}: init_from={name} is no run of an earlier stage")
    return full


def _filled(template: str, flags: Mapping[str, Any], where: str) -> str:
    def value(found: re.Match[str]) -> str:
        if found[1] not in flags:
            raise StudyError(f"{where}={template}: there is no flag {found[1]}")
        held = flags[found[1]]
        return f"{held:g}" if isinstance(held, float) else str(held)

    return re.sub(r"\{(\w+)\}", value, template)
