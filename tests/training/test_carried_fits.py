"""Runs whose fits serve several steps: what they keep, and that they go on to the same bits."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

import ab_jax as ab
from ab_jax.data import Dataset, Images
from ab_jax.training.checkpoint import Checkpoints
from ab_jax.training.feeds import InMemory
from ab_jax.training.loop import train
from ab_jax.training.optimizers import make_optimizer
from ab_jax.training.parallel import Parallel
from ab_jax.training.records import RunDirectory
from ab_jax.training.run_settings import Training
from ab_jax.training.state import TrainState, create_state
from ab_jax.training.stopping import StoppedError
from ab_jax.training.train_step import Preprocessing

BATCH = 16
# Fits of every form: a scale, a scale and a zero point, scales and what codes follow from.
RULES = ab.Rules(
    [
        ("conv/kernel", ab.Uniform(bits=3, symmetric=False, scale="absmax")),
        ("head/kernel", ab.LeastSquaresBinary(bits=2)),
        (".*", None),
    ]
)


def run_of(training: Training, path: Path) -> dict[str, Any]:
    parallel = Parallel("pmap", tuple(jax.devices()[:2]))
    with RunDirectory(path, experiment="tests", config={"name": path.name}) as directory:
        return train(training, parallel, directory)


def last_state(training: Training, path: Path) -> TrainState:
    like = create_state(training.model, training.optimizer, (4, 4, 1), seed=0, fit_rules=RULES)
    with Checkpoints(path / "checkpoints") as checkpoints:
        return checkpoints.restore(like)


@pytest.mark.long
def test_a_run_that_is_cut_off_between_two_fits_goes_on_to_the_same_bits(
    rng: np.random.Generator,
    model: nn.Module,
    preprocessing: Preprocessing,
    make_images: Callable[..., Images],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rate = optax.constant_schedule(0.2)
    training = Training(
        model=model,
        dataset=Dataset(
            name="random",
            version="1.0.0",
            train=make_images(rng, 4 * BATCH + 3),
            validation=make_images(rng, 21),
            test=make_images(rng, 21),
            class_names=tuple("abcde"),
            mean=preprocessing.mean,
            std=preprocessing.std,
        ),
        preprocessing=preprocessing,
        rules=RULES,
        estimator=ab.alpha_blend,
        alpha=ab.cubic_ramp(0, 20),
        optimizer=make_optimizer("sgd", rate, weight_decay=1e-3),
        learning_rate=rate,
        batch_size=BATCH,
        steps=8,
        eval_every=4,
        seed=int(rng.integers(2**31)),
        refit_every=7,
    )
    record = run_of(training, tmp_path / "whole")
    state = last_state(training, tmp_path / "whole")
    assert jax.tree.structure(state.fits) == jax.tree.structure(ab.fit(state.params, RULES))

    whole = InMemory.training

    def stopping(*args: Any) -> Iterator[Any]:
        for number, batch in enumerate(whole(*args), start=args[3] + 1):
            if number == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(InMemory, "training", stopping)
        with pytest.raises(StoppedError, match="stopped at step 5"):
            run_of(training, tmp_path / "cut")
    again = run_of(training, tmp_path / "cut")
    assert again["summary"]["resumed_at"] == 5
    assert again["summary"]["test"] == record["summary"]["test"]
    jax.tree.map(np.testing.assert_array_equal, last_state(training, tmp_path / "cut"), state)
