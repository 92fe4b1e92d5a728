"""Training with quantized activations: their own ramp, shared ranges, frozen readings."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ab_jax as ab
from ab_jax.activations import ActivationQuantizer
from ab_jax.data import Images
from ab_jax.linen import RANGES, Model, WithQuantizedInputs
from ab_jax.products import ActivationRules, CutOffWarning
from ab_jax.training.checkpoint import Checkpoints
from ab_jax.training.evaluation import Evaluator
from ab_jax.training.optimizers import make_optimizer
from ab_jax.training.parallel import AXIS, Parallel
from ab_jax.training.state import TrainState, create_state
from ab_jax.training.train_step import Preprocessing, make_train_step
from ab_jax.training.watching import warn_of_cut_off

BATCH, SHAPE = 16, (4, 4, 1)
OPTIMIZER = make_optimizer("sgd", optax.constant_schedule(0.1))
RULES = ActivationRules(
    [
        ("conv", ActivationQuantizer(bits=4, signed=True, momentum=0.5)),
        ("head", ActivationQuantizer(bits=3, percentile=90.0, momentum=0.5, signed=False)),
    ]
)


@pytest.fixture(scope="module")
def quantized(model: nn.Module) -> WithQuantizedInputs:
    return WithQuantizedInputs(model, RULES, AXIS)


def train(
    model: Model,
    parallel: Parallel,
    images: Images,
    batches: np.ndarray,
    rules: ab.Rules,
    preprocessing: Preprocessing,
    activation_alpha: float,
) -> TrainState:
    step = make_train_step(
        model,
        OPTIMIZER,
        rules=rules,
        estimator=ab.alpha_blend,
        alpha=optax.constant_schedule(0.5),
        activation_alpha=optax.constant_schedule(activation_alpha),
        preprocessing=preprocessing,
    )
    compiled = parallel.wrap(step, sharded=[False, False, False, True, True])
    placed = parallel.replicate((images.images, images.labels))
    positions = parallel.shard(np.arange(BATCH, dtype=np.int32))
    state = parallel.replicate(create_state(model, OPTIMIZER, SHAPE, seed=1))
    for indices in batches:
        state, _ = compiled(state, *placed, parallel.shard(indices), positions)
    return parallel.unreplicate(state)


@pytest.fixture
def batches(rng: np.random.Generator, images: Images) -> np.ndarray:
    return np.stack([rng.permutation(len(images))[:BATCH] for _ in range(3)]).astype(np.int32)


@pytest.mark.long
def test_all_devices_keep_the_ranges_of_the_whole_batch(
    devices: list[jax.Device],
    quantized: WithQuantizedInputs,
    images: Images,
    batches: np.ndarray,
    rules: ab.Rules,
    preprocessing: Preprocessing,
) -> None:
    """At activation alpha 0, where the last bit of a sum decides no code."""
    states = [
        train(quantized, parallel, images, batches, rules, preprocessing, 0.0)
        for parallel in (
            Parallel("pmap", tuple(devices[:1])),
            Parallel("pmap", tuple(devices[:8])),
            Parallel("shard_map", tuple(devices[:4])),
        )
    ]
    ranges = [
        {layer: float(of["kernel"]) for layer, of in state.model_state[RANGES].items()}
        for state in states
    ]
    assert set(ranges[0]) == {"conv", "head"}
    assert min(ranges[0].values()) > 0.1
    for other in ranges[1:]:
        assert other == pytest.approx(ranges[0], rel=1e-3)  # a bisection may end one step apart
    expected, kept = None, preprocessing
    for step, indices in enumerate(batches):
        key = jax.random.fold_in(jax.random.wrap_key_data(states[0].key), step)
        positions = jnp.arange(BATCH, dtype=jnp.int32)
        x = kept.normalize(kept.augment(key, jnp.asarray(images.images[indices]), positions))
        largest = float(jnp.abs(x).max())
        expected = largest if expected is None else 0.5 * expected + 0.5 * largest
    assert ranges[0]["conv"] == pytest.approx(expected, rel=1e-5)


def test_the_activations_follow_a_ramp_of_their_own(
    devices: list[jax.Device],
    model: nn.Module,
    quantized: WithQuantizedInputs,
    images: Images,
    batches: np.ndarray,
    rules: ab.Rules,
    preprocessing: Preprocessing,
) -> None:
    parallel = Parallel("pmap", tuple(devices[:1]))

    def params(model: Model, activation_alpha: float) -> Any:
        state = train(model, parallel, images, batches[:1], rules, preprocessing, activation_alpha)
        return jax.tree.leaves(state.params)

    plain, off, on = params(model, 0.5), params(quantized, 0.0), params(quantized, 1.0)
    for a, b in zip(plain, off, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    assert max(float(np.abs(a - b).max()) for a, b in zip(off, on, strict=True)) > 1e-3


def test_readings_leave_the_ranges_as_they_are(
    devices: list[jax.Device],
    quantized: WithQuantizedInputs,
    images: Images,
    batches: np.ndarray,
    rules: ab.Rules,
    preprocessing: Preprocessing,
) -> None:
    parallel = Parallel("pmap", tuple(devices[:2]))
    state = train(quantized, parallel, images, batches, rules, preprocessing, 1.0)
    evaluator = Evaluator(quantized, preprocessing, parallel, BATCH)
    placed = evaluator.place(images)
    fresh = evaluator.recalibrate(state.params, state.model_state, 1.0, placed, 2)
    assert set(fresh) == {"batch_stats", RANGES}
    assert fresh[RANGES] == state.model_state[RANGES]
    assert fresh["batch_stats"]["norm"]["mean"].shape == (3,)

    # The reading is of quantized inputs: the network written with the ranges as constants agrees.
    fixed = ActivationRules(
        [
            (name, dataclasses.replace(quantizer, limit=float(limit), percentile=None))
            for (name, quantizer), limit in zip(
                RULES.rules, jax.tree.leaves(state.model_state[RANGES]), strict=True
            )
        ]
    )
    stats = {"batch_stats": state.model_state["batch_stats"]}
    constant = dataclasses.replace(quantized, rules=fixed)
    stats[RANGES] = state.model_state[RANGES]
    one = Evaluator(constant, preprocessing, parallel, BATCH)
    expected = one.read(state.params, stats, 1.0, one.place(images))
    got = evaluator.read(state.params, state.model_state, 1.0, placed)
    assert got.loss == pytest.approx(expected.loss, rel=1e-4)

    # At alpha 0 it is of float ones. (A mean over 37 images: how far the two lie apart is chance.)
    plain = evaluator.read(state.params, state.model_state, 0.0, placed)
    unquantized = Evaluator(quantized.model, preprocessing, parallel, BATCH)
    stats = {"batch_stats": state.model_state["batch_stats"]}
    expected = unquantized.read(state.params, stats, 0.0, unquantized.place(images))
    assert plain.loss == pytest.approx(expected.loss, rel=1e-6)
    assert got.loss != plain.loss


def test_a_step_counts_the_inputs_that_are_not_finite_and_keeps_their_range(
    devices: list[jax.Device],
    quantized: WithQuantizedInputs,
    images: Images,
    rules: ab.Rules,
    preprocessing: Preprocessing,
) -> None:
    """The state stays of the structure that checkpoints have."""
    parallel = Parallel("shard_map", tuple(devices[:2]))
    step = make_train_step(
        quantized,
        OPTIMIZER,
        rules=rules,
        estimator=ab.alpha_blend,
        alpha=optax.constant_schedule(0.0),
        preprocessing=preprocessing,
    )
    compiled = parallel.wrap(step, sharded=[False, False, False, True, True])
    placed = parallel.replicate((images.images, images.labels))
    indices = parallel.shard(np.arange(BATCH, dtype=np.int32))
    start = create_state(quantized, OPTIMIZER, SHAPE, seed=1)
    kernel = jnp.full_like(start.params["conv"]["kernel"], jnp.inf)
    broken = dataclasses.replace(start, params={**start.params, "conv": {"kernel": kernel}})
    for state, count in ((start, 0), (broken, 1)):
        after, metrics = compiled(parallel.replicate(state), *placed, indices, indices)
        after, metrics = parallel.unreplicate((after, metrics))
        assert int(metrics["not_finite_inputs"]) == count
        assert metrics["cut_off"].shape == (2,)
        assert np.all(metrics["cut_off"] == 0), "the head follows a ReLU"
        assert jax.tree.structure(after) == jax.tree.structure(start)
        ranges = after.model_state[RANGES]
        assert float(ranges["conv"]["kernel"]) > 0
        assert (float(ranges["head"]["kernel"]) > 0) == (count == 0)


def test_a_network_starts_from_one_with_or_without_ranges(
    rng: np.random.Generator, model: nn.Module, quantized: WithQuantizedInputs, tmp_path: Path
) -> None:
    def used(model: Model) -> TrainState:
        state = create_state(model, OPTIMIZER, SHAPE, seed=3)
        draw: Callable[[Any], Any] = lambda x: jnp.asarray(rng.random(x.shape), x.dtype)
        return dataclasses.replace(
            state,
            params=jax.tree.map(draw, state.params),
            model_state=jax.tree.map(draw, state.model_state),
        )

    stored = {"plain": used(model), "quantized": used(quantized)}
    for name, state in stored.items():
        with Checkpoints(tmp_path / name) as checkpoints:
            checkpoints.save(state)
    for source in stored:
        for target in (model, quantized):
            like = create_state(target, OPTIMIZER, SHAPE, seed=4)
            with Checkpoints(tmp_path / source) as checkpoints:
                got = checkpoints.restore_network(like)
            jax.tree.map(np.testing.assert_array_equal, got.params, stored[source].params)
            expected = {"batch_stats": stored[source].model_state["batch_stats"]}
            if target is quantized:
                both = stored[source] if source == "quantized" else like
                expected[RANGES] = both.model_state[RANGES]
            jax.tree.map(np.testing.assert_array_equal, got.model_state, expected)


def test_a_run_of_older_code_goes_on_with_its_ranges(
    rng: np.random.Generator, quantized: WithQuantizedInputs, tmp_path: Path
) -> None:
    """Its checkpoints name a range by the layer, and hold none that are fixed."""
    fixed = ActivationQuantizer(bits=8, limit=6.0, signed=False)
    model = dataclasses.replace(quantized, rules=ActivationRules([RULES.rules[0], ("head", fixed)]))
    like = create_state(model, OPTIMIZER, SHAPE, seed=3)
    limit = jnp.float32(rng.uniform(1, 2))
    old = dataclasses.replace(
        like,
        params=jax.tree.map(lambda x: x + 1, like.params),
        model_state={**like.model_state, RANGES: {"conv_input": limit}},
    )
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(old)
    wanted = {"conv": {"kernel": limit}, "head": {"kernel": jnp.float32(6)}}
    with Checkpoints(tmp_path) as checkpoints:
        for restored in (checkpoints.restore(like), checkpoints.restore_network(like)):
            assert restored.model_state[RANGES] == wanted
            jax.tree.map(np.testing.assert_array_equal, restored.params, old.params)
            assert jax.tree.structure(restored) == jax.tree.structure(like)


def test_a_run_names_what_its_unsigned_ranges_cut_off(rng: np.random.Generator) -> None:
    ranges = {"block10": {"a": {"kernel": 0}}, "block2": {"b#1": {"kernel": 0}, "b": {"kernel": 0}}}
    warn_of_cut_off(ranges, jnp.asarray([0.0, 0.0005, 0.0]))
    with pytest.warns(CutOffWarning, match=r"block2/b#1/kernel cuts off 25\.0%.*signed=True"):
        warn_of_cut_off(ranges, jnp.asarray([0.0, 0.0, 0.25]))
