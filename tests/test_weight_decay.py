"""Weight decay that follows the gradient: against AdamW by hand, and at both ends bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ab_jax as ab

INT4 = ab.Uniform(bits=4, scale="absmax")
RULES = ab.Rules([(".*kernel", INT4), (".*", None)])
RATE, DECAY = 0.01, 0.3
adamw = functools.partial(optax.adamw, weight_decay=DECAY)


@pytest.fixture
def params(rng):
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        {"a": {"kernel": (6, 5), "bias": (5,)}, "b": {"kernel": (5, 3)}},
        is_leaf=lambda node: isinstance(node, tuple),
    )


@pytest.fixture
def inputs(rng):
    return jnp.asarray(rng.normal(size=(16, 6)), jnp.float32)


def loss(params, inputs, alpha):
    seen = ab.blend(params, RULES, alpha)
    hidden = jnp.tanh(inputs @ seen["a"]["kernel"] + seen["a"]["bias"][None])
    return jnp.mean((hidden @ seen["b"]["kernel"] - 1) ** 2)


def trained(optimizer, params, inputs, alpha, steps, state=None, first=0):
    """The parameters after so many jitted steps of AB, and the optimizer's state."""

    @jax.jit
    def step(params, state, count):
        gradients = jax.grad(loss)(params, inputs, alpha(count))
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params) if state is None else state
    for count in range(first, first + steps):
        params, state = step(params, state, jnp.asarray(count))
    return params, state


def kernels(params):
    return {name: np.asarray(layer["kernel"]) for name, layer in params.items()}


def test_at_alpha_1_no_quantized_parameter_moves_and_without_it_they_do(params, inputs):
    alpha = ab.jump(0)
    with_it = ab.decay_with_gradient(adamw(RATE), RULES, alpha)
    found, _ = trained(with_it, params, inputs, alpha, 20)
    plain, _ = trained(adamw(RATE), params, inputs, alpha, 20)
    for name, w in kernels(params).items():
        np.testing.assert_array_equal(kernels(found)[name], w)
        # The decay alone, since no gradient is left.
        shrunk = w * (1 - RATE * DECAY) ** 20
        np.testing.assert_allclose(kernels(plain)[name], shrunk, rtol=1e-5)
    # What no rule quantizes is trained and decays as ever.
    assert (np.asarray(found["a"]["bias"]) != np.asarray(params["a"]["bias"])).all()


def test_before_the_ramp_it_is_the_optimizer_itself_bit_for_bit(params, inputs):
    alpha = ab.cubic_ramp(start=25, stop=40)
    with_it = ab.decay_with_gradient(adamw(RATE), RULES, alpha)
    found, state = trained(with_it, params, inputs, alpha, 25)
    plain, own = trained(adamw(RATE), params, inputs, alpha, 25)
    jax.tree.map(np.testing.assert_array_equal, found, plain)
    jax.tree.map(np.testing.assert_array_equal, state.inner_state, own)
    assert int(state.count) == 25
    later, _ = trained(with_it, found, inputs, alpha, 5, state, first=25)
    other, _ = trained(adamw(RATE), plain, inputs, alpha, 5, own, first=25)
    assert (kernels(later)["a"] != kernels(other)["a"]).any()


def test_after_a_ramp_they_rest_once_momentum_has_died_down(params, inputs):
    alpha = ab.cubic_ramp(start=5, stop=40)
    moved = {}
    for name, optimizer in {
        "with": ab.decay_with_gradient(adamw(RATE), RULES, alpha),
        "without": adamw(RATE),
    }.items():
        late, state = trained(optimizer, params, inputs, alpha, 400)
        later, _ = trained(optimizer, late, inputs, alpha, 100, state, first=400)
        moved[name] = [
            np.abs(a - b).max()
            for a, b in zip(kernels(late).values(), kernels(later).values(), strict=True)
        ]
        for one, other in zip(kernels(late).values(), kernels(later).values(), strict=True):
            # All of a block shrink alike: one half way between two codes may tip by rounding.
            tipped = np.asarray(INT4.quantize(one).codes) != np.asarray(INT4.quantize(other).codes)
            assert tipped.sum() <= 1
    assert moved["with"] == [0, 0]
    assert min(moved["without"]) > 1e-2


def by_hand(params, gradients, decays, b1=0.9, b2=0.999, eps=1e-8):
    """AdamW in NumPy and float64, with a decay for each leaf and step."""
    leaves, structure = jax.tree.flatten(params)
    w = [np.asarray(leaf, np.float64) for leaf in leaves]
    m, v = [0 * x for x in w], [0 * x for x in w]
    for t, (gradient, decay) in enumerate(zip(gradients, decays, strict=True), 1):
        for i, (g, d) in enumerate(zip(jax.tree.leaves(gradient), decay, strict=True)):
            g = np.asarray(g, np.float64)
            m[i], v[i] = b1 * m[i] + (1 - b1) * g, b2 * v[i] + (1 - b2) * g * g
            step = m[i] / (1 - b1**t) / (np.sqrt(v[i] / (1 - b2**t)) + eps)
            w[i] = w[i] - RATE * (step + d * w[i])
    return jax.tree.unflatten(structure, w)


def updated(optimizer, params, gradients):
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def drawn(rng, params, steps):
    return [
        jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)
        for _ in range(steps)
    ]


@pytest.mark.parametrize(
    "factor", [None, lambda alpha: jnp.minimum(1, 4 * (1 - alpha))], ids=["ab", "compensated"]
)
def test_the_decay_has_the_factor_of_the_gradient(rng, params, factor):
    """Leaves are a/bias, a/kernel, b/kernel; the gradients are drawn, and scaled by nobody."""
    alpha = ab.linear_ramp(start=2, stop=10)
    options = {} if factor is None else {"factor": factor}
    optimizer = ab.decay_with_gradient(adamw(RATE), RULES, alpha, **options)
    gradients = drawn(rng, params, 12)
    share = np.clip(1 - (np.arange(12) - 2) / 8, 0, 1)
    share = share if factor is None else np.minimum(1, 4 * share)
    decays = [(DECAY, DECAY * s, DECAY * s) for s in share]
    found, wanted = updated(optimizer, params, gradients), by_hand(params, gradients, decays)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=5e-5, atol=3e-6), found, wanted)


def test_layers_with_ramps_of_their_own_decay_by_these(rng, params):
    alpha = ab.layerwise_ramp(["b/.*", "a/.*"], 0, 8, ramp=ab.linear_ramp)
    optimizer = ab.decay_with_gradient(adamw(RATE), RULES, alpha)
    gradients = drawn(rng, params, 10)
    steps = np.arange(10)
    of_b, of_a = np.clip(1 - steps / 4, 0, 1), np.clip(1 - (steps - 4) / 4, 0, 1)
    decays = [(DECAY, DECAY * a, DECAY * b) for a, b in zip(of_a, of_b, strict=True)]
    found, wanted = updated(optimizer, params, gradients), by_hand(params, gradients, decays)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=5e-5, atol=3e-6), found, wanted)


def test_masks_and_schedules_of_the_decay_and_decay_within_the_gradient(rng, params):
    """L2 of SGD with momentum: added to the gradient, by a schedule, on one kernel alone."""
    alpha = ab.linear_ramp(start=0, stop=4)
    decay = optax.add_decayed_weights(
        optax.linear_schedule(0.5, 0.0, 10),
        mask=lambda tree: jax.tree.map_with_path(lambda path, _: "'b'" in str(path), tree),
    )
    optimizer = optax.chain(
        ab.decay_with_gradient(decay, RULES, alpha), optax.sgd(RATE, momentum=0.9)
    )
    gradients = drawn(rng, params, 6)
    found = updated(optimizer, params, gradients)
    plain = updated(optax.sgd(RATE, momentum=0.9), params, gradients)
    w, trace = np.asarray(params["b"]["kernel"], np.float64), 0
    for step, gradient in enumerate(gradients):
        share = max(0, 1 - step / 4) * 0.5 * (1 - step / 10)
        trace = 0.9 * trace + np.asarray(gradient["b"]["kernel"], np.float64) + share * w
        w = w - RATE * trace
    np.testing.assert_allclose(found["b"]["kernel"], w, rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, found["a"], plain["a"])


def test_within_multi_steps_it_counts_optimizer_steps(rng, params):
    alpha = ab.linear_ramp(start=0, stop=4)
    optimizer = ab.decay_with_gradient(adamw(RATE), RULES, alpha)
    gradients = drawn(rng, params, 6)
    accumulated = optax.MultiSteps(optimizer, 2).gradient_transformation()
    twice = [gradient for gradient in gradients for _ in range(2)]
    found, wanted = updated(accumulated, params, twice), updated(optimizer, params, gradients)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, wanted)


def test_half_precision_stays(rng, params):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    gradients = drawn(rng, half, 3)
    found = updated(ab.decay_with_gradient(adamw(RATE), RULES, ab.jump(1)), half, gradients)
    # After the first step there is no decay of kernels: that of a schedule which ends.
    ending = optax.chain(
        optax.scale_by_adam(),
        optax.add_decayed_weights(lambda count: jnp.where(count < 1, DECAY, 0).astype("bfloat16")),
        optax.scale_by_learning_rate(RATE),
    )
    wanted = updated(ending, half, gradients)
    for name, w in kernels(found).items():
        assert w.dtype == jnp.bfloat16
        np.testing.assert_array_equal(w, kernels(wanted)[name])


def test_paths_of_nnx_are_those_of_its_parameters(rng):
    model = nnx.Linear(6, 5, rngs=nnx.Rngs(int(rng.integers(1000))))
    before = np.asarray(model.kernel[...])
    optimizer = nnx.Optimizer(
        model, ab.decay_with_gradient(adamw(RATE), RULES, ab.jump(0)), wrt=nnx.Param
    )
    nothing = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param))
    bias = rng.normal(size=5).astype(np.float32)
    model.bias[...] = jnp.asarray(bias)
    for _ in range(3):
        optimizer.update(model, nothing)
    np.testing.assert_array_equal(model.kernel[...], before)
    np.testing.assert_allclose(model.bias[...], bias * (1 - RATE * DECAY) ** 3, rtol=1e-5)


def test_errors_name_the_culprit_and_the_fix(params):
    with pytest.raises(TypeError, match=r"alpha as a schedule, not 0\.5.*constant_schedule\(0\.5"):
        ab.decay_with_gradient(adamw(RATE), RULES, 0.5)
    wrong = ab.Rules([("conv/.*", ab.Binary()), (".*", None)])
    with pytest.raises(ValueError, match=r"'conv/\.\*' matches no parameter"):
        ab.decay_with_gradient(adamw(RATE), wrong, ab.jump(0)).init(params)
    optimizer = ab.decay_with_gradient(adamw(RATE), RULES, ab.jump(0))
    with pytest.raises(ValueError, match=r"call update\(gradients, state, params\)"):
        optimizer.update(params, optimizer.init(params))
    with pytest.raises(TypeError, match=r"a/kernel .* int32"):
        optimizer.init({"a": {"kernel": jnp.ones((2, 3), jnp.int32), "bias": jnp.ones(3)}})
    for alpha, message in (
        (lambda step: 1.5, "alpha is 1.5, but must lie"),
        (lambda step: lambda path: -1.0, "alpha for a/kernel is -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            ab.decay_with_gradient(adamw(RATE), RULES, alpha).init(params)


def test_the_other_order_of_accumulation_is_refused():
    accumulated = optax.MultiSteps(adamw(RATE), every_k_schedule=2)
    with pytest.raises(TypeError, match=r"MultiSteps\(decay_with_gradient\("):
        ab.decay_with_gradient(accumulated, RULES, ab.cubic_ramp(0, 10))
