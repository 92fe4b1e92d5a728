"""A study as its file says it: stages of runs, what they start from, what is chosen by which rule.

    about = "What is asked, of what source, at what cost, with what result to expect."

    [flags]                              # of all runs, as the command line has them
    network = "binarynet"

    [[stages]]                           # in this order
    name = "start"
    seeds = "0..4, 100"
    run_name = "seed{seed}"
    method = "float"
    read_test = false

    [[stages]]
    name = "trials"
    seeds = 100                          # not those of the final runs
    run_name = "{method}_lr{learning_rate}_seed{seed}"
    init_from = "start/seed{seed}"       # paired: all methods go on from the network of their seed
    read_test = false
    method = ["ste", "ab"]               # a list: a run for each, and for each combination
    learning_rate = [0.05, 0.1, 0.2]

    [[stages]]
    name = "final"
    seeds = "0..4"
    run_name = "{method}_seed{seed}"
    init_from = "start/seed{seed}"
    method = ["ste", "ab"]
    learning_rate = "chosen"
    choose = { from = "trials", flags = ["learning_rate"], per = ["method"] }

What differs between parts of a stage stands in `[[stages.runs]]`, one for each part. A stage named
`OTHER/STAGE` is that of `OTHER.toml` beside this file: its runs are made there, once for both.
`chosen_for = { weights = "binary" }` takes what was chosen for other values than the run's own, and
`later` tells what was added after a first look at the results. A flag without a line has the
default of `experiments.settings.config.Config`.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from experiments.reporting.run_records import ReportError
from experiments.reporting.table_parts import TableOptions
from experiments.settings.config import Config
from experiments.study_design.design import CHOSEN, Choice, Part, Stage, Study, StudyError

_OF_RUNS = {"seeds", "run_name", "choose", "chosen_for", "later"}
_OF_STAGE = {*_OF_RUNS, "name", "runs"}
_FLAGS = {f.name for f in fields(Config)} - {"name", "runs_dir", "seed"}


def read_study(path: Path) -> Study:
    """The study in a file.

    Raises:
      StudyError: it cannot be read, or a stage or a key makes no sense; names the file and it.
    """
    try:
        held = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StudyError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StudyError(f"{path} is not TOML: {error}") from None
    _known(held, {"about", "flags", "stages", "table"}, str(path))
    shared = _table(held.get("flags", {}), f"{path}: [flags]")
    _known(shared, _FLAGS, f"{path}: [flags]")
    stages: list[Stage] = []
    for number, one in enumerate(_list(held.get("stages", []), f"{path}: stages"), start=1):
        where = f"{path}: stage {_table(one, str(path)).get('name', number)}"
        name = one.get("name")
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            raise StudyError(f"{where}: its name should be STAGE, or STUDY/STAGE of another study")
        if "/" in name:
            stage = _borrowed(path, one, where)
        else:
            stage = _stage(f"{path.stem}/{name}", one, shared, where)
        if any(stage.name == other.name for other in stages):
            raise StudyError(f"{where}: there are two stages of that name")
        stages.append(stage)
    if not stages:
        raise StudyError(f"{path} has no [[stages]]")
    options, of = _options(_table(held.get("table", {}), f"{path}: [table]"), path)
    about = held.get("about", "")
    if not isinstance(about, str) or not about.strip():
        raise StudyError(f"{path}: about should say what is asked, and what it costs")
    return Study(path=path, about=about, stages=tuple(stages), table=options, table_stages=of)


def _stage(name: str, held: Mapping[str, Any], shared: Mapping[str, Any], where: str) -> Stage:
    _known(held, _OF_STAGE | _FLAGS, where)
    own = {key: value for key, value in held.items() if key not in {"name", "runs"}}
    parts = []
    for number, one in enumerate(_list(held.get("runs", [{}]), f"{where}: runs"), start=1):
        at = f"{where}, runs {number}" if "runs" in held else where
        _known(_table(one, at), _OF_RUNS | _FLAGS, at)
        parts.append(_part({**shared, **own, **one}, name.partition("/")[0], at))
    return Stage(name=name, parts=tuple(parts))


def _part(held: Mapping[str, Any], study: str, where: str) -> Part:
    for key in ("seeds", "run_name"):
        if key not in held:
            raise StudyError(f"{where}: it has no {key}")
    values = {}
    for flag, value in held.items():
        if flag in _FLAGS:
            several = value if isinstance(value, list) else [value]
            if not several or any(several.count(one) > 1 for one in several):
                raise StudyError(f"{where}: {flag} is a list without values, or with one twice")
            values[flag] = tuple(several)
    run_name, later = held["run_name"], held.get("later", "")
    if not isinstance(run_name, str) or not isinstance(later, str):
        raise StudyError(f"{where}: run_name and later should be text")
    choose = _choice(_table(held["choose"], where), study, where) if "choose" in held else None
    part = Part(
        seeds=seeds_of(held["seeds"], where),
        run_name=run_name,
        values=MappingProxyType(values),
        choose=choose,
        chosen_for=_table(held.get("chosen_for", {}), f"{where}: chosen_for"),
        later=later,
    )
    if part.asks and choose is None:
        raise StudyError(f'{where}: {part.asks[0]} is "{CHOSEN}", but there is no choose')
    if unknown := sorted({*part.asks} - {*(choose.flags if choose else ())}):
        raise StudyError(f"{where}: choose has no {', '.join(unknown)} in its flags")
    return part


def _borrowed(path: Path, held: Mapping[str, Any], where: str) -> Stage:
    """The stage of another study beside this one, or those of its runs that have these seeds."""
    _known(held, {"name", "seeds"}, f"{where}, of another study")
    study, _, stage = str(held["name"]).partition("/")
    if study == path.stem:
        raise StudyError(f"{where}: a stage of this study itself is named {stage}")
    found = read_study(path.with_name(f"{study}.toml")).stage(str(held["name"]))
    if found is None:
        raise StudyError(f"{where}: {study}.toml has no stage {stage}")
    parts = found.parts
    if "seeds" in held:
        wanted = set(seeds_of(held["seeds"], where))
        had = {seed for part in parts for seed in part.seeds}
        if wanted - had:
            raise StudyError(f"{where}: it has no seed {', '.join(map(str, sorted(wanted - had)))}")
        parts = tuple(
            replace(part, seeds=tuple(seed for seed in part.seeds if seed in wanted))
            for part in parts
            if wanted & {*part.seeds}
        )
    return Stage(name=found.name, parts=parts, is_own=False)


def seeds_of(value: Any, where: str) -> tuple[int, ...]:
    """Seeds from a number, a text such as "0..4, 100", or a list of either.

    Raises:
      StudyError: they are not, or one is there twice.
    """
    found: list[int] = []
    for item in value if isinstance(value, list) else [value]:
        words = [str(item)] if isinstance(item, int) else str(item).split(",")
        for word in words:
            bounds = re.fullmatch(r"\s*(\d+)(?:\.\.(\d+))?\s*", word)
            if bounds is None or isinstance(item, bool):
                raise StudyError(f'{where}: seeds should be as in "0..4, 100", not {value!r}')
            first, last = int(bounds[1]), int(bounds[2] or bounds[1])
            found += range(first, last + 1)
    if not found or len(set(found)) < len(found):
        raise StudyError(f"{where}: seeds={value!r} has no seed, or one twice")
    return tuple(found)


def _choice(held: Mapping[str, Any], study: str, where: str) -> Choice:
    _known(held, {"from", "flags", "per", "statistics"}, f"{where}: choose")
    flags, per = held.get("flags"), held.get("per", ["method"])
    for key, names in {"flags": flags, "per": per}.items():
        if not isinstance(names, list) or not names or {*names} - _FLAGS:
            raise StudyError(f"{where}: choose.{key} should be a list of flags, not {names!r}")
    statistics = held.get("statistics", "re-estimated")
    if statistics not in ("running", "re-estimated"):
        raise StudyError(f"{where}: choose.statistics is neither running nor re-estimated")
    stage = held.get("from")
    if not isinstance(stage, str):
        raise StudyError(f"{where}: choose.from should name the stage of the trials")
    assert isinstance(flags, list)
    stage = stage if "/" in stage else f"{study}/{stage}"
    return Choice(stage=stage, flags=tuple(flags), per=tuple(per), statistics=statistics)


def _options(held: Mapping[str, Any], path: Path) -> tuple[TableOptions, tuple[str, ...]]:
    where = f"{path}: [table]"
    _known(held, {"stages", *(f.name for f in fields(TableOptions))}, where)
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in held.items()}
    of = values.pop("stages", ())
    for key, value in values.items():
        wanted = type(getattr(TableOptions(), key))
        if not isinstance(value, wanted):
            kind = "a list of texts" if wanted is tuple else "a text"
            raise StudyError(f"{where}: {key} should be {kind}")
    try:
        options = TableOptions(**values)
    except ReportError as error:
        raise StudyError(f"{where}: {error}") from None
    return options, tuple(name if "/" in name else f"{path.stem}/{name}" for name in of)


def _known(held: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(held.keys() - known):
        raise StudyError(f"{where}: there is no {', '.join(unknown)}")


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise StudyError(f"{where} should be a table, not {value!r}")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise StudyError(f"{where} should be [[tables]]")
    return value
