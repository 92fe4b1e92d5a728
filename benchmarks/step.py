"""What low precision costs in training: the time of a step as a ratio to the float step.

    python -m benchmarks.step        (about ten minutes on two cores)

BinaryNet, each method's real training step, in turns (`measuring.ratios`). The float step runs
twice a round: its second row is what this measurement makes of two steps that do not differ.

On CPUs a step is compiled as `ab_jax.training.parallel` says; to see what XLA's own schedule makes
of it, set XLA_FLAGS=--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_DEFAULT.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ab_jax as ab
from ab_jax.models.binarynet import BinaryNet
from ab_jax.training.optimizers import make_optimizer
from ab_jax.training.parallel import AXIS, Parallel
from ab_jax.training.state import create_state
from ab_jax.training.train_step import Preprocessing, make_train_step
from benchmarks.measuring.benchmark_command import (
    Record,
    main,
    recorded,
    require_at_least_one,
    versions,
)
from benchmarks.measuring.ratios import (
    Seconds,
    going_on,
    in_rounds,
    markdown,
    over_rounds,
    ratio_cells,
)
from experiments.pod_costs.network_cost import network_cost
from experiments.settings.choices import choose

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
    steps: tuple[str, ...] = ()  # which of them, by name; none: all
    dtype: Literal["float32", "bfloat16"] = "float32"  # of convolutions and products
    out: Path = Path("results/bench_step/batch128.json")


@recorded("benchmarks.step")
def run(config: Config) -> Record:
    """Time the steps."""
    require_at_least_one(config, "rounds")
    known = {name: (estimator, quantizer) for name, estimator, quantizer in STEPS}
    cases, compile_seconds = {}, {}
    for name in config.steps or known:
        estimator, quantizer = choose("steps", name, known)
        started = time.perf_counter()
        cases[name] = _case(config, estimator, quantizer)
        cases[name]()
        compile_seconds[name] = time.perf_counter() - started
    found = in_rounds(cases, rounds=config.rounds, seed=config.seed)
    return {
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "parameters": _parameters(config),
        "training_flops": _training_flops(config),
        "seconds": {name: [took.wall for took in times] for name, times in found.items()},
        "compile_seconds": compile_seconds,
    }


def table(records: Sequence[Record]) -> str:
    """The Markdown table of some records, a column each: ratios to the float step of the round."""
    columns = [ratio_cells(record["seconds"], lambda s: f"{s:.2f} s") for record in records]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    first = records[0]
    caption = (
        f"Time of a step / float: {over_rounds(records)}. BinaryNet of width "
        f"{first['config']['width']:g} ({first['parameters'] / 1e6:.1f} million parameters), "
        f"{first['config']['image_size']} x {first['config']['image_size']} images, "
        f"{first['config'].get('dtype', 'float32')}; {first['hardware']}; {versions(first)}."
        f"{''.join(map(_speed, records))}"
    )
    return f"{markdown(['step', *map(_conditions, records)], rows)}\n\n{caption}"


def _conditions(record: Record) -> str:
    environment = "".join(f", {name}={value}" for name, value in record["environment"].items())
    return f"batch {record['config']['batch_size']}{environment}"


def _speed(record: Record) -> str:
    """How fast the float step is, in images and in arithmetic; older records do not tell."""
    if "training_flops" not in record:
        return ""
    batch, seconds = record["config"]["batch_size"], statistics.median(record["seconds"]["float"])
    done = batch * record["training_flops"] / seconds / 1e12
    return f" Float, batch {batch}: {batch / seconds:,.0f} images/s, {done:.3g} TFLOP/s."


def _training_flops(config: Config) -> int:
    """Of one image, by the products of its layers."""
    model = BinaryNet(width=config.width)
    return network_cost(model, (config.image_size, config.image_size, 3)).training_flops


def _model(config: Config) -> BinaryNet:
    return BinaryNet(width=config.width, dtype=config.dtype, axis_name=AXIS)


def _images(config: Config) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (config.batch_size, config.image_size, config.image_size, 3)
    labels = rng.integers(0, 10, config.batch_size).astype(np.int32)
    return rng.integers(0, 256, shape).astype(np.uint8), labels


def _case(
    config: Config, estimator: ab.Estimator, quantizer: ab.Quantizer
) -> Callable[[], Seconds]:
    # One device: the arithmetic of the weights is the same on every one.
    parallel = Parallel("pmap", (jax.devices()[0],))
    model = _model(config)
    step, optimizer = compiled_step(model, estimator, quantizer, parallel)
    batch = parallel.replicate(_images(config))
    indices = parallel.shard(np.arange(config.batch_size, dtype=np.int32))
    image_shape = (config.image_size, config.image_size, 3)
    state = parallel.replicate(create_state(model, optimizer, image_shape, seed=0))
    return going_on(lambda state: step(state, *batch, indices, indices), state)


def compiled_step(
    model: BinaryNet, estimator: ab.Estimator, quantizer: ab.Quantizer, parallel: Parallel
) -> tuple[Callable[..., Any], optax.GradientTransformation]:
    """A real training step at alpha 0.5, neither end of the ramp, and its optimizer.

    Returns:
      The step as `make_train_step` has it, which takes over the memory of its state; indices and
      positions are sharded. And the optimizer that `create_state` needs.
    """
    optimizer = make_optimizer("sgd", optax.constant_schedule(0.01), weight_decay=5e-4)
    step = make_train_step(
        model,
        optimizer,
        rules=ab.Rules([(r"(.*/)?kernel", quantizer), (r".*", None)]),
        estimator=estimator,
        alpha=optax.constant_schedule(0.5),
        preprocessing=Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3, pad=4, flip=True),
    )
    return parallel.wrap(step, sharded=[False, False, False, True, True], donate=[0]), optimizer


def _parameters(config: Config) -> int:
    images = jnp.zeros((1, config.image_size, config.image_size, 3))
    variables = jax.eval_shape(
        lambda key: _model(config).init(key, images, train=False), jax.random.key(0)
    )
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


if __name__ == "__main__":
    main(Config, run, table, __doc__)
