"""What a sweep will run: flags with comma lists become one `Run` for each combination.

    --method=float,ste --seed=0..4      two methods times five seeds
    --init_from='runs/float/seed{seed}' `{flag}` is filled from the other flags of the same run
    --note='one\\, two'                  a backslash keeps a comma inside a value
    --augment=true,false                passed on as the switches --augment and --no_augment

Pure functions; processes are the business of `experiments.sweep`.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath


class PlanError(Exception):
    """The sweep as asked for cannot be run; the message says what to change."""


@dataclass(frozen=True)
class Run:
    """One run: its name (a relative path below the runs directory) and its flags as text."""

    name: str
    flags: Mapping[str, str]

    def arguments(self) -> list[str]:
        """The flags as command-line arguments, `--name` included; true and false as switches."""
        return [_argument(flag, text) for flag, text in {**self.flags, "name": self.name}.items()]


def plan(experiment: str, arguments: Sequence[str]) -> list[Run]:
    """All runs of `experiment` over the product of the lists in `arguments`, last flag fastest.

    A run is named by the `--name` template, else by `EXPERIMENT/` and the flags that are swept.

    Raises PlanError: a flag given twice or without dashes, an empty list item, a descending range,
    a template that names an absent flag or itself, a name that leaves the runs directory, two runs
    of one name.
    """
    choices = parse_flags(arguments)
    swept = [flag for flag, values in choices.items() if len(values) > 1]
    runs = []
    for values in itertools.product(*choices.values()):
        flags = fill_templates(dict(zip(choices, values, strict=True)))
        name = flags.pop("name", None)
        if name is None:
            name = f"{experiment}/{_default_name({flag: flags[flag] for flag in swept})}"
        _check_name(name)
        runs.append(Run(name, flags))
    _check_unique(runs)
    return runs


def parse_flags(arguments: Sequence[str]) -> dict[str, list[str]]:
    """`--flag=a,b`, `--flag a,b` and bare `--flag` (true) as {flag: values}; dashes become `_`."""
    choices: dict[str, list[str]] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not re.match(r"--\w", word):
            raise PlanError(f"{word!r} is not a flag: write each as --flag=value")
        flag, equals, text = word.removeprefix("--").partition("=")
        flag = flag.replace("-", "_")
        if flag in choices:
            raise PlanError(f"--{flag} is given twice: write its values as --{flag}=a,b")
        if flag == "runs_dir":
            raise PlanError("--runs_dir belongs to the sweep: give it before the lone --")
        if not equals:
            text = words.pop(0) if words and not words[0].startswith("--") else "true"
        choices[flag] = _split_values(flag, text)
    return choices


def _split_values(flag: str, text: str) -> list[str]:
    items = re.split(r"(?<!\\),", text)
    if len(items) > 1 and "" in items:
        raise PlanError(f"--{flag}={text} has an empty item: remove a comma, or escape it as \\,")
    values: list[str] = []
    for item in items:
        if bounds := re.fullmatch(r"(-?\d+)\.\.(-?\d+)", item):
            first, last = int(bounds[1]), int(bounds[2])
            if last < first:
                raise PlanError(f"--{flag}: the range {item} is empty; write {last}..{first}")
            values += map(str, range(first, last + 1))
        else:
            values.append(item.replace("\\,", ","))
    return values


def fill_templates(flags: Mapping[str, str]) -> dict[str, str]:
    """Each `{flag}` in a value replaced by that flag's value, which may hold templates itself."""

    def fill(flag: str, above: tuple[str, ...]) -> str:
        if flag in above:
            raise PlanError(f"the template of --{flag} refers to itself: {flags[flag]}")

        def value(found: re.Match[str]) -> str:
            if found[1] not in flags:
                raise PlanError(
                    f"--{flag}={flags[flag]}: there is no --{found[1]} to fill it from; give it, "
                    f"or use one of: {', '.join(other for other in flags if other != flag)}"
                )
            return fill(found[1], (*above, flag))

        return re.sub(r"\{(\w+)\}", value, flags[flag])

    return {flag: fill(flag, ()) for flag in flags}


def _argument(flag: str, text: str) -> str:
    switch = {"true": f"--{flag}", "false": f"--no_{flag}"}
    return switch.get(text.lower(), f"--{flag}={text}")


def _default_name(swept: Mapping[str, str]) -> str:
    name = "_".join(f"{flag}-{text}" for flag, text in swept.items())
    return re.sub(r"[^\w.+-]", "-", name) or "single"


def _check_name(name: str) -> None:
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise PlanError(f"--name={name} must be a relative path below the runs directory")


def _check_unique(runs: Sequence[Run]) -> None:
    seen: dict[str, Run] = {}
    for run in runs:
        other = seen.setdefault(str(PurePosixPath(run.name)), run)
        if other is not run:
            differing = [flag for flag in run.flags if run.flags[flag] != other.flags[flag]]
            missing = " and ".join(f"{{{flag}}}" for flag in differing)
            raise PlanError(
                f"two runs are named {run.name}:\n"
                f"  {' '.join(other.arguments())}\n  {' '.join(run.arguments())}\n"
                + (f"add {missing} to --name" if missing else "remove the value given twice")
            )
