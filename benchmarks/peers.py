"""ab_jax beside Qwix and AQT: time of a training step, compile time, memory, gradients.

    pip install ".[peers]"
    python -m benchmarks.peers        (about fifteen minutes on two idle cores, most of them
                                      to compile; --networks=resnet50 is half of it)

The same Linen networks with the same bits under each library (what differs, says
`benchmarks.other_libraries.libraries`), in turns (`measuring.ratios`). Float runs twice a round:
its second column is what this measurement makes of two steps that do not differ.

A step may be fast because its backward pass is wrong. So each library's gradient is compared with
its definition in float64 (`benchmarks.other_libraries.gradients`), at a small width. Where it does
not hold, a cell says "invalid" and has the time in brackets. Where a library raises, the cell says
that. docs/peers.md has the shortest code for each failure.
"""

import dataclasses
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.measuring.benchmark_command import Record, main, recorded, require_at_least_one
from benchmarks.measuring.generated_arrays import generated_images, generated_variables
from benchmarks.measuring.ratios import going_on, in_rounds
from benchmarks.other_libraries import gradients
from benchmarks.other_libraries.compared_networks import CLASSES, NETWORKS, SHORT_NETWORKS
from benchmarks.other_libraries.comparison_tables import table
from benchmarks.other_libraries.libraries import (
    FLOAT,
    LIBRARIES,
    Bits,
    is_comparable,
    peer_versions,
)
from benchmarks.other_libraries.lines_to_write import SNIPPETS, lines_to_write
from benchmarks.other_libraries.training_steps import Compiled, compile_step
from experiments.settings.choices import choose


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to time, and where to write the record."""

    networks: tuple[str, ...] = tuple(NETWORKS)
    libraries: tuple[str, ...] = tuple(LIBRARIES)
    bits: int = 8  # of the weights, and of the activations where these are quantized too
    width: float = 0.25  # multiplies the features of every network
    image_size: int = 32  # pixels
    batch_sizes: tuple[int, ...] = (16, 64)  # images
    gradient_width: float = 0.0625  # of the networks whose gradients are compared
    gradient_images: int = 8  # in a batch for that
    gradient_batches: int = 5  # to try at most, where activations are quantized
    rounds: int = 9  # measurements of each step, after a round to warm up
    seed: int = 0  # of the order in which a round runs the steps
    out: Path = Path("results/bench_peers/w8.json")


@recorded("benchmarks.peers")
def run(config: Config) -> Record:
    """Compare the gradients and time the steps."""
    c = config
    require_at_least_one(c, "rounds", "gradient_images", "gradient_batches", "batch_sizes")
    for name in c.networks:
        choose("networks", name, NETWORKS)
    for name in c.libraries:
        choose("libraries", name, LIBRARIES)
    if c.libraries[:1] != (FLOAT,):
        raise ValueError("--libraries must begin with float: the others are compared with it.")
    quantized = Bits(c.bits), Bits(c.bits, c.bits)
    return {
        "peers": peer_versions(),
        "gradients": [found for name in c.networks for found in _gradients(c, name, quantized)],
        "steps": [
            step
            for name in c.networks
            for size in c.batch_sizes
            for step in _steps(c, name, size, quantized)
        ],
        "lines": {name: lines_to_write(snippet) for name, snippet in SNIPPETS.items()},
    }


def _steps(
    c: Config, name: str, batch_size: int, quantized: tuple[Bits, ...]
) -> list[dict[str, Any]]:
    """For each library and bits what its step takes, or why there is none.

    Float, which has no bits, is compiled once.
    """
    print(f"{name}, {batch_size} images", file=sys.stderr)
    images, labels = generated_images(batch_size, c.image_size, CLASSES)
    cases = [
        (library, FLOAT if library.startswith(FLOAT) else str(bits), bits)
        for library in c.libraries
        for bits in (quantized[:1] if library.startswith(FLOAT) else quantized)
        if is_comparable(library, bits)
    ]
    found: list[dict[str, Any]] = []
    compiled: dict[int, Compiled] = {}  # by the place in both
    for i, (library, label, bits) in enumerate(cases):
        about = {"network": name, "batch_size": batch_size, "library": library, "bits": label}
        try:
            if label == FLOAT and i:  # the same program, from a state of its own
                step, state, took = compiled[0]
                compiled[i] = step, jax.tree.map(jnp.copy, state), took
            else:
                applied = LIBRARIES[library](NETWORKS[name](c.width), bits)
                alpha = gradients.ALPHA.get(library, 1.0)
                compiled[i] = compile_step(applied, images, labels, alpha)
        except Exception as error:  # whatever a library raises is what is to be told
            found.append({**about, "raises": _in_short(error)})
            continue
        found.append({**about, **compiled[i][2]})
    steps = {i: going_on(step, state) for i, (step, state, _) in compiled.items()}
    for i, times in in_rounds(steps, rounds=c.rounds, seed=c.seed).items():
        found[i]["seconds"] = [seconds.wall for seconds in times]
        found[i]["processor_seconds"] = [seconds.processor for seconds in times]
    return found


def _gradients(c: Config, name: str, quantized: tuple[Bits, ...]) -> Iterator[dict[str, Any]]:
    """For each library and bits the errors of its gradients by kernel, or why there are none."""
    model = SHORT_NETWORKS[name](c.gradient_width)
    for bits in quantized:
        for library in c.libraries:
            if library not in gradients.DEFINITIONS or not is_comparable(library, bits):
                continue
            about = {"network": name, "library": library, "bits": str(bits)}
            try:
                tried = _least_error(c, model, library, bits)
            except Exception as error:  # whatever a library raises is what is to be told
                yield {**about, "raises": _in_short(error)}
                continue
            yield {**about, **tried}


def _least_error(c: Config, model: nn.Module, library: str, bits: Bits) -> dict[str, Any]:
    """The errors of a library's gradients on the images, of a few batches, where they are least.

    An activation on a tie between two codes may fall otherwise in float64 than in the library, and
    a network of a few channels makes much of it: then the two are gradients of other networks. A
    backward pass that is wrong is wrong on all images.
    """
    definition = gradients.DEFINITIONS[library]
    applied = LIBRARIES[library](model, bits)
    tries = []
    for seed in range(1 if bits.activations is None else c.gradient_batches):
        images, labels = generated_images(c.gradient_images, c.image_size, CLASSES, seed)
        variables, images = gradients.led_by_positive(
            generated_variables(applied.init, images), images
        )
        given = gradients.kernel_gradients(applied, variables, images, labels, definition.alpha)
        defined = gradients.defined_gradients(model, variables, images, labels, definition, bits)
        errors = gradients.relative_errors(given, defined)
        tries.append({"errors": errors, "fault": gradients.fault(given, errors), "images": seed})
        if all(error == 1 or error < 1e-3 for error in errors.values()):
            break  # no tie fell otherwise; dead kernels stay dead
    return min(tries, key=lambda tried: statistics.median(tried["errors"].values()))


def _in_short(error: Exception) -> str:
    """The kind of an error and how its message begins, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


if __name__ == "__main__":
    main(Config, run, table, __doc__)
