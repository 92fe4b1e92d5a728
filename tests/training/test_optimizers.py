"""Optimizers against their update rules written out, the learning rate against its formula."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ab_jax.training.optimizers import OPTIMIZERS, make_optimizer, warmup_cosine
from ab_jax.training.state import Trained

RATE = 0.1


def draw_tree(rng: np.random.Generator) -> Any:
    """Parameters or gradients of two layers; `kernel_scale` only looks like a kernel."""
    shapes = {
        "conv": {"kernel": (3, 2), "bias": (2,)},
        "norm": {"scale": (2,), "kernel_scale": (2,)},
    }
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def run(optimizer: optax.GradientTransformation, params: Any, gradients: list[Any]) -> list[Any]:
    """The parameters after each update."""
    state, results = optimizer.init(params), []
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        results.append(params)
    return results


def assert_close(actual: Any, expected: Any, atol: float = 1e-6) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol), actual, expected
    )


def decay_of(weight_decay: float) -> Any:
    """The decay of each leaf of `draw_tree`."""
    return {
        "conv": {"kernel": weight_decay, "bias": 0.0},
        "norm": {"scale": 0.0, "kernel_scale": 0.0},
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_moves_kernels_alone(rng: np.random.Generator, name: str) -> None:
    params = draw_tree(rng)
    still = jax.tree.map(jnp.zeros_like, params)
    optimizer = make_optimizer(name, optax.constant_schedule(RATE), weight_decay=0.5)
    (after,) = run(optimizer, params, [still])
    expected = jax.tree.map(lambda w, decay: w * (1 - RATE * decay), params, decay_of(0.5))
    assert_close(after, expected)


def test_sgd_is_momentum_over_the_gradient_with_its_decay(rng: np.random.Generator) -> None:
    params, gradients = draw_tree(rng), [draw_tree(rng) for _ in range(4)]
    rates = [0.1, 0.05, 0.2, 0.1]
    optimizer = make_optimizer(
        "sgd", lambda count: jnp.asarray(rates)[count], momentum=0.8, weight_decay=0.3
    )
    w, trace = params, jax.tree.map(jnp.zeros_like, params)
    for after, gradient, rate in zip(
        run(optimizer, params, gradients), gradients, rates, strict=True
    ):
        trace = jax.tree.map(
            lambda t, g, v, decay: 0.8 * t + g + decay * v, trace, gradient, w, decay_of(0.3)
        )
        w = jax.tree.map(lambda v, t, rate=rate: v - rate * t, w, trace)
        assert_close(after, w)


def test_adamw_decays_beside_the_normalized_gradient(rng: np.random.Generator) -> None:
    params, gradients = draw_tree(rng), [draw_tree(rng) for _ in range(3)]
    optimizer = make_optimizer(
        "adamw", optax.constant_schedule(RATE), momentum=0.7, weight_decay=0.3
    )
    w = jax.tree.map(np.float64, params)
    first = second = jax.tree.map(np.zeros_like, w)
    for t, after in enumerate(run(optimizer, params, gradients), start=1):
        gradient = jax.tree.map(np.float64, gradients[t - 1])
        first = jax.tree.map(lambda m, g: 0.7 * m + 0.3 * g, first, gradient)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, gradient)
        w = jax.tree.map(
            lambda x, m, v, decay, t=t: (
                x
                - RATE * (m / (1 - 0.7**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
                - RATE * decay * x
            ),
            *(w, first, second, decay_of(0.3)),
        )
        # Optax takes `1 - 0.999**t` in float32, where four digits of it are left. Its square root
        # changes an update by up to 5e-5 of itself, and these are hardly longer than RATE.
        assert_close(after, w, atol=t * RATE * 1e-4)


@pytest.mark.parametrize("factor", [0.5, 4.0])
def test_the_gradient_is_clipped_to_its_global_norm(
    rng: np.random.Generator, factor: float
) -> None:
    params, gradient = draw_tree(rng), draw_tree(rng)
    norm = math.sqrt(sum(float(np.sum(np.square(g))) for g in jax.tree.leaves(gradient)))
    optimizer = make_optimizer(
        "sgd",
        optax.constant_schedule(1.0),
        momentum=0.0,
        weight_decay=0.3,  # not part of what is clipped
        clip_norm=norm / factor,
    )
    (after,) = run(optimizer, params, [gradient])
    expected = jax.tree.map(
        lambda w, g, decay: w - g / max(1, factor) - decay * w, params, gradient, decay_of(0.3)
    )
    assert_close(after, expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_accumulated_gradients_are_one_update_of_their_mean(
    rng: np.random.Generator, name: str
) -> None:
    params, gradients = draw_tree(rng), [draw_tree(rng) for _ in range(6)]
    settings: Any = {"momentum": 0.9, "weight_decay": 0.1, "clip_norm": 1.0}
    rate = optax.linear_schedule(0.2, 0.1, transition_steps=2)  # counts updates, not batches
    every = run(make_optimizer(name, rate, **settings, accumulate=3), params, gradients)
    means = [jax.tree.map(lambda *g: sum(g) / 3, *gradients[start : start + 3]) for start in (0, 3)]
    first, second = run(make_optimizer(name, rate, **settings), params, means)
    for after in every[:2]:
        jax.tree.map(np.testing.assert_array_equal, after, params)
    assert_close(every[2], first)
    assert_close(every[5], second)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "lion"}, r"Unknown optimizer 'lion'\. Known: adamw, sgd"),
        ({"momentum": 1.0}, r"momentum=1\.0 must lie in \[0, 1\)"),
        ({"momentum": -0.1}, r"momentum=-0\.1 must lie in \[0, 1\)"),
        ({"weight_decay": -1e-4}, r"weight_decay=-0\.0001 must not be negative"),
        ({"clip_norm": 0.0}, r"clip_norm=0\.0 must be positive, or None"),
        ({"accumulate": 0}, r"accumulate=0 must be at least 1 batch"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_optimizer(
            **{"name": "sgd", "learning_rate": optax.constant_schedule(RATE), **settings}
        )


# The learning rate


@pytest.mark.parametrize("final", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_learning_rate_rises_in_a_line_and_falls_along_a_cosine(warmup: int, final: float) -> None:
    peak, total = 0.3, 40
    expected = []
    for step in range(total + 5):
        if step < warmup:
            expected.append(peak * step / warmup)
        else:
            part = min(1, (step - warmup) / (total - warmup))
            cosine = (1 + math.cos(math.pi * part)) / 2
            expected.append(peak * (final + (1 - final) * cosine))
    schedule = warmup_cosine(peak, warmup, total, final)
    steps = jnp.arange(total + 5)
    for rates in ([schedule(step) for step in steps], jax.jit(jax.vmap(schedule))(steps)):
        np.testing.assert_allclose(np.asarray(rates), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 1, 10), r"learning_rate=0\.0: the learning rate must be positive"),
        ((-0.1, 1, 10), r"learning_rate=-0\.1: the learning rate must be positive"),
        ((0.1, 10, 10), r"warm-up of 10 steps does not fit into 10 steps"),
        ((0.1, -1, 10), r"warm-up of -1 steps does not fit into 10 steps"),
        ((0.1, 1, 10, -0.1), r"final_rate=-0\.1 must lie in \[0, 1\]"),
        ((0.1, 1, 10, 1.1), r"final_rate=1\.1 must lie in \[0, 1\]"),
    ],
)
def test_a_learning_rate_that_cannot_be_is_refused(
    arguments: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        warmup_cosine(*arguments)


# Relative updates


def sizes_of(params: Any) -> Any:
    """r of each leaf of `draw_tree`, by hand and in float64."""
    kernel = np.float64(params["conv"]["kernel"])
    ones = jax.tree.map(lambda w: np.ones(w.shape), params)
    ones["conv"]["kernel"] = np.sqrt((kernel**2).mean(0, keepdims=True)) + 1e-8
    return ones


def test_relative_sgd_is_sgd_in_other_coordinates(rng: np.random.Generator) -> None:
    params, gradients = draw_tree(rng), [draw_tree(rng) for _ in range(4)]
    r, decay = sizes_of(params), decay_of(0.3)
    optimizer = make_optimizer(
        "sgd", optax.constant_schedule(RATE), momentum=0.8, weight_decay=0.3, relative=True
    )
    u = jax.tree.map(lambda w, r: np.float64(w) / r, params, r)
    trace = jax.tree.map(np.zeros_like, u)
    for after, gradient in zip(run(optimizer, params, gradients), gradients, strict=True):
        of_u = jax.tree.map(lambda g, r: np.float64(g) * r, gradient, r)
        trace = jax.tree.map(lambda t, g, x, d: 0.8 * t + g + d * x, trace, of_u, u, decay)
        u = jax.tree.map(lambda x, t: x - RATE * t, u, trace)
        assert_close(after, jax.tree.map(np.multiply, u, r))


def test_relative_adamw_is_adamw_in_other_coordinates(rng: np.random.Generator) -> None:
    params, gradients = draw_tree(rng), [draw_tree(rng) for _ in range(4)]
    r, decay = sizes_of(params), decay_of(0.3)
    optimizer = make_optimizer(
        "adamw", optax.constant_schedule(RATE), momentum=0.7, weight_decay=0.3, relative=True
    )
    u = jax.tree.map(lambda w, r: np.float64(w) / r, params, r)
    first = second = jax.tree.map(np.zeros_like, u)
    for t, after in enumerate(run(optimizer, params, gradients), start=1):
        of_u = jax.tree.map(lambda g, r: np.float64(g) * r, gradients[t - 1], r)
        first = jax.tree.map(lambda m, g: 0.7 * m + 0.3 * g, first, of_u)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, of_u)
        u = jax.tree.map(
            lambda x, m, v, d, t=t: (
                x - RATE * (m / (1 - 0.7**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) - RATE * d * x
            ),
            *(u, first, second, decay),
        )
        assert_close(after, jax.tree.map(np.multiply, u, r), atol=t * RATE * 1e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_relative_decay_is_a_share_of_the_weight_whatever_its_size(
    rng: np.random.Generator, name: str
) -> None:
    params = jax.tree.map(lambda w: 100 * w, draw_tree(rng))
    still = jax.tree.map(jnp.zeros_like, params)
    optimizer = make_optimizer(name, optax.constant_schedule(RATE), weight_decay=0.5, relative=True)
    (after,) = run(optimizer, params, [still])
    expected = jax.tree.map(lambda w, decay: w * (1 - RATE * decay), params, decay_of(0.5))
    assert_close(after, expected, atol=1e-4)


def test_relative_scales_move_in_parts_of_what_they_were(rng: np.random.Generator) -> None:
    params = draw_tree(rng)
    scales = {"conv/kernel": jnp.asarray([[0.01, 4.0]], jnp.float32)}
    optimizer = make_optimizer("adamw", optax.constant_schedule(RATE), relative=True, accumulate=2)
    trained = Trained(params, scales)
    state = optimizer.init(trained)
    for _ in range(2):
        gradient = jax.tree.map(jnp.ones_like, trained)
        updates, state = optimizer.update(gradient, state, trained)
    # Adam's first step is its rate: of each scale, a tenth.
    np.testing.assert_allclose(updates.scales["conv/kernel"], [[-0.001, -0.4]], rtol=1e-3)
    np.testing.assert_allclose(updates.params["conv"]["bias"], -RATE, rtol=1e-3)


def test_relative_updates_want_the_parameters(rng: np.random.Generator) -> None:
    params = draw_tree(rng)
    optimizer = make_optimizer("sgd", optax.constant_schedule(RATE), relative=True)
    with pytest.raises(ValueError, match="relative_updates needs the parameters"):
        optimizer.update(params, optimizer.init(params))
