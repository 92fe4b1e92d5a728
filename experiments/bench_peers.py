"""ab_jax beside Qwix and AQT: time of a training step, compile time, memory, gradients.

    pip install ".[peers]"
    python -m experiments.bench_peers        (about fifteen minutes on two idle cores, most of them
                                              to compile; --networks=resnet50 is half of it)

The same Linen networks with the same bits under each library (`experiments.peers.libraries` says
what differs), all in one process: in every round each step runs once, in an order drawn anew, so
that neither a slower minute of the machine nor what a neighbour leaves in the caches falls on one
more than on another. Ratios are taken within a round; the table gives the median over the rounds
with its 95 % interval. Float runs twice a round: its second column is what this measurement makes
of two steps that do not differ.

A step may be fast because its backward pass is wrong. So each library's gradient is compared with
its definition in float64 (`experiments.peers.gradients`), at a small width. Where it does not hold,
a cell says "invalid" and has the time in brackets. Where a library raises, the cell says that.
docs/peers.md has the shortest code for each failure.
"""

import dataclasses
import importlib.metadata
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import tyro

from ab_jax.training.records import describe_run, write_json
from experiments.choices import choose
from experiments.peers import gradients, timing
from experiments.peers.libraries import LIBRARIES, Bits, is_comparable
from experiments.peers.lines import SNIPPETS, lines_to_write
from experiments.peers.networks import CLASSES, NETWORKS, SHORT_NETWORKS
from experiments.peers.steps import generated_images, generated_variables
from experiments.peers.tables import table

PEERS = ("qwix", "aqtp")


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


def run(config: Config) -> dict[str, Any]:
    """Compare the gradients, time the steps, write the record and return it."""
    c = config
    if min(c.rounds, c.gradient_images, c.gradient_batches, *c.batch_sizes) < 1:
        raise ValueError(
            f"--rounds={c.rounds}, --gradient_images={c.gradient_images}, "
            f"--gradient_batches={c.gradient_batches} and --batch_sizes={c.batch_sizes} must be "
            f"at least 1."
        )
    for name in c.networks:
        choose("networks", name, NETWORKS)
    for name in c.libraries:
        choose("libraries", name, LIBRARIES)
    if c.libraries[:1] != ("float",):
        raise ValueError("--libraries must begin with float: the others are compared with it.")
    quantized = Bits(c.bits), Bits(c.bits, c.bits)
    found = [found for name in c.networks for found in _gradients(c, name, quantized)]
    steps = []
    for name in c.networks:
        for size in c.batch_sizes:
            print(f"{name}, {size} images", file=sys.stderr)
            images, labels = generated_images(size, c.image_size, CLASSES)
            model = NETWORKS[name](c.width)
            timed = timing.time_steps(
                model, c.libraries, quantized, images, labels, c.rounds, c.seed
            )
            steps += [{"network": name, "batch_size": size, **one} for one in timed]
    record = {
        **describe_run("experiments.bench_peers", {**dataclasses.asdict(c), "out": str(c.out)}),
        "peers": {name: importlib.metadata.version(name) for name in PEERS},
        "gradients": found,
        "steps": steps,
        "lines": {name: lines_to_write(snippet) for name, snippet in SNIPPETS.items()},
    }
    c.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(c.out, record)
    return record


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
                yield {**about, "raises": timing.in_short(error)}
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
        variables, images = gradients.led_by_positive(generated_variables(applied, images), images)
        given = gradients.kernel_gradients(applied, variables, images, labels, definition.alpha)
        defined = gradients.defined_gradients(model, variables, images, labels, definition, bits)
        errors = gradients.relative_errors(given, defined)
        tries.append({"errors": errors, "fault": gradients.fault(given, errors), "images": seed})
        if all(error == 1 or error < 1e-3 for error in errors.values()):
            break  # no tie fell otherwise; dead kernels stay dead
    return min(tries, key=lambda tried: statistics.median(tried["errors"].values()))


def main() -> None:
    """The command line; prints the tables."""
    config = tyro.cli(Config, description=__doc__, use_underscores=True)
    try:
        print(table([run(config)]))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
