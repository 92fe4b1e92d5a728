"""Accuracy after equal training under ab_jax, Qwix and AQT: a small network on handwritten digits.

    pip install ".[peers]"
    python -m benchmarks.peers_accuracy        (about six minutes on two idle cores)

BinaryNet at an eighth of its width on scikit-learn's digits, weights of 2 bits by default, where
libraries can differ at all. Each seed trains a float network first; from it every library goes on
for the same number of steps, in the same order of images, by SGD with momentum along a cosine. Each
library's peak rate is chosen on validation images with a seed that the table does not have; the
test images are read once, by the network as the library quantizes it.

AQT trains as it is, its convolutions without a gradient, and mended (docs/peers.md).
"""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import ab_jax as ab
from ab_jax.data.dataset import Images
from ab_jax.data.load import load
from ab_jax.models.binarynet import BinaryNet
from ab_jax.training.optimizers import warmup_cosine
from benchmarks.measuring.benchmark_command import Record, main, recorded, versions
from benchmarks.measuring.ratios import markdown
from benchmarks.other_libraries.libraries import (
    FLOAT,
    LIBRARIES,
    Bits,
    Library,
    Variables,
    by_ab,
    peer_versions,
)
from benchmarks.other_libraries.training_steps import first_state, sgd_step
from experiments.reporting.paired_statistics import difference_cell, mean_cell

CASES: dict[str, Library] = {
    FLOAT: LIBRARIES[FLOAT],
    "ab_jax, AB": LIBRARIES["ab_jax, AB"],
    "ab_jax, AB, least squares": by_ab(ab.alpha_blend, "least_squares"),
    "ab_jax, STE": LIBRARIES["ab_jax, STE"],
    "Qwix": LIBRARIES["Qwix"],
    "AQT": LIBRARIES["AQT"],
    "AQT, mended": LIBRARIES["AQT, mended"],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to train, and where to write the record."""

    bits: int = 2  # of the weights
    width: float = 0.125  # of BinaryNet
    batch_size: int = 64  # images
    start_epochs: int = 10  # of the float network that every library starts from
    start_rate: float = 0.05  # peak learning rate of that
    epochs: int = 20  # of each library
    rates: tuple[float, ...] = (0.0125, 0.05, 0.2, 0.8)  # peak learning rates that are tried
    ramp_stop: float = 0.9  # where AB's cubic ramp ends, in parts of the run
    seeds: tuple[int, ...] = (0, 1, 2)
    trial_seed: int = 100  # with which the rates are tried
    out: Path = Path("results/compare_peers/digits_w2.json")


class Trainer:
    """A network under one of `CASES`, its steps compiled once for all rates and seeds."""

    def __init__(self, config: Config, name: str) -> None:
        applied = CASES[name](BinaryNet(width=config.width), Bits(config.bits))
        self.config, self.blends = config, name.startswith("ab_jax, AB")
        self.step = jax.jit(sgd_step(applied))

        @jax.jit
        def correct(variables: Variables, images: Array, labels: Array) -> Array:
            logits, _ = applied.apply(variables, images, False, 1.0)
            return jnp.sum((jnp.argmax(logits, axis=-1) == labels).astype(jnp.int32))

        self.correct = correct

    def train(
        self, variables: Variables, images: Images, epochs: int, rate: float, seed: int
    ) -> Variables:
        """The variables after so many epochs."""
        config = self.config
        per_epoch = len(images) // config.batch_size
        steps = epochs * per_epoch
        numbers = np.arange(steps, dtype=np.int32)
        rates = np.asarray(warmup_cosine(rate, per_epoch, steps)(numbers))
        alphas = np.ones(steps, np.float32)
        if self.blends:
            alphas = np.asarray(ab.cubic_ramp(0, round(config.ramp_stop * steps))(numbers))
        state = first_state(variables)
        rng = np.random.default_rng(seed)
        for number in range(steps):
            if number % per_epoch == 0:
                order = rng.permutation(len(images))
            first = number % per_epoch * config.batch_size
            batch = images[order[first : first + config.batch_size]]
            given = {"rate": rates[number], "alpha": alphas[number]}
            state, _ = self.step(state, normalized(batch), batch.labels, **given)
        return state[0]

    def accuracy(self, variables: Variables, images: Images) -> float:
        """Share of the images that the quantized network names rightly."""
        return float(self.correct(variables, normalized(images), images.labels)) / len(images)


def normalized(images: Images) -> np.ndarray:
    """Digits as the network takes them, float32 around 0."""
    return (images.images.astype(np.float32) - 78) / 96  # their mean and deviation


@recorded("benchmarks.peers_accuracy")
def run(config: Config) -> Record:
    """Train everything."""
    c = config
    if not c.seeds or not c.rates or c.trial_seed in c.seeds:
        raise ValueError(
            f"--seeds={c.seeds} and --rates={c.rates} must not be empty, and --trial_seed="
            f"{c.trial_seed} must be none of the seeds: rates are chosen with another one."
        )
    data = load("digits")
    init = jax.jit(functools.partial(BinaryNet(width=c.width).init, train=True))
    example = normalized(data.train[:1])
    floating = Trainer(c, FLOAT)
    # With weights alone quantized no library adds variables of its own.
    starts = {
        seed: floating.train(
            init(jax.random.key(seed), example), data.train, c.start_epochs, c.start_rate, seed
        )
        for seed in (c.trial_seed, *c.seeds)
    }

    def trained(trainer: Trainer, rate: float, seed: int) -> Variables:
        return trainer.train(starts[seed], data.train, c.epochs, rate, seed)

    found = {}
    for name in CASES:
        print(name, file=sys.stderr)
        trainer = floating if name == FLOAT else Trainer(c, name)
        trials = {
            rate: trainer.accuracy(trained(trainer, rate, c.trial_seed), data.validation)
            for rate in c.rates
        }
        best = max(trials, key=lambda rate: trials[rate])
        test = {seed: trainer.accuracy(trained(trainer, best, seed), data.test) for seed in c.seeds}
        found[name] = {
            "trials": [[rate, accuracy] for rate, accuracy in trials.items()],
            "rate": best,
            "test": [[seed, accuracy] for seed, accuracy in test.items()],
        }
    return {"peers": peer_versions(), "accuracy": found}


def table(records: Sequence[Record]) -> str:
    """The Markdown table of records: test accuracy by library, and its difference to float."""
    rows = []
    for record in records:
        accuracy = {
            name: {seed: 100 * value for seed, value in one["test"]}
            for name, one in record["accuracy"].items()
        }
        n = len(record["config"]["seeds"])
        for name, by_seed in accuracy.items():
            bits = FLOAT if name == FLOAT else f"{record['config']['bits']} bits"
            rate = f"{record['accuracy'][name]['rate']:g}"
            difference = "–" if name == FLOAT else difference_cell(by_seed, accuracy[FLOAT])
            rows.append([bits, name, rate, mean_cell(list(by_seed.values()), n), difference])
    first = records[0]
    config = first["config"]
    caption = (
        f"Mean ± sample standard deviation over n = {len(config['seeds'])} seeds, 400 test digits; "
        f"differences paired by seed, with their 95 % interval. BinaryNet of width "
        f"{config['width']:g}, {config['epochs']} epochs from a float network of "
        f"{config['start_epochs']}; rates chosen among "
        f"{', '.join(f'{rate:g}' for rate in config['rates'])} on validation images. Weights: the "
        f"largest magnitude of a channel sets its scale, or least squares. "
        f"{versions(first, first['peers'])}."
    )
    head = ["weights", "library", "rate", "test accuracy (%)", "minus float"]
    return f"{markdown(head, rows, left=2)}\n\n{caption}"


if __name__ == "__main__":
    main(Config, run, table, __doc__)
