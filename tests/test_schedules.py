"""Ramps: whole arrays against the closed formulas in float64."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ab_jax
from ab_jax import cosine_ramp, cubic_ramp, jump, linear_ramp, schedules, sigmoid_ramp

LAST_STEP = 2**31 - 1  # of an int32 counter


def progress(step, start, stop):
    return np.clip((step.astype(np.float64) - start) / (stop - start), 0, 1)


def logistic(x):
    return 1 / (1 + np.exp(-x))


FORMULAS = {
    cubic_ramp: lambda p: 1 - (1 - p) ** 3,
    linear_ramp: lambda p: p,
    cosine_ramp: lambda p: (1 - np.cos(np.pi * p)) / 2,
    sigmoid_ramp: lambda p: (
        (logistic(10 * (p - 0.5)) - logistic(-5)) / (logistic(5) - logistic(-5))
    ),
}
each_ramp = pytest.mark.parametrize("ramp", FORMULAS, ids=lambda ramp: ramp.__name__)
# Start and stop, in steps: from the first step on, short, one step, late, as long as counters go.
SPANS = [(0, 90_000), (100, 300), (7, 8), (1_000_000, 1_000_100), (5, LAST_STEP)]
each_span = pytest.mark.parametrize(("start", "stop"), SPANS)


def steps_around(start: int, stop: int, rng: np.random.Generator) -> np.ndarray:
    """All that matters at the ends, and 200 random steps between: always as many, in order."""
    inside = rng.integers(start, stop, size=200)
    ends = [0, 1, start - 1, start, start + 1, stop - 1, stop, stop + 1, 2 * stop, LAST_STEP]
    return np.sort(np.clip(np.concatenate([inside, ends]), 0, LAST_STEP)).astype(np.int32)


@each_ramp
@each_span
def test_ramp_follows_its_formula(rng, ramp, start, stop):
    steps = steps_around(start, stop, rng)
    wanted = FORMULAS[ramp](progress(steps, start, stop))
    schedule = ramp(start=start, stop=stop)
    for alphas in (schedule(steps), jax.jit(schedule)(steps)):
        assert alphas.dtype == jnp.float32
        # Near its ends the cosine leaves float32 few digits, hence an absolute tolerance.
        np.testing.assert_allclose(alphas, wanted, rtol=0, atol=3e-7)
        np.testing.assert_array_equal(alphas[steps <= start], 0.0)  # blend is exact at the two
        np.testing.assert_array_equal(alphas[steps >= stop], 1.0)  # ends: no tolerance there
        assert ((alphas >= 0) & (alphas <= 1)).all()
        assert (np.diff(alphas) >= -1e-7).all()


@each_ramp
def test_a_single_step_will_do(ramp):
    """A Python int, as in a training loop, or a traced scalar, as inside a step."""
    schedule = ramp(100, 300)
    jitted = jax.jit(schedule)
    for step in (0, 99, 100, 101, 250, 299, 300, LAST_STEP):
        wanted = FORMULAS[ramp](progress(np.int64(step), 100, 300))
        # An unsigned step before the start must not wrap around to the far side of the ramp.
        steps = (step, jnp.int32(step), jnp.uint32(step), np.int64(step))
        for alpha in (*map(schedule, steps), *map(jitted, steps)):
            assert (alpha.shape, alpha.dtype) == ((), jnp.float32)
            np.testing.assert_allclose(alpha, wanted, rtol=0, atol=3e-7)
            assert (alpha == 0) == (step <= 100)
            assert (alpha == 1) == (step >= 300)


@each_ramp
def test_ramps_differ_where_they_should(ramp):
    """At a quarter and at the half: no two of the formulas agree there."""
    found = [float(ramp(100, 500)(step)) for step in (200, 300)]
    wanted = {
        cubic_ramp: [0.578125, 0.875],
        linear_ramp: [0.25, 0.5],
        cosine_ramp: [0.1464466, 0.5],
        sigmoid_ramp: [0.0701037, 0.5],
    }
    np.testing.assert_allclose(found, wanted[ramp], rtol=1e-6)


@pytest.mark.parametrize("steepness", [1e-3, 1.0, 40.0, 1e4])
def test_sigmoid_of_any_steepness(steepness):
    steps = np.arange(0, 301)
    p = progress(steps, 100, 200)
    with np.errstate(over="ignore"):
        shape = [logistic(steepness * (x - 0.5)) for x in (p, 0.0, 1.0)]
    found = sigmoid_ramp(100, 200, steepness)(steps)
    np.testing.assert_allclose(
        found, (shape[0] - shape[1]) / (shape[2] - shape[1]), rtol=0, atol=2e-6
    )
    np.testing.assert_array_equal(found[steps <= 100], 0.0)
    np.testing.assert_array_equal(found[steps >= 200], 1.0)


@pytest.mark.parametrize("steepness", [0, -1.0, float("inf"), float("nan")])
def test_a_sigmoid_that_does_not_rise_is_refused(steepness):
    with pytest.raises(ValueError, match=r"steepness must be positive and finite"):
        sigmoid_ramp(0, 10, steepness)


@pytest.mark.parametrize("at", [0, 1, 100, LAST_STEP])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jitted"])
def test_jump(at, wrap):
    steps = np.unique(np.clip([0, at - 1, at, at + 1, LAST_STEP], 0, LAST_STEP)).astype(np.int32)
    for dtype in (np.int32, np.uint32):
        alphas = wrap(jump(at))(steps.astype(dtype))
        np.testing.assert_array_equal(alphas, (steps >= at).astype(np.float32), strict=True)
    assert float(wrap(jump(at))(at)) == 1.0


def test_ramps_are_plain_optax_schedules():
    """They join, and drive an optimizer's hyper-parameter, as any schedule does."""
    joined = optax.join_schedules([linear_ramp(0, 10), cubic_ramp(0, 10)], boundaries=[20])
    np.testing.assert_allclose([joined(5), joined(15), joined(25)], [0.5, 1.0, 0.875])
    optimizer = optax.scale_by_schedule(cosine_ramp(0, 2))
    state = optimizer.init(jnp.ones(()))
    scaled = []
    for _ in range(4):
        update, state = optimizer.update(jnp.ones(()), state)
        scaled.append(float(update))
    np.testing.assert_allclose(scaled, [0, 0.5, 1, 1], atol=1e-7)


@each_ramp
@pytest.mark.parametrize(("start", "stop"), [(300, 100), (300, 300), (5, -1), (0, 0)])
def test_a_ramp_that_stops_before_it_starts_names_both(ramp, start, stop):
    with pytest.raises(ValueError, match="must stop after it starts") as caught:
        ramp(start=start, stop=stop)
    message = str(caught.value)
    assert f"{ramp.__name__}(start={start}, stop={stop})" in message
    assert "Give stop > start" in message
    assert f"jump(at={start})" in message


@each_ramp
def test_a_ramp_that_starts_before_training_is_refused(ramp):
    with pytest.raises(ValueError, match=r"start=-1, stop=5.* cannot be negative. Give start >= 0"):
        ramp(start=-1, stop=5)


def test_a_jump_before_training_is_refused():
    with pytest.raises(ValueError, match=r"jump\(at=-3\).* cannot be negative. Give at >= 0"):
        jump(at=-3)


def test_every_schedule_shows_an_example_that_runs():
    examples = {
        test.name.rpartition(".")[2]: len(test.examples)
        for test in doctest.DocTestFinder(exclude_empty=True).find(schedules)
        if test.examples
    }
    assert examples.keys() == {"cubic_ramp", "linear_ramp", "cosine_ramp", "sigmoid_ramp", "jump"}
    assert all(name in ab_jax.__all__ for name in examples)
    result = doctest.testmod(schedules)
    assert result.attempted == sum(examples.values()) >= 4
    assert result.failed == 0
