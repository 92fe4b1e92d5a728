"""Train one network: any of ours, on any data set, by any method, with any levels.

    python -m experiments.train --network=resnet20 --dataset=digits --method=ab --weights=int2

`experiments.binarynet_cifar10` and its neighbours are this with defaults of their own. A run may
have two phases: with --float_epochs the float network comes first (in NAME/float), and the method
goes on from it; with --init_from it goes on from a network that is there.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from ab_jax.data.load import facts
from ab_jax.estimators import full_precision
from ab_jax.linen import WithQuantizedInputs
from ab_jax.training.distributed import (
    all_devices,
    check_same_flags,
    first_succeeds,
    is_first,
    start,
)
from ab_jax.training.loop import train
from ab_jax.training.parallel import Parallel
from ab_jax.training.records import RunDirectory
from experiments.settings.build import Images, make_training, settled
from experiments.settings.command_line import end_with_a_line
from experiments.settings.config import FREE_FLAGS, Config, FlagError, recorded
from experiments.settings.datasets import DATASETS, load_dataset
from experiments.settings.levels import WEIGHTS
from experiments.settings.methods import METHODS
from experiments.settings.networks import NETWORKS
from experiments.settings.old_flags import ADDED_LATER
from experiments.settings.starts import CALIBRATIONS, OF_LAST_PHASE


def run(config: Config, experiment: str = "experiments.train") -> dict[str, Any]:
    """Train as the flags say, in one phase or two, and return the record of the last.

    Args:
      experiment: the module's name, for the record.

    Raises:
      FlagError, ValueError, OSError: as the flags, the data, and `ab_jax.training.loop.train`.
    """
    c = settled(config)
    if c.init_from is not None and not Path(c.init_from).exists():
        raise FlagError(
            f"There is no run to start from in {c.init_from}. Train that run first, or correct "
            f"--init_from."
        )
    if c.teacher not in (None, "start") and not Path(c.teacher).exists():
        raise FlagError(
            f"There is no network to learn from in {c.teacher}. Train that run first, or correct "
            f"--teacher."
        )
    start(c.coordinator, c.processes, c.process, from_cluster=c.distributed)
    dataset = load_dataset(c)
    last = last_phase(c)
    if last.init_from != c.init_from:
        before = _float_phase(c)
        if not (_path(before) / "record.json").exists():
            train_phase(before, dataset, experiment)
    return train_phase(last, dataset, experiment)


def last_phase(config: Config) -> Config:
    """The flags of the last phase of a run, or of its only one: those that its record holds.

    Raises:
      FlagError: as `settled`.
    """
    c = settled(config)
    if c.init_from is not None or not c.float_epochs:
        return c
    before = _float_phase(c)
    if c.method == "float":
        return before
    return dataclasses.replace(c, init_from=str(_path(before)))


def _float_phase(config: Config) -> Config:
    c = config
    is_whole = c.method == "float"
    return dataclasses.replace(
        c,
        **({} if is_whole else OF_LAST_PHASE),
        method="float",
        name=c.name if is_whole else f"{c.name}/float",
        epochs=c.float_epochs,
        learning_rate=c.float_learning_rate,
        read_test=c.read_test and is_whole,
    )


def _path(config: Config) -> Path:
    return Path(config.runs_dir) / config.name


def train_phase(
    config: Config, dataset: Images, experiment: str, *, parallel: Parallel | None = None
) -> dict[str, Any]:
    """Train one phase, and return its record.

    Args:
      config: as `settled` returns it.
      dataset: what its flags ask for.
      experiment: as for `run`.
      parallel: the devices; None: as the flags say.

    Raises:
      As `run`.
    """
    c = config
    parallel = parallel or Parallel(c.parallel, all_devices(), norm_group=c.norm_group)
    training = make_training(c, dataset, parallel)
    model = training.model
    if isinstance(model, WithQuantizedInputs):
        images = jax.ShapeDtypeStruct((1, *dataset.image_shape), jnp.float32)
        init = functools.partial(model.init, train=False)
        variables = jax.eval_shape(init, jax.random.key(0), images)
        rules = None if training.estimator is full_precision else training.rules
        table = model.describe_products(variables, images, rules=rules, train=False)
        if parallel.speaks:
            print(table)
    keep_compiled_programs(c.compilation_cache)
    with open_run(c, experiment, dataset) as directory:
        return train(training, parallel, directory)


def open_run(config: Config, experiment: str, dataset: Images) -> RunDirectory:
    """The run's directory, into which the first process writes.

    Raises:
      ValueError: processes of different flags; otherwise as `RunDirectory`.
    """
    flags = recorded(config)
    check_same_flags(flags)
    path = _path(config)
    with first_succeeds(f"Opening {path}"):
        return RunDirectory(
            path,
            experiment=experiment,
            config=flags,
            data=facts(dataset),
            free=FREE_FLAGS,
            added=ADDED_LATER,
            allow_changed=config.allow_changed,
            writes=is_first(),
        )


def keep_compiled_programs(directory: str) -> None:
    """Keep compiled programs in a directory, for the next run; an empty name: nowhere."""
    if not directory:
        return
    jax.config.update("jax_compilation_cache_dir", str(Path(directory).expanduser()))
    # Small programs too: there are a hundred of them, and they add up.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def summary_of(record: dict[str, Any], path: Path) -> str:
    """How a run ended, in a few lines: accuracies, where it lies, what to do next."""
    lines = []
    for part in ("validation", "test"):
        found = record["summary"].get(part)
        if not found:
            continue
        kind = "blended" if record["config"]["method"] == "float" else "quantized"
        running, fresh = (100 * found[key] for key in (kind, f"{kind}_recalibrated"))
        lines.append(
            f"{part} accuracy {running:.2f} % with running, {fresh:.2f} % with re-estimated batch "
            f"statistics"
        )
    lines.append(f"run: {path}")
    if record["config"]["method"] == "float":
        lines.append(f"next: the same command with --method=ab --init_from={path} --name=NAME")
    else:
        lines.append(f"next: python -m experiments.export {path} --out=net.safetensors")
    return "\n".join(lines)


def offered() -> str:
    """What there is to choose from by name, for --help."""
    methods = ", ".join(f"{name} ({method.help})" for name, method in METHODS.items())
    networks = ", ".join(f"{name} ({network.label})" for name, network in NETWORKS.items())
    datasets = ", ".join(f"{name} ({source.label})" for name, source in DATASETS.items())
    return (
        f"--method: {methods}.\n\n--network: {networks}.\n\n--weights: {', '.join(WEIGHTS)}."
        f"\n\n--dataset: {datasets}, image_folder:NAME."
        f"\n\n--calibrate: {', '.join(CALIBRATIONS)}."
    )


def main(defaults: Config, description: str | None, experiment: str) -> None:
    """The command line; what the user can fix ends it with one line on stderr."""

    def command() -> None:
        text = f"{description}\n{offered()}"
        config = tyro.cli(
            Config,
            prog=f"python -m {experiment}",
            default=defaults,
            description=text,
            use_underscores=True,
        )
        record = run(config, experiment)
        if is_first():
            print(summary_of(record, _path(config)))

    end_with_a_line(command)


if __name__ == "__main__":
    main(Config(), __doc__, "experiments.train")
