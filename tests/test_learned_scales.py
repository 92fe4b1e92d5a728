"""Learned step sizes against the paper's equations in float64, region by region."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ab_jax as ab

SHAPE = (3, 4, 6)
# Each with its highest level and the axes over which a block of SHAPE runs; groups of 2 apart.
CASES = [
    (ab.Binary(), 1, (0, 1)),
    (ab.Ternary(axis=None), 1, (0, 1, 2)),
    (ab.Uniform(bits=2, axis=(0, -1)), 1, (1,)),
    (ab.Uniform(bits=3), 3, (0, 1)),
    (ab.Uniform(bits=8, axis=0, scale="absmax"), 127, (1, 2)),
]
each_case = pytest.mark.parametrize(
    ("quantizer", "highest", "axes"), CASES, ids=lambda x: type(x).__name__
)


def codes_of(w: np.ndarray, s: np.ndarray, highest: int, *, binary: bool) -> np.ndarray:
    if binary:
        return np.where(w >= 0, 1.0, -1.0)
    return np.round(np.clip(w / s, -highest, highest))


def reference(
    w: np.ndarray, s: np.ndarray, cotangent: np.ndarray, highest: int, axes: Any, *, binary: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value and both gradients, as equations 1 to 3 and 5 and section 2.2 have them."""
    w, s, cotangent = (x.astype(np.float64) for x in (w, s, cotangent))
    x, codes = w / s, codes_of(w, s, highest, binary=binary)
    to_w = np.where((x > -highest) & (x < highest), cotangent, 0)
    slope = np.where(x <= -highest, -highest, np.where(x >= highest, highest, codes - x))
    count = w.size // s.size
    to_s = np.sum(cotangent * slope, axes, keepdims=True) / math.sqrt(count * highest)
    return codes * s, to_w, to_s


def assert_gradients(
    found: Any, wanted: Any, cotangent: np.ndarray, highest: int, axes: Any, tolerance: float
) -> None:
    """To weights, and to scales: sums that may cancel, so that their terms say what rounding is."""
    np.testing.assert_allclose(found[0], wanted[0], rtol=tolerance, atol=tolerance)
    count = cotangent.size // wanted[1].size
    terms = np.sum(np.abs(cotangent), axes) * highest / math.sqrt(count * highest)
    atol = tolerance / 10 * np.max(terms)
    np.testing.assert_allclose(found[1], wanted[1], rtol=tolerance, atol=atol)


def draw(
    rng: np.random.Generator, highest: int, axes: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Weights on both sides of the range and in it, none so near a threshold that float32 decides
    otherwise; and scales."""
    shape = [1 if i in axes else size for i, size in enumerate(SHAPE)]
    s = rng.uniform(0.01, 2, shape).astype(np.float32)
    relative = rng.uniform(-1.5 * highest - 1, 1.5 * highest + 1, SHAPE)
    halves = 2 * relative
    near = np.abs(halves - np.round(halves)) < 1e-3
    return ((relative + np.where(near, 0.01, 0)) * s).astype(np.float32), s


def value_and_gradients(
    w: Any, s: Any, cotangent: Any, quantizer: ab.Quantizer
) -> tuple[jax.Array, jax.Array, jax.Array]:
    value, pull = jax.vjp(lambda w, s: ab.learned_step_size(w, quantizer, 1.0, s), w, s)
    return (value, *pull(cotangent))


@each_case
def test_value_and_gradients_are_those_of_the_paper(rng, quantizer, highest, axes, strict_dtypes):
    w, s = draw(rng, highest, axes)
    cotangent = rng.normal(size=SHAPE).astype(np.float32)
    binary = isinstance(quantizer, ab.Binary)
    wanted = reference(w, s, cotangent, highest, axes, binary=binary)
    inside = np.abs(w / s) < highest
    assert inside.any()
    assert (~inside & (w > 0)).any()
    assert (~inside & (w < 0)).any()
    for call in (value_and_gradients, jax.jit(value_and_gradients, static_argnums=3)):
        found = call(jnp.asarray(w), jnp.asarray(s), jnp.asarray(cotangent), quantizer)
        np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
        assert_gradients(found[1:], wanted[1:], cotangent, highest, axes, 1e-5)
        assert not np.any(np.asarray(found[1])[~inside])


@pytest.mark.parametrize(("quantizer", "highest", "axes"), CASES[1:4])
def test_thresholds_belong_to_the_side_that_the_paper_says(rng, quantizer, highest, axes):
    w, s = draw(rng, highest, axes)
    s = (2.0 ** rng.integers(-3, 3, s.shape)).astype(np.float32)  # so that w / s is exact
    halves = np.arange(-highest - 1, highest + 1.5, 0.5, dtype=np.float32)
    w = np.resize(halves, SHAPE) * s
    cotangent = rng.normal(size=SHAPE).astype(np.float32)
    found = value_and_gradients(*map(jnp.asarray, (w, s, cotangent)), quantizer)
    wanted = reference(w, s, cotangent, highest, axes, binary=False)
    np.testing.assert_array_equal(found[0], wanted[0])
    np.testing.assert_array_equal(found[1], wanted[1])
    np.testing.assert_allclose(found[2], wanted[2], rtol=1e-5, atol=1e-5)


@each_case
def test_gradients_are_the_slopes_of_the_surrogate(rng, quantizer, highest, axes):
    """The value with rounding (for one bit the sign) replaced by adding a constant."""
    w, s = draw(rng, highest, axes)
    cotangent = rng.normal(size=SHAPE).astype(np.float32)
    _, to_w, to_s = value_and_gradients(*map(jnp.asarray, (w, s, cotangent)), quantizer)
    w, s, cotangent = (x.astype(np.float64) for x in (w, s, cotangent))
    binary = isinstance(quantizer, ab.Binary)
    rest = codes_of(w, s, highest, binary=binary) - np.clip(w / s, -highest, highest)

    def surrogate(w: np.ndarray, s: np.ndarray) -> np.ndarray:
        return cotangent * (np.clip(w / s, -highest, highest) + rest) * s

    h = 1e-6
    slopes = (surrogate(w + h * s, s) - surrogate(w - h * s, s)) / (2 * h * s)
    by_weight = (surrogate(w, s * (1 + h)) - surrogate(w, s * (1 - h))) / (2 * h * s)
    scaled = np.sum(by_weight, axes, keepdims=True) / math.sqrt(w.size // s.size * highest)
    assert_gradients((to_w, to_s), (slopes, scaled), cotangent, highest, axes, 1e-4)


def test_a_group_is_a_block_of_its_own(rng):
    quantizer = ab.Uniform(bits=3, group_size=2)
    w, cotangent = rng.normal(size=(2, 6, 5)).astype(np.float32)
    rules = ab.Rules([(".*", quantizer)])
    s = ab.initial_scales({"w": w}, rules)["w"]
    found = value_and_gradients(jnp.asarray(w), s, jnp.asarray(cotangent), quantizer)
    for i in range(3):
        rows = slice(2 * i, 2 * i + 2)
        one = np.asarray(s)[i : i + 1]
        first = 2 * np.abs(w[rows].astype(np.float64)).mean(0, keepdims=True) / math.sqrt(3)
        np.testing.assert_allclose(one, first, rtol=1e-6)
        wanted = reference(w[rows], one, cotangent[rows], 3, (0,), binary=False)
        for x, y in zip((found[0][rows], found[1][rows], found[2][i : i + 1]), wanted, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@each_case
def test_initial_scales_and_what_a_block_of_zeros_gets(rng, quantizer, highest, axes):
    w = rng.normal(size=SHAPE).astype(np.float32)
    rules = ab.Rules([("layer/kernel", quantizer), (".*", None)])
    params = {"layer": {"kernel": w, "bias": np.zeros(6, np.float32)}}
    scales = ab.initial_scales(params, rules)
    assert set(scales) == {"layer/kernel"}
    wanted = 2 * np.abs(w.astype(np.float64)).mean(axes, keepdims=True) / math.sqrt(highest)
    np.testing.assert_allclose(scales["layer/kernel"], wanted, rtol=1e-6)
    params["layer"]["kernel"] = np.zeros_like(w)
    zeros = ab.initial_scales(params, rules)["layer/kernel"]
    np.testing.assert_array_equal(zeros, np.ones_like(wanted))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@each_case
def test_the_loss_sees_the_codes_that_are_deployed_bit_for_bit(
    rng, quantizer, highest, axes, dtype
):
    rules = ab.Rules([("kernel", quantizer), (".*", None)])
    params = {"kernel": jnp.asarray(rng.normal(size=SHAPE), dtype), "bias": jnp.ones(3)}
    scales = jax.tree.map(lambda s: s * rng.uniform(0.3, 1.5), ab.initial_scales(params, rules))
    assert scales["kernel"].dtype == np.float32

    def seen(params: Any, scales: Any, alpha: Any) -> Any:
        return ab.blend(params, rules, alpha, estimator=ab.learned_step_size, scales=scales)

    deployed = ab.quantize(params, rules, scales=scales)
    np.testing.assert_array_equal(deployed["kernel"].scale, scales["kernel"])
    codes = np.asarray(deployed["kernel"].codes)
    assert codes.dtype == np.int8
    w, s = (np.asarray(x, np.float64) for x in (params["kernel"], scales["kernel"]))
    binary = isinstance(quantizer, ab.Binary)
    clear = (
        np.abs(np.abs(w / s - np.round(w / s)) - 0.5) > 1e-4
    )  # else float32 may decide otherwise
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(codes[clear], codes_of(w, s, highest, binary=binary)[clear])
    values = ab.dequantize(deployed)
    assert values["kernel"].dtype == params["kernel"].dtype
    for found in (seen(params, scales, 1.0), jax.jit(seen)(params, scales, 0.25)):
        for name, value in values.items():
            assert np.asarray(found[name]).tobytes() == np.asarray(value).tobytes()


@each_case
def test_a_traced_scale_counts_by_its_magnitude(rng, quantizer, highest, axes):
    """In the loss, in both gradients and in the codes; the gradient to it is that of |s|."""
    w, s = draw(rng, highest, axes)
    sign = rng.choice(np.float32([-1, 1]), s.shape)
    sign.flat[0] = -1
    cotangent = rng.normal(size=SHAPE).astype(np.float32)
    binary = isinstance(quantizer, ab.Binary)
    value, to_w, to_s = reference(w, s, cotangent, highest, axes, binary=binary)
    found = jax.jit(value_and_gradients, static_argnums=3)(w, sign * s, cotangent, quantizer)
    np.testing.assert_allclose(found[0], value, rtol=1e-5)
    assert_gradients(found[1:], (to_w, sign * to_s), cotangent, highest, axes, 1e-5)
    rules = ab.Rules([("kernel", quantizer)])
    deploy = jax.jit(lambda w, s: ab.quantize({"kernel": w}, rules, scales={"kernel": s})["kernel"])
    deployed = deploy(w, sign * s)
    np.testing.assert_array_equal(deployed.scale, s)
    assert np.asarray(found[0]).tobytes() == np.asarray(deployed.dequantize()).tobytes()


def test_scales_that_overshot_come_back(rng):
    """Plain descent on the error of the weights, from numbers that are no scales."""
    quantizer = ab.Uniform(bits=3, axis=None)
    w = jnp.asarray(rng.normal(size=(64, 1)), jnp.float32)

    def error(s):
        return jnp.sum((ab.learned_step_size(w, quantizer, 1.0, s) - w) ** 2)

    @jax.jit
    @jax.vmap
    def trained(s):
        return error(jax.lax.fori_loop(0, 400, lambda _, s: s - 0.01 * jax.grad(error)(s), s))

    found = trained(jnp.asarray([-0.03, 0.0, 1e-45, -3.0], jnp.float32).reshape(4, 1, 1))
    scales = np.linspace(0.1, 1.5, 57)
    rest = np.asarray(w)[:, 0] - scales[:, None] * np.clip(
        np.round(np.asarray(w)[:, 0] / scales[:, None]), -3, 3
    )
    assert (found < 1.3 * np.min(np.sum(rest**2, axis=1))).all()


@each_case
def test_a_weight_that_is_no_finite_number_is_seen(rng, quantizer, highest, axes):
    w = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    scale = ab.initial_scales({"w": w}, ab.Rules([("w", quantizer)]))["w"]
    w = w.at[jnp.arange(3), 1].set(jnp.asarray([jnp.nan, jnp.inf, -jnp.inf]))
    found = ab.learned_step_size(w, quantizer, 1.0, scale)
    np.testing.assert_array_equal(np.isnan(found), ~np.isfinite(w))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_no_level_of_a_traced_scale_overflows(dtype):
    largest = float(jnp.finfo(dtype).max)
    w = jnp.asarray([[largest], [-largest], [0.5 * largest]], dtype)
    for quantizer in (ab.Binary(), ab.Ternary(), ab.Uniform(bits=8)):
        rules = ab.Rules([("w", quantizer)])
        deploy = jax.jit(lambda s, r=rules: ab.quantize({"w": w}, r, scales={"w": s})["w"])
        for number in (largest, largest / 3, 1e-45, 0.0):
            codes = deploy(np.full((1, 1), number, np.float32))
            scale = np.asarray(codes.scale)
            assert scale > 0
            top = scale * {1: 1, 2: 1}.get(codes.bits, 127)
            assert np.isfinite(top.astype(w.dtype)).all()
            assert np.isfinite(np.asarray(codes.dequantize())).all()
    for number in (np.nan, np.inf):
        scale = jnp.full((1, 1), number, jnp.float32)
        seen = jax.jit(lambda s: ab.learned_step_size(w, ab.Uniform(bits=4), 1.0, s))(scale)
        assert np.isnan(np.asarray(seen)).any()


def test_a_scale_stays_positive_and_loses_at_most_half():
    before = {"a": jnp.float32([[0.5, 0.5, 0.5, 2.0**-100]]), "b": jnp.float32([3.0])}
    after = {"a": jnp.float32([[-1.0, 0.3, 0.7, -1.0]]), "b": jnp.float32([1.0])}
    found = ab.keep_scales_positive(after, before)
    np.testing.assert_array_equal(found["a"], np.float32([[0.25, 0.3, 0.7, 2.0**-100]]))
    np.testing.assert_array_equal(found["b"], np.float32([1.5]))
    np.testing.assert_array_equal(
        ab.keep_scales_positive({"a": jnp.float32([np.nan])}, {"a": jnp.float32([1])})["a"], np.nan
    )


# Refusals

RULES = ab.Rules([("kernel", ab.Uniform(bits=4)), (".*", None)])
PARAMS = {"kernel": np.ones((2, 3), np.float32), "bias": np.ones(3, np.float32)}
GOOD = {"kernel": np.ones((1, 3), np.float32)}


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({}, "There is no scale for kernel, which a rule quantizes"),
        ({**GOOD, "bias": np.ones(1, np.float32)}, "a scale for bias, which no rule quantizes"),
        ({"kernel": np.ones(3, np.float32)}, r"kernel is float32\[3\], not float32\[1, 3\]"),
        ({"kernel": np.ones((1, 3), np.float16)}, r"is float16\[1, 3\], not float32\[1, 3\]"),
        ({"kernel": -GOOD["kernel"]}, "of kernel holds what is not positive and finite"),
        ({"kernel": np.inf * GOOD["kernel"]}, "of kernel holds what is not positive and finite"),
    ],
)
def test_scales_of_other_parameters_are_refused(scales, message):
    with pytest.raises(ValueError, match=message):
        ab.quantize(PARAMS, RULES, scales=scales)
    with pytest.raises(ValueError, match=message):
        ab.blend(PARAMS, RULES, 1.0, estimator=ab.learned_step_size, scales=scales)


def test_scales_and_estimator_go_together():
    with pytest.raises(ValueError, match=r"learned_step_size needs the scales .*initial_scales"):
        ab.blend(PARAMS, RULES, 1.0, estimator=ab.learned_step_size)
    with pytest.raises(ValueError, match="straight_through takes no scales"):
        ab.blend(PARAMS, RULES, 1.0, estimator=ab.straight_through, scales=GOOD)


@pytest.mark.parametrize(
    "quantizer", [ab.Binary(fixed_scale=1.0), ab.Uniform(bits=4, symmetric=False)]
)
def test_a_quantizer_that_cannot_learn_its_scale_is_named_with_the_parameter(quantizer):
    rules = ab.Rules([("kernel", quantizer), (".*", None)])
    with pytest.raises(ValueError, match=r"Parameter kernel: The scales of .* cannot be learned"):
        ab.initial_scales(PARAMS, rules)
    with pytest.raises(ValueError, match="cannot be learned"):
        ab.quantize(PARAMS, rules, scales=GOOD)


# Scales that are given and stay


def draw_given(rng, quantizer):
    """Weights, and scales that no fit would find."""
    params = {"layer": {"kernel": jnp.asarray(rng.normal(size=(3, 4, 5)), jnp.float32)}}
    rules = ab.Rules([("layer/kernel", quantizer), (".*", None)])
    fitted = ab.scales_of(ab.quantize(params, rules))
    return params, rules, jax.tree.map(lambda s: s * rng.uniform(0.5, 2), fitted)


GIVEN = [ab.Binary(), ab.Ternary(), ab.Uniform(bits=4, axis=None), ab.Uniform(bits=3, group_size=2)]


@pytest.mark.parametrize("quantizer", GIVEN, ids=str)
@pytest.mark.parametrize("estimator", [ab.straight_through, ab.alpha_blend, ab.parq])
def test_at_fixed_scales_the_loss_sees_the_codes_at_these(rng, quantizer, estimator):
    params, rules, scales = draw_given(rng, quantizer)
    at_fixed = ab.at_fixed_scales(estimator)
    codes = ab.quantize(params, rules, scales=scales)
    assert ab.scales_of(codes).keys() == scales.keys()
    np.testing.assert_array_equal(codes["layer"]["kernel"].scale, scales["layer/kernel"])

    def seen(params, scales, alpha):
        return ab.blend(params, rules, alpha, estimator=at_fixed, scales=scales)["layer"]["kernel"]

    w, value = params["layer"]["kernel"], ab.dequantize(codes)["layer"]["kernel"]
    np.testing.assert_array_equal(jax.jit(seen)(params, scales, 1.0), value)
    if estimator is not ab.straight_through:
        np.testing.assert_array_equal(jax.jit(seen)(params, scales, 0.0), w)
    if estimator is ab.alpha_blend:
        np.testing.assert_allclose(seen(params, scales, 0.25), 0.75 * w + 0.25 * value, rtol=1e-6)
    # Gradients are those of the estimator, and none is the scales'.
    factor = 0.75 if estimator is ab.alpha_blend else 1
    to_params, to_scales = jax.grad(lambda p, s: jnp.sum(seen(p, s, 0.25)), (0, 1))(params, scales)
    np.testing.assert_allclose(to_params["layer"]["kernel"], jnp.full(w.shape, factor), rtol=1e-6)
    assert not np.any(to_scales["layer/kernel"])


def test_a_weight_that_is_not_finite_is_seen_at_fixed_scales(rng):
    params, rules, scales = draw_given(rng, ab.Uniform(bits=4))
    params["layer"]["kernel"] = params["layer"]["kernel"].at[0, 1, 2].set(jnp.inf)
    seen = ab.blend(params, rules, 1.0, estimator=ab.at_fixed_scales(ab.alpha_blend), scales=scales)
    assert np.argwhere(np.isnan(seen["layer"]["kernel"])).tolist() == [[0, 1, 2]]


def test_what_cannot_be_at_fixed_scales_is_named(rng):
    for estimator in (ab.full_precision, ab.learned_step_size):
        with pytest.raises(ValueError, match=rf"{estimator.__name__} fits for itself, or needs no"):
            ab.at_fixed_scales(estimator)
    params, rules, scales = draw_given(rng, ab.Uniform(bits=4))
    with pytest.raises(ValueError, match=r"at_fixed_scales\(parq\) needs the scales"):
        ab.blend(params, rules, 1.0, estimator=ab.at_fixed_scales(ab.parq))
    for quantizer, kind in (
        (ab.Uniform(bits=4, symmetric=False), "a zero point"),
        (ab.LeastSquaresBinary(bits=2), "a scale for each bit"),
    ):
        other = ab.Rules([("layer/kernel", quantizer), (".*", None)])
        with pytest.raises(ValueError, match=f"codes of layer/kernel have {kind}"):
            ab.scales_of(ab.quantize(params, other))
        with pytest.raises(ValueError, match=r"scales of .* cannot be learned|The scale of layer"):
            ab.blend(params, other, 1.0, estimator=ab.at_fixed_scales(ab.parq), scales=scales)


def test_a_block_of_zeros_has_a_scale_to_be_at(rng):
    params = {"kernel": jnp.zeros((4, 2))}
    rules = ab.Rules([("kernel", ab.Binary())])
    scales = ab.scales_of(ab.quantize(params, rules))
    assert np.all(np.asarray(scales["kernel"]) == 2.0**-100)
    values = ab.dequantize(ab.quantize(params, rules, scales=scales))["kernel"]
    np.testing.assert_allclose(values, 0, atol=1e-30)
