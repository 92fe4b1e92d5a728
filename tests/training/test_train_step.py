"""The training step: its gradient on any number of devices against one written out in plain JAX."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array

import ab_jax as ab
from ab_jax.data import Images, augment
from ab_jax.training.parallel import Mode, Parallel
from ab_jax.training.state import TrainState, create_state
from ab_jax.training.train_step import Preprocessing, make_train_step

BATCH = 16
LEARNING_RATE, MOMENTUM = 0.1, 0.9
ESTIMATORS = {"ab": ab.alpha_blend, "ste": ab.straight_through, "float": ab.full_precision}
ALPHA = optax.linear_schedule(0.25, 1.0, transition_steps=3)


def gradient_in_state() -> optax.GradientTransformation:
    """Passes gradients on; its state is the last one, so that a test can look at it."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, *_: (grads, grads)
    )


OPTIMIZER = optax.chain(gradient_in_state(), optax.sgd(LEARNING_RATE, MOMENTUM))


def initial_state(
    variables: dict[str, Any], optimizer: optax.GradientTransformation, seed: int = 0
) -> TrainState:
    params = jax.tree.map(jnp.asarray, variables["params"])
    return TrainState(
        step=jnp.int32(0),
        params=params,
        model_state={k: v for k, v in variables.items() if k != "params"},
        opt_state=optimizer.init(params),
        key=jax.random.key_data(jax.random.key(seed)),
    )


def run_steps(
    step: Callable[..., Any],
    parallel: Parallel,
    state: TrainState,
    images: Images,
    batches: np.ndarray,
) -> list[tuple[TrainState, dict[str, Array]]]:
    """State and metrics after each step, the batches given as indices [steps, batch]."""
    compiled = parallel.wrap(step, sharded=[False, False, False, True, True])
    placed = parallel.replicate((images.images, images.labels))
    positions = parallel.shard(np.arange(batches.shape[1], dtype=np.int32))
    on_devices, results = parallel.replicate(state), []
    for indices in batches:
        on_devices, metrics = compiled(on_devices, *placed, parallel.shard(indices), positions)
        results.append(parallel.unreplicate((on_devices, metrics)))
    return results


def one_device(devices: list[jax.Device]) -> Parallel:
    return Parallel("pmap", tuple(devices[:1]))


def draw_batches(rng: np.random.Generator, steps: int, n: int) -> np.ndarray:
    return np.stack([rng.permutation(n)[:BATCH] for _ in range(steps)]).astype(np.int32)


def assert_close(actual: Any, expected: Any, relative: float) -> None:
    """Equal up to a share of the largest number in the whole tree."""
    largest = max(float(np.max(np.abs(leaf))) for leaf in jax.tree.leaves(expected))
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=relative * largest),
        actual,
        expected,
    )


# One step and three, against plain JAX


@dataclasses.dataclass(frozen=True)
class Expected:
    """After each step of the reference: gradient, parameters, statistics, loss and accuracy."""

    grads: Any
    params: Any
    stats: Any
    loss: float
    accuracy: float


@pytest.fixture
def reference(forward: Callable[..., Any], binarize: Callable[..., Any]) -> Callable[..., Any]:
    """SGD with momentum on one device: neither axis nor rules, the blend written out."""

    def effective(params: Any, method: str, alpha: float) -> Any:
        def replace(path: Any, w: Array, q: Array) -> Array:
            if path[-1].key != "kernel" or method == "float":
                return w
            q = jax.lax.stop_gradient(q)
            if method == "ste":
                return w + jax.lax.stop_gradient(q - w)
            return (1 - alpha) * w + alpha * q

        return jax.tree.map_with_path(replace, params, binarize(params))

    def loss_fn(
        params: Any, images: Array, labels: Array, method: str, alpha: float
    ) -> tuple[Array, Any]:
        logits, measured = forward(effective(params, method, alpha), images)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
        return -jnp.mean(chosen), (logits, measured)

    gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True), static_argnums=3)

    def run(
        variables: Any, images: Images, batches: np.ndarray, method: str, seed: int
    ) -> list[Expected]:
        params, stats = variables["params"], variables["batch_stats"]["norm"]
        trace = jax.tree.map(np.zeros_like, params)
        results = []
        for step, indices in enumerate(batches):
            key = jax.random.fold_in(jax.random.key(seed), step)
            seen = augment(key, images.images[indices], jnp.arange(BATCH), pad=1, flip=True)
            labels = images.labels[indices]
            alpha = 0.25 + 0.25 * step
            (loss, (logits, measured)), grads = gradient(params, seen, labels, method, alpha)
            trace = jax.tree.map(lambda t, g: MOMENTUM * t + g, trace, grads)
            params = jax.tree.map(lambda w, t: w - LEARNING_RATE * t, params, trace)
            stats = {name: 0.9 * stats[name] + 0.1 * measured[name] for name in stats}
            accuracy = float(np.mean(np.argmax(logits, axis=1) == labels))
            results.append(Expected(grads, params, {"norm": stats}, float(loss), accuracy))
        return results

    return run


@pytest.mark.parametrize(
    ("mode", "method"),
    [
        ("pmap", "ab"),
        pytest.param("pmap", "ste", marks=pytest.mark.long),
        pytest.param("shard_map", "ab", marks=pytest.mark.long),
        pytest.param("shard_map", "ste", marks=pytest.mark.long),
    ],
)
def test_any_number_of_devices_trains_as_one_without_an_axis(
    rng: np.random.Generator,
    devices: list[jax.Device],
    model: nn.Module,
    rules: ab.Rules,
    preprocessing: Preprocessing,
    variables: dict[str, Any],
    images: Images,
    reference: Callable[..., list[Expected]],
    mode: Mode,
    method: str,
) -> None:
    seed = int(rng.integers(2**31))
    batches = draw_batches(rng, 3, len(images))
    expected = reference(variables, images, batches, method, seed)
    step = make_train_step(
        model,
        OPTIMIZER,
        rules=rules,
        estimator=ESTIMATORS[method],
        alpha=ALPHA,
        preprocessing=preprocessing,
    )
    for n in (1, 2, 4, 8):
        parallel = Parallel(mode, tuple(devices[:n]))
        state = initial_state(variables, OPTIMIZER, seed)
        results = run_steps(step, parallel, state, images, batches)
        # Sums of 256 float32 terms in different orders, divided by a deviation: about 1e-6. A
        # gradient that is summed, or statistics of a device's own share, are off by far more.
        assert_close(results[0][0].opt_state[0], expected[0].grads, 1e-5)
        for (state, metrics), after in zip(results, expected, strict=True):
            assert_close(state.params, after.params, 1e-4)
            assert_close(state.model_state["batch_stats"], after.stats, 1e-5)
            assert float(metrics["loss"]) == pytest.approx(after.loss, rel=1e-4)
            assert float(metrics["accuracy"]) == pytest.approx(after.accuracy)
        assert int(state.step) == 3
        np.testing.assert_array_equal(jax.random.key_data(jax.random.key(seed)), results[-1][0].key)
    moved = jax.tree.map(
        lambda a, b: np.max(np.abs(a - b)), expected[2].params, variables["params"]
    )
    assert min(jax.tree.leaves(moved)) > 1e-3  # all of it was trained


@pytest.mark.long
@pytest.mark.parametrize("mode", ["pmap", "shard_map"])
def test_a_vmapped_seed_trains_as_its_single_run(
    rng: np.random.Generator,
    devices: list[jax.Device],
    model: nn.Module,
    rules: ab.Rules,
    preprocessing: Preprocessing,
    images: Images,
    mode: Mode,
) -> None:
    seeds = rng.choice(2**31, 3, replace=False)
    batches = np.stack([draw_batches(rng, 3, len(images)) for _ in seeds], axis=-1)
    states = [create_state(model, OPTIMIZER, (4, 4, 1), int(seed)) for seed in seeds]
    step = make_train_step(
        model,
        OPTIMIZER,
        rules=rules,
        estimator=ab.alpha_blend,
        alpha=ALPHA,
        preprocessing=preprocessing,
    )
    # Seeds are the last axis of the indices, so that devices still have their shares of the first.
    together = jax.vmap(step, in_axes=(0, None, None, -1, None))
    parallel = Parallel(mode, tuple(devices[:2]))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    (*_, (after, metrics)) = run_steps(together, parallel, stacked, images, batches)
    for i, state in enumerate(states):
        (*_, (alone, measured)) = run_steps(step, parallel, state, images, batches[..., i])
        mine = jax.tree.map(lambda leaf, i=i: leaf[i], after)
        # As above, sums in other orders; another seed is off by far more.
        assert_close(mine.params, alone.params, 1e-4)
        assert_close(mine.model_state, alone.model_state, 1e-5)
        assert_close(mine.opt_state, alone.opt_state, 1e-4)
        np.testing.assert_array_equal(mine.key, alone.key)
        assert float(metrics["loss"][i]) == pytest.approx(float(measured["loss"]), rel=1e-4)
        others = after.params["conv"]["kernel"][i - 1] - alone.params["conv"]["kernel"]
        assert np.abs(others).max() > 1e-2


def test_float_training_equals_plain_jax_and_never_quantizes(
    rng: np.random.Generator,
    devices: list[jax.Device],
    model: nn.Module,
    preprocessing: Preprocessing,
    variables: dict[str, Any],
    images: Images,
    reference: Callable[..., list[Expected]],
) -> None:
    class Untouchable(ab.Binary):
        def quantize(self, w: Any) -> ab.Quantized:
            raise AssertionError("a float network quantized a weight")

    batches = draw_batches(rng, 1, len(images))
    step = make_train_step(
        model,
        OPTIMIZER,
        rules=ab.Rules([(r"(.*/)?kernel", Untouchable()), (r".*", None)]),
        estimator=ab.full_precision,
        alpha=ALPHA,
        preprocessing=preprocessing,
    )
    state = initial_state(variables, OPTIMIZER)
    ((state, _),) = run_steps(step, one_device(devices), state, images, batches)
    (expected,) = reference(variables, images, batches, "float", 0)
    assert_close(state.opt_state[0], expected.grads, 1e-5)


# Augmentation


@pytest.mark.parametrize("n", [2, 8])
def test_augmentation_is_the_same_whatever_the_device_count(
    rng: np.random.Generator,
    key: Array,
    devices: list[jax.Device],
    preprocessing: Preprocessing,
    images: Images,
    n: int,
) -> None:
    parallel = Parallel("pmap", tuple(devices[:n]))
    batch = images.images[draw_batches(rng, 1, len(images))[0]]
    positions = np.arange(BATCH, dtype=np.int32)
    whole = np.asarray(preprocessing.augment(key, batch, positions))
    shares = jax.pmap(lambda *share: preprocessing.augment(key, *share), devices=parallel.devices)(
        parallel.shard(batch), parallel.shard(positions)
    )
    np.testing.assert_array_equal(np.concatenate(shares), whole)
    assert np.any(whole != batch, axis=(1, 2, 3)).sum() > BATCH // 2


def test_every_step_augments_anew(
    rng: np.random.Generator,
    devices: list[jax.Device],
    model: nn.Module,
    rules: ab.Rules,
    preprocessing: Preprocessing,
    variables: dict[str, Any],
    images: Images,
) -> None:
    def losses(preprocessing: Preprocessing) -> list[float]:
        step = make_train_step(
            model,
            optax.set_to_zero(),  # so that nothing but the images can change the loss
            rules=rules,
            estimator=ab.straight_through,
            alpha=optax.constant_schedule(1.0),
            preprocessing=preprocessing,
        )
        state = initial_state(variables, optax.set_to_zero())
        batches = np.repeat(draw_batches(rng, 1, len(images)), 3, axis=0)
        results = run_steps(step, one_device(devices), state, images, batches)
        return [float(metrics["loss"]) for _, metrics in results]

    assert len(set(losses(preprocessing))) == 3
    assert len(set(losses(dataclasses.replace(preprocessing, pad=0, flip=False)))) == 1


# Loss, alpha, clipping


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_label_smoothing_mixes_in_all_classes_alike(
    rng: np.random.Generator,
    devices: list[jax.Device],
    model: nn.Module,
    rules: ab.Rules,
    preprocessing: Preprocessing,
    variables: dict[str, Any],
    images: Images,
    forward: Callable[..., Any],
    smoothing: float,
) -> None:
    step = make_train_step(
        model,
        optax.set_to_zero(),
        rules=rules,
        estimator=ab.full_precision,
        alpha=ALPHA,
        preprocessing=dataclasses.replace(preprocessing, pad=0, flip=False),
        label_smoothing=smoothing,
    )
    state = initial_state(variables, optax.set_to_zero())
    (indices,) = batches = draw_batches(rng, 1, len(images))
    ((_, metrics),) = run_steps(step, one_device(devices), state, images, batches)
    logits, _ = forward(variables["params"], images.images[indices])
    log_p = np.asarray(logits - jax.nn.logsumexp(logits, axis=1, keepdims=True))
    chosen = log_p[np.arange(BATCH), images.labels[indices]]
    expected = -(1 - smoothing) * chosen.mean() - smoothing * log_p.mean()
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-4)


def test_alpha_is_the_schedule_and_stops_the_gradient_when_it_is_1(
    rng: np.random.Generator,
    devices: list[jax.Device],
    model: nn.Module,
    rules: ab.Rules,
    preprocessing: Preprocessing,
    variables: dict[str, Any],
    images: Images,
) -> None:
    # What the weights have gathered in momentum moves them on; the loss no longer does.
    ramp, decay = ab.cubic_ramp(1, 3), 0.01
    optimizer = optax.chain(
        gradient_in_state(),
        optax.add_decayed_weights(decay),
        optax.sgd(LEARNING_RATE, MOMENTUM),
    )
    step = make_train_step(
        model,
        optimizer,
        rules=rules,
        estimator=ab.alpha_blend,
        alpha=ramp,
        preprocessing=preprocessing,
    )
    state = initial_state(variables, optimizer)
    batches = draw_batches(rng, 5, len(images))
    results = run_steps(step, one_device(devices), state, images, batches)
    assert [float(metrics["alpha"]) for _, metrics in results] == [0, 0, 0.875, 1, 1]
    for (before, _), (after, metrics) in itertools.pairwise(results):
        grads = after.opt_state[0]
        assert np.any(grads["head"]["bias"] != 0)
        for layer in ("conv", "head"):
            old, new = before.params[layer]["kernel"], after.params[layer]["kernel"]
            if metrics["alpha"] < 1:
                assert np.any(grads[layer]["kernel"] != 0)
                continue
            np.testing.assert_array_equal(grads[layer]["kernel"], 0)
            trace = before.opt_state[2][0].trace[layer]["kernel"]
            expected = old - LEARNING_RATE * (MOMENTUM * trace + decay * old)
            np.testing.assert_allclose(new, expected, rtol=0, atol=1e-6)


def test_latent_limit_clips_quantized_weights_alone(
    rng: np.random.Generator,
    devices: list[jax.Device],
    model: nn.Module,
    preprocessing: Preprocessing,
    variables: dict[str, Any],
    images: Images,
) -> None:
    limit = 0.25
    step = make_train_step(
        model,
        optax.set_to_zero(),
        rules=ab.Rules([(r"conv/kernel", ab.Binary()), (r".*", None)]),
        estimator=ab.alpha_blend,
        alpha=ALPHA,
        preprocessing=preprocessing,
        latent_limit=limit,
    )
    state = initial_state(variables, optax.set_to_zero())
    batches = draw_batches(rng, 1, len(images))
    ((after, _),) = run_steps(step, one_device(devices), state, images, batches)
    before = variables["params"]
    assert np.abs(before["conv"]["kernel"]).max() > limit
    np.testing.assert_array_equal(
        after.params["conv"]["kernel"], np.clip(before["conv"]["kernel"], -limit, limit)
    )
    unclipped = {**after.params, "conv": before["conv"]}
    jax.tree.map(np.testing.assert_array_equal, unclipped, before)


@pytest.mark.parametrize("mode", ["pmap", "shard_map"])
def test_scales_are_fitted_anew_when_it_is_time_and_at_alpha_1(
    rng: np.random.Generator,
    devices: list[jax.Device],
    model: nn.Module,
    preprocessing: Preprocessing,
    variables: dict[str, Any],
    images: Images,
    mode: Any,
) -> None:
    rules = ab.Rules([(r"(conv|head)/kernel", ab.Uniform(bits=3, scale="absmax")), (r".*", None)])
    step = make_train_step(
        model,
        OPTIMIZER,
        rules=rules,
        estimator=ab.soft_straight_through,  # whose weights still move at alpha 1
        alpha=optax.linear_schedule(0.25, 1.0, transition_steps=6),
        preprocessing=preprocessing,
        refit_every=2,
    )
    state = initial_state(variables, OPTIMIZER)
    # Of other weights: the first step fits.
    others = jax.tree.map(lambda w: 2 * w, state.params)
    state = dataclasses.replace(state, fits=ab.fit(others, rules))
    batches = draw_batches(rng, 9, len(images))
    results = run_steps(step, Parallel(mode, tuple(devices[:2])), state, images, batches)
    states = [state, *(after for after, _ in results)]
    for number, (before, (after, metrics)) in enumerate(zip(states, results, strict=False)):
        refits = number % 2 == 0 or metrics["alpha"] == 1
        wanted = ab.fit(before.params, rules) if refits else before.fits
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), after.fits, wanted)
        if not refits:
            own = ab.fit(before.params, rules)["conv/kernel"]
            assert np.any(after.fits["conv/kernel"].fitted != own.fitted)

    # The loss sees what is carried: of the weights themselves it is the loss without any.
    at_1 = dataclasses.replace(state, step=jnp.int32(1))
    losses = [
        run_steps(
            step, one_device(devices), dataclasses.replace(at_1, fits=fits), images, batches[:1]
        )
        for fits in (None, ab.fit(state.params, rules), state.fits)
    ]
    plain, same, other = (float(metrics["loss"]) for ((_, metrics),) in losses)
    assert plain == same != other


# The state


def test_the_seed_decides_weights_and_augmentation(model: nn.Module) -> None:
    first, same, other = (create_state(model, OPTIMIZER, (4, 4, 1), s) for s in (3, 3, 4))
    jax.tree.map(np.testing.assert_array_equal, first, same)
    assert np.any(first.params["conv"]["kernel"] != other.params["conv"]["kernel"])
    assert np.any(first.key != other.key)
    assert first.key.dtype == np.uint32
    assert first.step.dtype == np.int32
    assert int(first.step) == 0
    assert set(first.model_state) == {"batch_stats"}
