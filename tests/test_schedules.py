"""Ramps: whole arrays against the closed formulas in float64."""

import doctest
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ab_jax
from ab_jax import (
    cosine_ramp,
    cubic_ramp,
    jump,
    layerwise_ramp,
    linear_ramp,
    schedules,
    sigmoid_ramp,
)

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


# Steps and windows of every kind


def of_the_last_layer(start, stop):
    schedule = layerwise_ramp(["a", "b"], start, stop)
    return lambda step: schedule(step)("b")


RAMPS = {  # all that there are, as functions of a start and a stop
    **{ramp.__name__: ramp for ramp in FORMULAS},
    "steep": lambda start, stop: sigmoid_ramp(start, stop, 1e300),
    "flat": lambda start, stop: sigmoid_ramp(start, stop, 1e-300),
    "jump": lambda start, stop: jump(stop),
    "layerwise": of_the_last_layer,
}
every_ramp = pytest.mark.parametrize("ramp", RAMPS.values(), ids=RAMPS)
COUNTERS = [*(f"{u}int{bits}" for u in ("", "u") for bits in (8, 16, 32, 64)), "float32"]


@every_ramp
@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
def test_steps_of_any_width_never_wrap_around(ramp, x64):
    """0 up to the start, 1 from the stop on, for every counter, up to its own last number."""
    schedule = ramp(20, 90)
    steps = {}
    for dtype in COUNTERS:
        limits = np.finfo(dtype) if dtype == "float32" else np.iinfo(dtype)
        steps[dtype] = np.asarray([limits.min, 0, 20, 90, 91, limits.max], dtype)
    wanted = np.asarray([0, 0, 0, 1, 1, 1], np.float32)
    with jax.enable_x64(x64), jax.numpy_dtype_promotion("strict"):
        for given in steps.values():
            np.testing.assert_array_equal(schedule(given), wanted, strict=True)
        if not x64:  # JAX cuts them before a ramp sees them
            steps.pop("int64"), steps.pop("uint64")
        for found in jax.jit(lambda steps: jax.tree.map(schedule, steps))(steps).values():
            np.testing.assert_array_equal(found, wanted, strict=True)
        if not x64:
            for step, alpha in ((-(10**30), 0), (2**32 + 50, 1), (2**63, 1), (10**30, 1)):
                assert float(schedule(step)) == alpha


@every_ramp
def test_windows_beyond_a_counter(ramp):
    """Their alpha is still below 1 at the counter's end, and no step before them is 1."""
    for start, stop in ((0, 2**31), (2**31 - 2, 2**33), (2**40, 2**41), (0, 2**63 - 1)):
        schedule = ramp(start, stop)
        for dtype in (np.int8, np.uint8, np.int32, np.uint32, np.int64):
            assert (schedule(np.asarray([np.iinfo(dtype).min, 0, 1, 1, 1, 1], dtype)) <= 1e-6).all()
        first, early, *late = (start, start + (stop - start) // 4, stop, stop, stop + 1, stop + 1)
        alphas = np.asarray(schedule(np.asarray([first, early, *late], np.uint64)))
        assert (alphas[0], alphas[1] < 0.6, alphas[2:].min()) == (0, True, 1)
    halfway = linear_ramp(2**40, 2**40 + 4)(np.int64(2**40) + np.arange(5))
    np.testing.assert_array_equal(halfway, [0, 0.25, 0.5, 0.75, 1])


@every_ramp
def test_alpha_never_falls(rng, ramp):
    """Not by the last digit, from any step to the next, eager and compiled."""
    for span in (300, 90_000, LAST_STEP - 7):
        schedule = ramp(7, 7 + span)
        first = int(rng.integers(0, max(1, span - 5000)))
        steps = np.minimum(first + np.arange(6000), LAST_STEP).astype(np.int32)
        for call in (schedule, jax.jit(schedule))[: 2 if span == 90_000 else 1]:
            alphas = np.asarray(call(steps))
            assert np.diff(alphas).min() >= 0
            assert alphas.min() >= 0
            assert alphas.max() <= 1


@every_ramp
def test_a_step_that_is_nan_is_refused_or_seen(ramp):
    schedule = ramp(2, 4)
    for step in (math.nan, np.float16("nan"), jnp.asarray([1.0, math.nan], jnp.bfloat16)):
        with pytest.raises(ValueError, match="at a step that is NaN"):
            schedule(step)
    assert np.isnan(jax.jit(schedule)(math.nan))
    for step in ("3", None, 1j, jax.random.key(0)):
        with pytest.raises(TypeError, match="takes a step, an integer or a float, not"):
            schedule(step)
    found = schedule(np.asarray([-math.inf, 1.5, 4, math.inf]))
    np.testing.assert_array_equal(found, [0, 0, 1, 1])


@every_ramp
def test_windows_that_have_no_end_are_refused(ramp):
    for number in (math.nan, math.inf, -math.inf, 2**63, 10**400, np.float32("inf")):
        for window in ((0, number), (number, number)):
            with pytest.raises(
                ValueError, match=r"(start|stop|at) must be finite, and below 2\*\*"
            ):
                ramp(*window)


@pytest.mark.parametrize("ramp", [cubic_ramp, linear_ramp, cosine_ramp, sigmoid_ramp])
def test_a_window_that_float32_cannot_hold_is_refused(ramp):
    with pytest.raises(ValueError, match=r"shorter than a step can tell"):
        ramp(0, 1e-50)


@every_ramp
def test_a_window_that_is_no_number_is_refused(ramp):
    for number in ("5", None, [1, 2]):
        with pytest.raises(TypeError, match=r"(start|stop|at) must be a number of steps, not"):
            ramp(0, number)
    for number in (np.int32(6), np.float64(6), jnp.uint32(6)):
        np.testing.assert_array_equal(ramp(2, number)(np.arange(8)), ramp(2, 6)(np.arange(8)))


def test_a_window_may_end_within_a_step():
    """A share of some steps, not rounded: 1 from the first whole step that is behind it."""
    np.testing.assert_allclose(linear_ramp(0.5, 3.5)(np.arange(5)), [0, 1 / 6, 0.5, 5 / 6, 1])
    np.testing.assert_array_equal(jump(2.5)(np.arange(5)), [0, 0, 0, 1, 1])


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
    ramps = {"cubic_ramp", "linear_ramp", "cosine_ramp", "sigmoid_ramp", "layerwise_ramp"}
    assert examples.keys() == {*ramps, "jump"}
    assert all(name in ab_jax.__all__ for name in examples)
    result = doctest.testmod(schedules)
    assert result.attempted == sum(examples.values()) >= 4
    assert result.failed == 0
