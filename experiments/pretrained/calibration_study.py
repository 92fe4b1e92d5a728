"""A study of calibration from its file: every combination of flags, each draw, a record each.

    python -m experiments.pretrained.calibration_study studies/pretrained/mobilenet.toml \\
        --photographs=PATH --data_dir=DIR --weights_file=PATH

The file has what is asked (`about`), flags of all runs (`flags`) and stages. A flag with a list of
values is a run for each, and for each combination; what differs between parts of a stage stands in
`[[stages.runs]]`, and what each part is run with in turn in `[[stages.rows]]`. Flags are those of
`python -m experiments.pretrained`:

    [flags]
    network = "mobilenet_v1_025"
    images = 128

    [[stages]]
    name = "final"
    run_name = "{method}_w{bits}_draw{draw}"
    method = ["gptq", "coordinate_descent"]
    draw = [0, 1, 2]
    [[stages.rows]]
    bits = 4
    [[stages.rows]]
    bits = 3
    depthwise_bits = 8

All flags are checked before anything starts. Records are written to RESULTS/STUDY/STAGE/RUN.json;
the same command again skips those that are there. The runs share one process, in which the network
is compiled, and read in float, once. `--shard=0/2` makes every second run, for two processes.
"""

import dataclasses
import itertools
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro

import ab_jax as ab
from ab_jax.training.records import describe_run, write_json
from experiments.pretrained import calibrate_command
from experiments.pretrained.calibrate_command import PLACES, calibrated, check, sources_of
from experiments.pretrained.calibration_records import as_json
from experiments.pretrained.pretrained_models import PretrainedModel, pretrained_model
from experiments.pretrained.readings import Reader
from experiments.settings.command_line import end_with_a_line
from experiments.settings.config import FlagError

_OF_STAGE = {"name", "run_name", "runs", "rows"}
_FLAGS = {field.name for field in dataclasses.fields(calibrate_command.Config)} - set(PLACES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Which study, and where its images, weights and records lie."""

    file: tyro.conf.Positional[Path]  # such as studies/pretrained/mobilenet.toml
    photographs: Path | None = None  # as of python -m experiments.pretrained
    data_dir: str | None = None  # likewise
    weights_file: Path | None = None  # likewise
    results: Path = Path("results")  # records go below it
    stage: str | None = None  # run this stage alone
    shard: str = "0/1"  # I/N: the runs I, I + N, I + 2 N, ... from 0
    dry_run: bool = False  # name the runs and say which are done, start nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run of a study: `STAGE/NAME`, and all its flags."""

    name: str
    config: calibrate_command.Config


def runs_of(path: Path, places: dict[str, Any]) -> list[Run]:
    """The runs of a study's file, in order, with these places.

    Raises:
      FlagError: a key, a flag or a value that there is not, or two runs of one name; names the file
        and the stage. OSError: it cannot be read.
    """
    try:
        held = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FlagError(f"{path} is not TOML: {error}") from None
    _known(held, {"about", "flags", "stages"}, str(path))
    found: list[Run] = []
    for stage in held.get("stages", []):
        where = f"{path}: stage {stage.get('name', '?')}"
        shared = {k: v for k, v in stage.items() if k not in _OF_STAGE}
        if not isinstance(stage.get("name"), str) or not isinstance(stage.get("run_name"), str):
            raise FlagError(f"{where}: it should have a name and a run_name")
        for part, row in itertools.product(stage.get("runs", [{}]), stage.get("rows", [{}])):
            flags = {**held.get("flags", {}), **shared, **part, **row}
            _known(flags, _FLAGS, where)
            for combined in _combinations(flags):
                config = calibrate_command.Config(**combined, **places)
                try:
                    name = f"{stage['name']}/{stage['run_name'].format(**as_json(config))}"
                    check(config)
                except (FlagError, KeyError) as error:
                    raise FlagError(f"{where}: {error}") from None
                found.append(Run(name=name, config=config))
    names = [run.name for run in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise FlagError(f"{path}: two runs are named {twice[0]}: its run_name tells too little")
    return found


def _known(table: dict[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(table.keys() - known):
        raise FlagError(f"{where}: there is no {unknown[0]}; known: {', '.join(sorted(known))}")


def _combinations(flags: dict[str, Any]) -> Iterator[dict[str, Any]]:
    values = [value if isinstance(value, list) else [value] for value in flags.values()]
    for combined in itertools.product(*values):
        yield dict(zip(flags, combined, strict=True))


class Conductor:
    """Makes runs, one after another, and keeps what several of them share."""

    def __init__(self) -> None:
        self._network: tuple[Any, ...] | None = None
        self._model: PretrainedModel | None = None
        self._read: tuple[Any, ...] | None = None
        self._reader: Reader | None = None

    def record(self, config: calibrate_command.Config) -> dict[str, Any]:
        """Calibrate and read; what there is to say of it, without where things lie."""
        c = config
        model = self._model_of(c)
        reader = self._reader_of(c, model)
        flags = {name: value for name, value in as_json(c).items() if name not in PLACES}
        described = describe_run("experiments.pretrained", flags)
        found, how = calibrated(c, model, sources_of(c, model), tell=lambda layer: None)
        read = reader.beside_float(reader.of(ab.dequantize(found.codes)))
        record = described | read | how
        record["images"]["read"] = reader.counts
        return record

    def _model_of(self, config: calibrate_command.Config) -> PretrainedModel:
        network = (config.network, config.weights_file)
        if self._model is None or network != self._network:
            self._network, self._model = network, pretrained_model(*network)
            self._reader = None
        return self._model

    def _reader_of(self, config: calibrate_command.Config, model: PretrainedModel) -> Reader:
        c = config
        # All that `ImageSources.to_read` depends on: places are the same for all runs.
        read = (c.read, c.batch_size, c.source == "photographs")
        if self._reader is None or read != self._read:
            to_read = sources_of(c, model).to_read(c.read)
            self._read, self._reader = read, Reader(model, to_read, batch_size=c.batch_size)
        return self._reader


def conduct(config: Config) -> None:
    """Make the runs that are not done.

    Raises:
      FlagError, ValueError, OSError: as `runs_of`, and as the runs.
    """
    c = config
    places = {name: getattr(c, name) for name in ("photographs", "data_dir", "weights_file")}
    runs = runs_of(c.file, places)
    index, _, count = c.shard.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise FlagError(f"--shard={c.shard} should be I/N with I from 0 to N - 1")
    mine = [run for run in runs if c.stage in (None, run.name.partition("/")[0])]
    if not mine:
        raise FlagError(f"--stage={c.stage}: {c.file} has no such stage")
    conductor = Conductor()
    for run in mine[int(index) :: int(count)]:
        path = c.results / c.file.parent.name / c.file.stem / f"{run.name}.json"
        if c.dry_run or path.exists():
            print(f"{run.name:<60} {'done' if path.exists() else 'to do'}", flush=True)
            continue
        record = conductor.record(run.config)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
        below = ", ".join(f"{n} {x:.2f}" for n, x in record["points_below_float"].items())
        print(f"{run.name:<60} {below} points below float", flush=True)


def main() -> None:
    """The command line; what the user can mend ends it with one line on stderr."""
    config = tyro.cli(
        Config,
        prog="python -m experiments.pretrained.calibration_study",
        description=__doc__,
        use_underscores=True,
    )
    end_with_a_line(lambda: conduct(config))


if __name__ == "__main__":
    main()
