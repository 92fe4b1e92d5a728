"""What low precision costs in training: the time of a step as a ratio to the float step.

    python -m experiments.bench_step        (about ten minutes on two cores)

BinaryNet, each method's real training step, all in one process: in every round each step runs once,
in an order drawn anew, so that neither a slower minute of the machine nor what a neighbour leaves
in the caches falls on one step more than on another. The float step runs twice a round: its second
row is what this measurement makes of two steps that do not differ. The ratio is taken within a
round; the table gives its median over the rounds with the 95 % interval of that median (from the
order of the ratios alone, as the noise of a shared machine is not normal).

On CPUs a step is compiled as `ab_jax.training.parallel` says; to see what XLA's own schedule makes
of it, set XLA_FLAGS=--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_DEFAULT.
"""

import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import ab_jax as ab
from ab_jax.models.binarynet import BinaryNet
from ab_jax.training.optimizers import make_optimizer
from ab_jax.training.parallel import AXIS, Parallel
from ab_jax.training.records import describe_run, write_json
from ab_jax.training.state import create_state
from ab_jax.training.step import Preprocessing, make_train_step
from experiments.reporting.paired_statistics import median_interval

# Environment variables that change how fast a step runs, for the record.
ENVIRONMENT = ("GLIBC_TUNABLES", "LD_PRELOAD", "XLA_FLAGS")

# Name, estimator and quantizer of each step; the first is what the others are compared with, the
# second the control: the same program, compiled again.
Step = tuple[str, ab.Estimator, ab.Quantizer]
STEPS: tuple[Step, ...] = (
    ("float", ab.full_precision, ab.Binary()),
    ("float, again", ab.full_precision, ab.Binary()),
    ("STE, 1 bit", ab.straight_through, ab.Binary()),
    ("AB, 1 bit", ab.alpha_blend, ab.Binary()),
    ("STE, 4 bits, absmax", ab.straight_through, ab.Uniform(bits=4, scale="absmax")),
    ("AB, 4 bits, absmax", ab.alpha_blend, ab.Uniform(bits=4, scale="absmax")),
    ("STE, 4 bits, least squares", ab.straight_through, ab.Uniform(bits=4)),
    ("AB, 4 bits, least squares", ab.alpha_blend, ab.Uniform(bits=4)),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to time, and where to write the record."""

    width: float = 1.0  # multiplies the features of every hidden layer of BinaryNet
    image_size: int = 32  # pixels
    batch_size: int = 128  # images
    rounds: int = 11  # measurements of each step, after a round to warm up
    seed: int = 0  # of the order in which a round runs the steps
    out: Path = Path("results/bench_step/batch128.json")


def run(config: Config, steps: Sequence[Step] = STEPS) -> dict[str, Any]:
    """Time the steps, write the record and return it."""
    if config.rounds < 1:
        raise ValueError(f"--rounds={config.rounds} must be at least 1.")
    # One device: the arithmetic of the weights is the same on every one.
    parallel = Parallel("pmap", (jax.devices()[0],))
    batch = parallel.replicate(_images(config))
    indices = parallel.shard(np.arange(config.batch_size, dtype=np.int32))
    compiled, states, compile_seconds = {}, {}, {}
    for name, estimator, quantizer in steps:
        started = time.perf_counter()
        step, state = _step(config, parallel, estimator, quantizer)
        states[name], _ = jax.block_until_ready(step(state, *batch, indices, indices))
        compiled[name] = step
        compile_seconds[name] = time.perf_counter() - started
    seconds: dict[str, list[float]] = {name: [] for name, _, _ in steps}
    rng = np.random.default_rng(config.seed)
    for i in range(config.rounds + 1):
        for name in rng.permutation(list(seconds)):
            started = time.perf_counter()
            states[name], _ = jax.block_until_ready(
                compiled[name](states[name], *batch, indices, indices)
            )
            if i > 0:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    flags = {**dataclasses.asdict(config), "out": str(config.out)}
    record = {
        **describe_run("experiments.bench_step", flags),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "parameters": _parameters(config),
        "seconds": seconds,
        "compile_seconds": compile_seconds,
    }
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(config.out, record)
    return record


def table(records: Sequence[dict[str, Any]]) -> str:
    """The Markdown table of some records, a column each: ratios to the float step of the round."""
    names = list(records[0]["seconds"])
    lines = [
        f"| step | {' | '.join(_conditions(record) for record in records)} |",
        f"| --- |{' ---: |' * len(records)}",
    ]
    for name in names:
        lines.append(f"| {name} | {' | '.join(_ratio(record, name) for record in records)} |")
    first = records[0]
    rounds = ", ".join(str(len(record["seconds"][names[0]])) for record in records)
    lines += [
        "",
        f"Time of a step / float: median [95 % interval] over n = {rounds} rounds. BinaryNet of "
        f"width {first['config']['width']:g} ({first['parameters'] / 1e6:.1f} million parameters), "
        f"{first['config']['image_size']} x {first['config']['image_size']} images, float32; "
        f"{first['hardware']}; jax {first['packages']['jax']}.",
    ]
    return "\n".join(lines)


def _conditions(record: dict[str, Any]) -> str:
    environment = "".join(f", {name}={value}" for name, value in record["environment"].items())
    return f"batch {record['config']['batch_size']}{environment}"


def _ratio(record: dict[str, Any], name: str) -> str:
    seconds = record["seconds"]
    baseline = next(iter(seconds))
    if name == baseline:
        return f"1 ({statistics.median(seconds[baseline]):.2f} s)"
    ratios = [a / b for a, b in zip(seconds[name], seconds[baseline], strict=True)]
    low, high = median_interval(ratios)
    return f"{statistics.median(ratios):.3f} [{low:.3f}, {high:.3f}]"


def _model(config: Config) -> BinaryNet:
    return BinaryNet(width=config.width, axis_name=AXIS)


def _images(config: Config) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (config.batch_size, config.image_size, config.image_size, 3)
    labels = rng.integers(0, 10, config.batch_size).astype(np.int32)
    return rng.integers(0, 256, shape).astype(np.uint8), labels


def _step(
    config: Config, parallel: Parallel, estimator: ab.Estimator, quantizer: ab.Quantizer
) -> tuple[Any, Any]:
    optimizer = make_optimizer("sgd", optax.constant_schedule(0.01), weight_decay=5e-4)
    step = make_train_step(
        _model(config),
        optimizer,
        rules=ab.Rules([(r"(.*/)?kernel", quantizer), (r".*", None)]),
        estimator=estimator,
        alpha=optax.constant_schedule(0.5),  # neither end of the ramp
        preprocessing=Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3, pad=4, flip=True),
    )
    image_shape = (config.image_size, config.image_size, 3)
    state = create_state(_model(config), optimizer, image_shape, seed=0)
    mapped = parallel.wrap(step, sharded=[False, False, False, True, True], donate=[0])
    return mapped, parallel.replicate(state)


def _parameters(config: Config) -> int:
    images = jnp.zeros((1, config.image_size, config.image_size, 3))
    variables = jax.eval_shape(
        lambda key: _model(config).init(key, images, train=False), jax.random.key(0)
    )
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def main() -> None:
    """The command line; prints the table."""
    config = tyro.cli(Config, description=__doc__, use_underscores=True)
    try:
        print(table([run(config)]))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
