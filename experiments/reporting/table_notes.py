"""Where a table's numbers come from: the cut, the machine, the code, commands to repeat them."""

import re
import shlex
from collections.abc import Sequence
from typing import Any

from experiments.reporting.run_records import Record, distinct
from experiments.settings.datasets import label_of

# What a study is cut to, as found in a record's summary or config.
CUT = ("dataset", "classes", "image_size", "width", "epochs", "batch_size", "train_images")
# Flags that say where things lie on a machine: whoever repeats a run chooses their own.
PLACES = ("runs_dir", "data_dir", "compilation_cache")


def provenance(records: Sequence[Record]) -> str:
    """Sentences on the cut, hardware, versions and git revisions of these records, all listed."""
    cut = []
    for key in CUT:
        values = distinct(record.summary.get(key, record.config.get(key)) for record in records)
        if text := " or ".join(_value_text(key, value) for value in values if value is not None):
            cut.append(text if key == "dataset" else f"{key.replace('_', ' ')} {text}")
    revisions = [short_revision(record.revision) for record in records]
    counts = {revision: revisions.count(revision) for revision in distinct(revisions)}
    code = ", ".join(f"`{revision}` ({count} runs)" for revision, count in counts.items())
    if len(counts) == 1:
        code = f"`{revisions[0]}`"
    experiments = ", ".join(f"`{name}`" for name in distinct(r.experiment for r in records))
    jax = ", ".join(distinct(record.packages.get("jax", "unknown") for record in records))
    hardware = " and ".join(distinct(record.hardware for record in records))
    made = f"Made by {experiments} at revision {code} with jax {jax} on {hardware}."
    return f"Cut: {', '.join(cut)}. {made}" if cut else made


def short_revision(revision: str) -> str:
    """The first 10 digits of a git revision; `-dirty` stays."""
    return re.sub(r"^([0-9a-f]{10})[0-9a-f]{30}", r"\1", revision)


def commands(groups: Sequence[Sequence[Record]]) -> str:
    """Sweeps that repeat the runs, one for each group; the flags they share are said once.

    The runs of a group differ by their seed alone; where it stands in a name or a path
    (`seed3`), it is written as the sweep's template `seed{seed}`.
    """
    records = [record for group in groups for record in group]
    if not records:
        return ""
    flags = dict.fromkeys(flag for record in records for flag in record.config)
    shared: list[str] = []
    own: list[str] = []
    for flag in flags.keys() - {*PLACES, "seed", "method"}:
        values = distinct(record.template(flag) for record in records)
        (shared if len(values) == 1 else own).append(flag)
    lines = [f"flags=({' '.join(_argument(records[0], flag) for flag in sorted(shared))})"]
    for group in groups:
        module = group[0].experiment.removeprefix("experiments.")
        words = [f"--method={group[0].config['method']}", f"--seed={_seeds(group)}"]
        # Of records of several ages, the older ones lack what was not a flag then.
        for flag in sorted(flag for flag in own if flag in group[0].config):
            # A path that no template expresses is left to whoever repeats the run.
            if len(distinct(record.template(flag) for record in group)) == 1:
                words.append(_argument(group[0], flag))
        line = f'python -m experiments.sweep {module} -- "${{flags[@]}}" {" ".join(words)}'
        lines.append(line)
    return "\n".join(lines)


def _value_text(key: str, value: Any) -> str:
    if key == "dataset":
        return label_of(str(value))
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _argument(record: Record, flag: str) -> str:
    value = record.template(flag)
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no_{flag}"
    return shlex.quote(f"--{flag}={value}".replace(",", "\\,"))


def _seeds(group: Sequence[Record]) -> str:
    seeds = sorted(record.seed for record in group)
    if len(seeds) > 1 and seeds == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]}..{seeds[-1]}"
    return ",".join(map(str, seeds))
