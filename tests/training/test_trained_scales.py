"""Training with learned step sizes: a step by hand, and runs that go on or start from others."""

import dataclasses
import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ab_jax as ab
from ab_jax.data import Dataset, Images
from ab_jax.training.checkpoint import Checkpoints
from ab_jax.training.feeds import InMemory
from ab_jax.training.finite import FiniteCheck, NonFiniteLossError
from ab_jax.training.loop import train
from ab_jax.training.optimizers import OPTIMIZERS, make_optimizer
from ab_jax.training.parallel import Parallel
from ab_jax.training.records import RunDirectory
from ab_jax.training.run_settings import Training
from ab_jax.training.state import Trained, TrainState, create_state
from ab_jax.training.stopping import StoppedError
from ab_jax.training.train_step import Preprocessing, make_train_step

BATCH, RATE = 16, 0.1
HIGHEST = {"conv/kernel": 1, "head/kernel": 3}
RULES = ab.Rules(
    [
        ("conv/kernel", ab.Uniform(bits=2)),
        ("head/kernel", ab.Uniform(bits=3, axis=None)),
        (".*", None),
    ]
)


def run_of(training: Training, path: Path, **changes: Any) -> dict[str, Any]:
    """Train on two devices in a directory; returns the record."""
    parallel = Parallel("pmap", tuple(jax.devices()[:2]))
    with RunDirectory(path, experiment="tests", config={"name": path.name}) as directory:
        return train(dataclasses.replace(training, **changes), parallel, directory)


def last_state(training: Training, path: Path) -> TrainState:
    like = create_state(training.model, training.optimizer, (4, 4, 1), seed=0, scale_rules=RULES)
    with Checkpoints(path / "checkpoints") as checkpoints:
        return checkpoints.restore(like)


def bits(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()) for leaf in leaves]


# One step


@pytest.mark.parametrize(("mode", "count"), [("pmap", 1), ("shard_map", 2)])
def test_a_step_moves_weights_and_scales_as_by_hand(
    rng: np.random.Generator,
    devices: list[jax.Device],
    model: nn.Module,
    preprocessing: Preprocessing,
    images: Images,
    variables: dict[str, Any],
    forward: Callable[..., Any],
    mode: Any,
    count: int,
) -> None:
    params = variables["params"]
    scales = {
        path: np.asarray(scale * rng.uniform(0.3, 0.5))  # so that some weights are clipped
        for path, scale in ab.initial_scales(params, RULES).items()
    }
    optimizer = optax.sgd(RATE)
    state = TrainState(
        step=jnp.int32(0),
        params=params,
        model_state={"batch_stats": variables["batch_stats"]},
        opt_state=optimizer.init(Trained(params, scales)),
        key=jax.random.key_data(jax.random.key(0)),
        scales=scales,
    )
    step = make_train_step(
        model,
        optimizer,
        rules=RULES,
        estimator=ab.learned_step_size,
        alpha=optax.constant_schedule(1.0),
        preprocessing=Preprocessing(mean=preprocessing.mean, std=preprocessing.std),
    )
    parallel = Parallel(mode, tuple(devices[:count]))
    chosen = rng.permutation(len(images.labels))[:BATCH].astype(np.int32)
    after, metrics = parallel.wrap(step, sharded=[False, False, False, True, True])(
        parallel.replicate(state),
        *parallel.replicate((images.images, images.labels)),
        *parallel.shard((chosen, np.arange(BATCH, dtype=np.int32))),
    )
    after, metrics = parallel.unreplicate((after, metrics))

    # By hand: the gradient of the loss at the quantized weights, then the paper's equations.
    def loss_at(params: Any) -> jax.Array:
        logits, _ = forward(params, images.images[chosen])
        labels = images.labels[chosen]
        return -jnp.mean(jax.nn.log_softmax(logits)[np.arange(BATCH), labels])

    values, relative = jax.tree.map(np.copy, params), {}
    for path, highest in HIGHEST.items():
        layer = path.partition("/")[0]
        relative[path] = params[layer]["kernel"] / scales[path]
        codes = np.round(np.clip(relative[path], -highest, highest))
        values[layer]["kernel"] = codes * scales[path]
    loss, grads = jax.jit(jax.value_and_grad(loss_at))(values)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert metrics["finite"].shape == (len(jax.tree.leaves(params)) + 2,)
    for path, highest in HIGHEST.items():
        layer, x, s = path.partition("/")[0], relative[path], scales[path]
        grad = np.asarray(grads[layer]["kernel"], np.float64)
        inside = np.abs(x) < highest
        assert 0 < inside.mean() < 1
        slope = np.where(inside, np.round(x) - x, np.sign(x) * highest)
        axes = tuple(i for i, size in enumerate(s.shape) if size == 1)
        to_s = np.sum(grad * slope, axes, keepdims=True)
        to_s /= math.sqrt(x.size // s.size * highest)
        # Whatever the draw: a scale falls to half of what it was at most.
        wanted = np.maximum(s - RATE * to_s, s / 2)
        np.testing.assert_allclose(after.scales[path], wanted, rtol=1e-5, atol=1e-6)
        assert np.any(np.abs(RATE * to_s) > 1e-4 * s)
        weights = params[layer]["kernel"] - RATE * np.where(inside, grad, 0)
        np.testing.assert_allclose(after.params[layer]["kernel"], weights, rtol=1e-5, atol=1e-6)


def test_weight_decay_is_on_kernels_alone(rng: np.random.Generator) -> None:
    params = {"kernel": jnp.float32(rng.normal(size=(2, 3))), "bias": jnp.ones(3)}
    rules = ab.Rules([("kernel", ab.Ternary()), (".*", None)])
    trained = Trained(params, ab.initial_scales(params, rules))
    nothing = jax.tree.map(jnp.zeros_like, trained)
    for name in OPTIMIZERS:
        optimizer = make_optimizer(name, optax.constant_schedule(0.5), weight_decay=0.25)
        updates, _ = optimizer.update(nothing, optimizer.init(trained), trained)
        np.testing.assert_allclose(updates.params["kernel"], -0.125 * params["kernel"], rtol=1e-6)
        assert not np.any(updates.params["bias"])
        assert not np.any(updates.scales["kernel"])


def test_a_scale_that_is_not_finite_is_named(tmp_path: Path) -> None:
    check = FiniteCheck(learning_rate=lambda step: 0.1, last_checkpoint=lambda: None)
    scales = {"conv/kernel": jnp.float32([[np.nan]])}
    state = TrainState(jnp.int32(3), {"conv": {"kernel": jnp.ones(2)}}, {}, (), None, scales)
    with pytest.raises(NonFiniteLossError, match="scales/conv/kernel is not finite after its upd"):
        check.network(state, 1.0)


# Runs


@pytest.fixture(scope="module")
def training(
    request: pytest.FixtureRequest,
    model: nn.Module,
    preprocessing: Preprocessing,
    make_images: Callable[..., Images],
) -> Training:
    rng = np.random.default_rng([request.config.getoption("seed"), 2])
    dataset = Dataset(
        name="random",
        version="1.0.0",
        train=make_images(rng, 4 * BATCH + 3),
        validation=make_images(rng, 21),
        test=make_images(rng, 21),
        class_names=tuple("abcde"),
        mean=preprocessing.mean,
        std=preprocessing.std,
    )
    rate = optax.constant_schedule(0.2)
    return Training(
        model=model,
        dataset=dataset,
        preprocessing=preprocessing,
        rules=RULES,
        estimator=ab.learned_step_size,
        alpha=optax.constant_schedule(1.0),
        optimizer=make_optimizer("sgd", rate, weight_decay=1e-3, accumulate=2),
        learning_rate=rate,
        batch_size=BATCH,
        steps=8,
        eval_every=4,
        seed=int(rng.integers(2**31)),
        accumulate=2,
        watch="head/kernel",
    )


@pytest.mark.long
def test_a_run_moves_its_scales_and_goes_on_to_the_same_bits(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = run_of(training, tmp_path / "whole")
    state = last_state(training, tmp_path / "whole")
    first = create_state(
        training.model, training.optimizer, (4, 4, 1), training.seed, scale_rules=RULES
    )
    for path, scale in first.scales.items():
        assert np.all(state.scales[path] != scale)
        assert np.all(state.scales[path] > 0)
    for part in ("validation", "test"):
        of = record["summary"][part]
        assert of["blended"] == of["quantized"]
    assert all(line["blended_loss"] == line["quantized_loss"] for line in record["metrics"])
    # The histogram is in units of the learned scale: weights lie on their levels.
    (frame, _) = record["summary"]["histograms"]["frames"]
    edges = np.asarray(record["summary"]["histograms"]["edges"])
    middles = ((edges[:-1] + edges[1:]) / 2)[np.asarray(frame["counts"]) > 0]
    np.testing.assert_allclose(middles, np.round(middles), atol=1e-6)

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
    assert bits(last_state(training, tmp_path / "cut")) == bits(state)

    # Another method cannot go on from it, and says why.
    like = create_state(training.model, training.optimizer, (4, 4, 1), seed=0)
    with Checkpoints(tmp_path / "whole" / "checkpoints") as checkpoints:
        with pytest.raises(ValueError, match=r"scales/conv/kernel is .* there and absent in the"):
            checkpoints.restore(like)
        # It can start from its weights.
        assert bits(checkpoints.restore_network(like).params) == bits(state.params)


def test_scales_are_those_of_the_weights_that_a_run_starts_from(
    training: Training, tmp_path: Path
) -> None:
    source = create_state(training.model, training.optimizer, (4, 4, 1), training.seed + 1)
    with Checkpoints(tmp_path / "float" / "checkpoints") as checkpoints:
        checkpoints.save(source)
        assert "scales" not in checkpoints.network()
    resting = make_optimizer("sgd", optax.constant_schedule(0.0))
    run_of(training, tmp_path / "lsq", init_from=tmp_path / "float", optimizer=resting, steps=1)
    with Checkpoints(tmp_path / "lsq" / "checkpoints") as checkpoints:
        network = checkpoints.network()
    assert bits(network["params"]) == bits(jax.tree.map(np.asarray, source.params))
    wanted = jax.tree.map(np.asarray, ab.initial_scales(source.params, RULES))
    assert bits(network["scales"]) == bits(wanted)
