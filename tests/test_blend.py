"""Rules over parameter paths, and what blend, quantize, describe and clip_latent do with them.

The quantizers here take their scale from the largest weight (or the mean), which compiles fast;
what a scale is worth stands in test_quantizers.py.
"""

import math
import re
from typing import NamedTuple

import equinox as eqx
import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ab_jax as ab
from ab_jax import Binary, Quantized, Rules, Uniform

W = np.ones((2, 2), np.float32)
INT4 = Uniform(bits=4, scale="absmax")
INT8 = Uniform(bits=8, symmetric=False, scale="absmax")
KERNELS = Rules([(r"(.*/)?kernel", INT4), (r".*", None)])


def assert_same_bits(found, wanted) -> None:
    """Trees of the same structure, with leaves that are equal as integers."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert one.dtype == other.dtype
        as_integers = f"u{one.dtype.itemsize}"
        np.testing.assert_array_equal(one.view(as_integers), other.view(as_integers), strict=True)


@pytest.fixture
def params(rng: np.random.Generator) -> dict:
    """What a small Linen network may look like, with awkward numbers in a kernel."""

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    awkward = [[-0.0, 1e-40, 1e30], [0.5, -1e-45, -1e30]]
    return {
        "stem": {"kernel": normal(3, 3, 1, 4), "bias": normal(4)},
        "blocks": [{"kernel": normal(4, 3)}, {"kernel": jnp.asarray(awkward, jnp.float32)}],
        "head": {"kernel": normal(4, 3), "bias": normal(3).at[0].set(-0.0)},
    }


# Both ends of the ramp


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jitted"])
def test_both_ends_are_exact(params, jit):
    rules = Rules(
        [
            (r"stem/kernel", Uniform(bits=3, symmetric=False)),  # a fitted scale
            (r"head/kernel", Binary()),
            (r"(.*/)?kernel", INT4),
            (r".*", None),
        ]
    )
    blend = jax.jit(ab.blend, static_argnums=1) if jit else ab.blend
    assert_same_bits(blend(params, rules, 0.0), params)
    deployed = ab.dequantize(ab.quantize(params, rules))
    assert_same_bits(blend(params, rules, 1.0), deployed)
    assert_same_bits(blend(params, rules, jnp.float32(1)), deployed)
    for path in ("stem", "head"):
        assert (deployed[path]["kernel"] != params[path]["kernel"]).any()
        assert deployed[path]["bias"] is params[path]["bias"]


def test_between_the_ends_only_what_has_a_quantizer_moves(params):
    blended = ab.blend(params, KERNELS, 0.25)
    deployed = ab.dequantize(ab.quantize(params, KERNELS))
    assert jax.tree.structure(blended) == jax.tree.structure(params)
    for (path, w), w_eff, q in zip(
        jax.tree.leaves_with_path(params),
        jax.tree.leaves(blended),
        jax.tree.leaves(deployed),
        strict=True,
    ):
        if "kernel" in str(path):
            wanted = 0.75 * np.asarray(w, np.float64) + 0.25 * np.asarray(q, np.float64)
            np.testing.assert_allclose(w_eff, wanted, rtol=1e-6, atol=1e-37)
            assert not np.array_equal(w_eff, w)
        else:
            assert w_eff is w  # the identical object, not a copy
            assert q is w


def test_quantize_holds_a_quantized_for_each_rule_and_dequantize_is_its_inverse(params):
    quantized = ab.quantize(params, KERNELS)
    head = quantized["head"]
    assert isinstance(head["kernel"], Quantized)
    assert (head["kernel"].bits, head["kernel"].codes.dtype) == (4, jnp.int8)
    assert head["bias"] is params["head"]["bias"]
    np.testing.assert_array_equal(
        ab.dequantize(quantized)["head"]["kernel"],
        np.asarray(head["kernel"].codes, np.float32) * np.asarray(head["kernel"].scale),
    )
    # Codes survive another round: what is deployed is a fixed point.
    again = ab.quantize(ab.dequantize(quantized), KERNELS)
    np.testing.assert_array_equal(again["head"]["kernel"].codes, head["kernel"].codes)
    # Through jit as a tree of arrays, too.
    assert_same_bits(jax.jit(ab.dequantize)(quantized), ab.dequantize(quantized))


def test_dtypes_are_kept(rng):
    kernel = rng.normal(size=(4, 3))
    params = {dtype: jnp.asarray(kernel, dtype) for dtype in ("float32", "bfloat16", "float16")}
    rules = Rules([(".*", INT4)])
    for alpha in (0.0, 0.5, 1.0):
        for dtype, leaf in ab.blend(params, rules, alpha).items():
            assert leaf.dtype == dtype
    assert_same_bits(ab.blend(params, rules, 1.0), ab.dequantize(ab.quantize(params, rules)))
    for dtype, leaf in ab.clip_latent(params, rules).items():
        assert leaf.dtype == dtype


# Transformations


def test_the_gradient_of_a_loss_over_the_whole_tree(params):
    params["blocks"].pop()
    alpha = np.float32(0.3)

    def loss(tree):
        return sum(jnp.sum(jnp.sin(3 * leaf)) for leaf in jax.tree.leaves(tree))

    found = jax.jit(jax.grad(lambda p, r, a: loss(ab.blend(p, r, a))), static_argnums=1)(
        params, KERNELS, alpha
    )
    plain = jax.grad(loss)(ab.blend(params, KERNELS, alpha))
    for (path, g), g_plain in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(plain), strict=True
    ):
        factor = 1 - alpha if "kernel" in str(path) else 1
        # Compiled by itself the blend may differ in its last bit, 5e-7 of a weight up to 8, and the
        # loss's gradient by 9 times that.
        np.testing.assert_allclose(g, factor * g_plain, rtol=1e-5, atol=1e-5)


def test_rules_and_estimators_are_static_arguments(params):
    traced = []

    def step(params, rules, alpha, estimator):
        traced.append(rules)
        return ab.blend(params, rules, alpha, estimator=estimator)

    jitted = jax.jit(step, static_argnums=(1, 3))
    for alpha in (0.0, 0.5, 1.0):
        same = Rules([[r"(.*/)?kernel", Uniform(bits=4, scale="absmax")], (r".*", None)])
        assert same == KERNELS
        assert hash(same) == hash(KERNELS)
        jitted(params, same, alpha, ab.alpha_blend)
    assert len(traced) == 1  # alpha is traced, equal rules are the same argument
    jitted(params, KERNELS, 0.5, ab.straight_through)
    assert len(traced) == 2
    assert Rules([(r"(.*/)?kernel", INT8), (r".*", None)]) != KERNELS


def test_vmap_over_seeds(rng):
    """Five networks trained at once are five networks."""
    stacked = {"kernel": jnp.asarray(rng.normal(size=(5, 4, 3)), jnp.float32)}
    found = jax.vmap(lambda p: ab.blend(p, KERNELS, 1.0))(stacked)
    codes = jax.vmap(lambda p: ab.quantize(p, KERNELS))(stacked)["kernel"]
    assert codes.scale.shape == (5, 1, 3)
    for i in range(5):
        alone = {"kernel": stacked["kernel"][i]}
        np.testing.assert_allclose(
            found["kernel"][i], ab.blend(alone, KERNELS, 1.0)["kernel"], rtol=1e-6
        )
        np.testing.assert_array_equal(codes.codes[i], ab.quantize(alone, KERNELS)["kernel"].codes)


@pytest.mark.parametrize("estimator", [ab.alpha_blend, ab.straight_through, ab.parq])
def test_a_compiled_loss_computes_a_weight_once(estimator):
    """And not at each image, position and tap, in a convolution that is written as multiply-adds.

    That took MobileNet's step a third longer on CPUs, and with PARQ twice as long.
    """

    def loss(kernel, rows, alpha):
        taps = ab.blend({"kernel": kernel}, KERNELS, alpha, estimator=estimator)["kernel"]
        length = len(rows) - len(taps) + 1
        return jnp.sum(sum(tap[None] * rows[i : i + length] for i, tap in enumerate(taps)) ** 2)

    gradient = jax.jit(jax.grad(loss, (0, 1)))
    text = gradient.lower(jnp.ones((3, 4)), jnp.ones((50, 4)), 0.5).compile().as_text()
    assert text.count(" round-nearest-even(") == 1


ANY_QUANTIZER = [
    *(Binary(), ab.Ternary(), Uniform(bits=3), Uniform(bits=4, symmetric=False), INT4),
    *(ab.LeastSquaresBinary(bits=1), ab.LeastSquaresBinary(bits=2), ab.LeastSquaresBinary(bits=3)),
]


@pytest.mark.parametrize("quantizer", ANY_QUANTIZER, ids=repr)
@pytest.mark.parametrize("estimator", [ab.alpha_blend, ab.parq])
def test_blending_at_what_is_fitted_now_is_what_a_blend_does(rng, quantizer, estimator):
    rules = Rules([(r"(.*/)?kernel", quantizer), (r".*", None)])
    tree = {"kernel": rng.normal(size=(12, 3)).astype(np.float32), "bias": np.ones(3, np.float32)}
    fits = ab.fit(tree, rules)
    for alpha in (0.0, 0.3, 1.0):
        at_fits = ab.blend(tree, rules, alpha, estimator=estimator, fits=fits)
        assert_same_bits(at_fits, ab.blend(tree, rules, alpha, estimator=estimator))


@pytest.mark.parametrize("quantizer", ANY_QUANTIZER, ids=repr)
def test_codes_at_an_older_fit_are_the_nearest_of_its_levels(rng, quantizer):
    rules = Rules([(r".*", quantizer)])
    old = {"kernel": rng.normal(size=(50, 3)).astype(np.float32)}
    new = {"kernel": old["kernel"] + rng.normal(size=(50, 3)).astype(np.float32) / 4}
    seen = ab.blend(new, rules, 1.0, fits=ab.fit(old, rules))["kernel"]
    levels = np.asarray(ab.quantize(old, rules)["kernel"].levels()).reshape(-1, 1, 3)
    nearest = np.abs(new["kernel"] - levels).min(0)
    np.testing.assert_allclose(np.abs(new["kernel"] - seen), nearest, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quantizer", ANY_QUANTIZER, ids=repr)
@pytest.mark.parametrize("estimator", [ab.alpha_blend, ab.straight_through, ab.parq])
def test_an_older_fit_hides_no_weight_that_is_no_finite_number(rng, quantizer, estimator):
    rules = Rules([(r".*", quantizer)])
    old = rng.normal(size=(12, 3)).astype(np.float32)
    fits = ab.fit({"kernel": old}, rules)
    new = old.copy()
    new[[2, 3, 4], 1] = np.nan, np.inf, -np.inf

    def seen(w, alpha):
        return ab.blend({"kernel": w}, rules, alpha, estimator=estimator, fits=fits)["kernel"]

    for at in (seen, jax.jit(seen)):
        found = at(new, 1.0)
        assert np.all(np.isnan(found) == ~np.isfinite(new))
        assert_same_bits(
            np.where(np.isnan(found), 0, found), np.where(np.isnan(found), 0, at(old, 1.0))
        )
        assert np.all(np.isnan(at(new, 0.5)) == ~np.isfinite(new))
        if estimator is not ab.straight_through:  # at alpha 0 the weights, whatever they are
            assert_same_bits(at(new, 0.0), new)


def test_a_fit_is_carried_through_steps(rng):
    """As a training step does it, under jit; the gradient is that of the blend."""
    w = {"kernel": jnp.asarray(rng.normal(size=(40, 3)), jnp.float32)}
    rules = Rules([(r".*", Uniform(bits=3))])

    @jax.jit
    def step(params, fits, number):
        fits = jax.lax.cond(number % 2 == 0, lambda: ab.fit(params, rules), lambda: fits)

        def loss(params):
            return jnp.sum(ab.blend(params, rules, 0.25, fits=fits)["kernel"] ** 2)

        return jax.grad(loss)(params), fits

    first = ab.fit(w, rules)
    moved = jax.tree.map(lambda x: 1.5 * x, w)
    gradient, kept = step(moved, first, 1)
    assert_same_bits(kept, first)
    seen = ab.blend(moved, rules, 0.25, fits=first)["kernel"]
    np.testing.assert_allclose(gradient["kernel"], 0.75 * 2 * seen, rtol=1e-5)
    _, renewed = step(moved, first, 2)
    np.testing.assert_allclose(renewed["kernel"].fitted, 1.5 * first["kernel"].fitted, rtol=1e-5)


def test_fits_of_other_parameters_are_refused(params):
    fits = ab.fit(params, KERNELS)
    with pytest.raises(ValueError, match="no fit for head/kernel, which a rule quantizes"):
        ab.blend(params, KERNELS, 0.5, fits={p: f for p, f in fits.items() if p != "head/kernel"})
    with pytest.raises(ValueError, match="a fit for other, which no rule quantizes"):
        ab.blend(params, KERNELS, 0.5, fits={**fits, "other": fits["head/kernel"]})
    affine = Rules([(r"(.*/)?kernel", INT8), (r".*", None)])
    with pytest.raises(ValueError, match="fit for blocks/0/kernel is not one of its quantizer"):
        ab.blend(params, affine, 0.5, fits=fits)
    with pytest.raises(ValueError, match="estimator full_precision fits for itself"):
        ab.blend(params, KERNELS, 0.5, fits=fits, estimator=ab.full_precision)


@pytest.mark.parametrize(
    ("shape", "quantizer", "message"),
    [
        (
            (16, 8),
            Uniform(bits=8),
            r"w is not one of its quantizer, .*bits=4.* of .*bits=8.*ab_jax.fit",
        ),
        ((16, 8), ab.Ternary(), r"w is not one of its quantizer, Uniform.* of Ternary.*ab_jax.fit"),
        (
            (32, 8),
            Uniform(bits=4),
            r"w is one of a weight of shape \(32, 8\), not \(16, 8\).*ab_jax.fit",
        ),
    ],
    ids=["another width", "another kind", "another shape"],
)
def test_fits_whose_scales_have_the_same_shape_are_refused_too(rng, shape, quantizer, message):
    rules = Rules([("w", Uniform(bits=4))])
    fits = ab.fit({"w": rng.normal(size=shape).astype(np.float32)}, Rules([("w", quantizer)]))
    w = rng.normal(size=(16, 8)).astype(np.float32)

    def blended(w, fits):
        return ab.blend({"w": w}, rules, 1.0, fits=fits)["w"]

    def scanned(w, fits):
        return jax.lax.scan(lambda fits, w: (fits, blended(w, fits)), fits, w[None])[1]

    for use in (blended, jax.jit(blended), jax.jit(scanned)):
        with pytest.raises(ValueError, match=message):
            use(w, fits)


def test_fits_that_are_none_are_refused(params):
    for fits in ([1], {path: jnp.ones(3) for path in ab.fit(params, KERNELS)}):
        with pytest.raises(TypeError, match=r"fit.*Make them by ab_jax\.fit\(params, rules\)"):
            ab.blend(params, KERNELS, 0.5, fits=fits)


def test_weights_in_full_precision_are_left_as_they_are(params):
    found = ab.blend(params, KERNELS, 0.5, estimator=ab.full_precision)
    for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
        assert leaf is other


# Any tree, any framework


def check_tree(tree, rules: Rules, quantized_paths: set[str]) -> None:
    """Structure, shapes and dtypes stay; leaves outside `quantized_paths` are the same objects."""
    description = ab.describe(tree, rules)
    assert {row.path for row in description.rows if row.quantizer} == quantized_paths
    leaves, structure = jax.tree.flatten(tree)
    paths = [row.path for row in description.rows]
    for alpha in (0.0, 0.5):
        blended = ab.blend(tree, rules, alpha)
        assert type(blended) is type(tree)
        new_leaves, new_structure = jax.tree.flatten(blended)
        assert new_structure == structure
        for path, old, new in zip(paths, leaves, new_leaves, strict=True):
            if path in quantized_paths:
                assert (new.shape, new.dtype) == (old.shape, old.dtype)
                assert np.array_equal(new, old) == (alpha == 0)
            else:
                assert new is old, path


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(4, name="stem")(x))
        x = nn.BatchNorm(use_running_average=True)(x)
        return nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)


def filled(shapes, rng: np.random.Generator):
    """Normal numbers in the shapes of a tree."""
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes)


def test_linen(rng, key):
    shapes = jax.eval_shape(Net().init, key, jnp.ones((1, 2, 4)))
    params = filled(shapes["params"], rng)
    heads = Uniform(bits=4, scale="absmax", axis=(1, 2))
    rules = Rules([(r"attention/(query|key|value)/kernel", heads), *KERNELS.rules])
    kernels = {f"attention/{name}/kernel" for name in ("query", "key", "value", "out")}
    check_tree(params, rules, kernels | {"stem/kernel"})
    check_tree(flax.core.freeze(params), rules, kernels | {"stem/kernel"})
    query = ab.quantize(params, rules)["attention"]["query"]["kernel"]
    assert query.scale.shape == (1, 2, 2)


def test_a_dense_layer_alone_has_the_bare_path(rng, key):
    shapes = jax.eval_shape(nn.Dense(4).init, key, jnp.ones((1, 4)))
    check_tree(filled(shapes["params"], rng), KERNELS, {"kernel"})


class NNXNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.stem = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)  # holds a random key and a counter
        self.steps = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        for layer in (self.stem, *self.layers):
            x = layer(x)
        return x


def test_nnx(rng):
    model = NNXNet(nnx.Rngs(int(rng.integers(2**31))))
    kernels = {"stem/kernel", "layers/0/kernel", "layers/1/kernel"}  # without /value
    state = nnx.state(model)
    check_tree(state, KERNELS, kernels)
    check_tree(nnx.state(model, nnx.Param), KERNELS, kernels)
    check_tree(nnx.to_pure_dict(state), KERNELS, kernels)
    paths = {row.path for row in ab.describe(state, KERNELS).rows}
    assert {"steps", "dropout/rngs/count", "dropout/rngs/key", "norm/mean"} <= paths

    graph, params, rest = nnx.split(model, nnx.Param, ...)
    x = jnp.asarray(rng.normal(size=(2, 4)), jnp.float32)
    blended = nnx.merge(graph, ab.blend(params, KERNELS, 1.0), rest)
    by_hand = ab.dequantize(ab.quantize(params, KERNELS))
    np.testing.assert_array_equal(blended(x), nnx.merge(graph, by_hand, rest)(x))


def test_equinox(key):
    """Channels first, and functions among the leaves."""
    model = eqx.nn.MLP(4, 4, width_size=4, depth=1, key=key)
    rules = Rules([(r"layers/\d+/weight", Uniform(bits=4, scale="absmax", axis=0)), (".*", None)])
    check_tree(model, rules, {"layers/0/weight", "layers/1/weight"})
    quantized = ab.quantize(model, rules)
    assert quantized.layers[0].weight.scale.shape == (4, 1)
    blended = ab.blend(model, rules, 0.5)
    assert blended.activation is model.activation
    gradient = eqx.filter_jit(
        eqx.filter_grad(lambda m, x: ab.blend(m, rules, 0.25)(x).sum()),
    )(model, jnp.ones(4))
    # The last layer is linear: its weights see the hidden values, times what alpha leaves.
    hidden = jax.nn.relu(ab.blend(model, rules, 0.25).layers[0](jnp.ones(4)))
    np.testing.assert_allclose(
        gradient.layers[1].weight, 0.75 * np.tile(hidden, (4, 1)), rtol=1e-5, atol=1e-6
    )


class Layer(NamedTuple):
    kernel: jax.Array
    bias: jax.Array
    count: int


def test_named_tuples_lists_and_numpy_arrays(rng):
    tree = [
        Layer(jnp.asarray(rng.normal(size=(4, 3)), jnp.float32), jnp.ones(3), 7),
        (rng.normal(size=(4, 3)).astype(np.float32), None, {}),
    ]
    rules = Rules([(r"0/kernel|1/0", INT4), (".*", None)])
    check_tree(tree, rules, {"0/kernel", "1/0"})


class Projections(eqx.Module):
    query: jax.Array
    value: jax.Array


class ValueNet(nnx.Module):
    """A parameter that is called `value`, and one that holds several arrays."""

    def __init__(self, rngs: nnx.Rngs):
        self.value = nnx.Param(jnp.ones((4, 4)))
        self.layer = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
        self.several = nnx.Param({"value": jnp.ones((4, 4)), "scale": jnp.ones(4)})


def paths_of(tree) -> list[str]:
    return [row.path for row in ab.describe(tree, Rules([(".*", None)])).rows]


def test_only_the_attribute_of_a_variable_is_no_part_of_a_path():
    w = np.ones((4, 4), np.float32)
    assert paths_of({"value": {"value": {"value": w}}, "a": {"b/value": w}}) == [
        *("a/b/value", "value/value/value"),
    ]
    assert paths_of({"attn": Projections(w, w), "value": w}) == [
        *("attn/query", "attn/value", "value"),
    ]
    assert paths_of({"net/~/value": {"w": w, "value": w}}) == ["net/~/value/value", "net/~/value/w"]
    model = ValueNet(nnx.Rngs(0))
    state = nnx.state(model)
    wanted = ["layer/kernel", "several/scale", "several/value", "value"]
    assert paths_of(state) == paths_of(nnx.to_pure_dict(state)) == paths_of(model) == wanted
    boxed = {"kernel": nn.Partitioned(w, names=(None, None)), "value": w}
    assert paths_of(boxed) == ["kernel", "value"]
    assert paths_of(nnx.Param(w)) == paths_of(w) == [""]


def test_an_attention_is_quantized_with_its_value_projection():
    tree = {"attn": {name: jnp.ones((8, 8)) for name in ("query", "key", "value")}}
    rules = Rules([("attn/(query|key|value)", INT4), (".*", None)])
    assert ab.quantized_paths(tree, rules) == ["attn/key", "attn/query", "attn/value"]
    assert all(isinstance(leaf, Quantized) for leaf in ab.quantize(tree, rules)["attn"].values())
    state = ab.quantize(nnx.state(ValueNet(nnx.Rngs(0))), Rules([("value", INT4), (".*", None)]))
    assert isinstance(state["value"].get_raw_value(), Quantized)


@pytest.mark.parametrize(
    "use", [lambda *a: ab.blend(*a, 0.5), ab.quantize, ab.describe, ab.initial_scales]
)
@pytest.mark.parametrize(
    ("tree", "path"),
    [
        ({"a/b": W, "a": {"b": np.ones((3, 3), np.float32)}}, "a/b"),
        ({"1": {"0/w": W}, "1/0": {"w": W}}, "1/0/w"),
        ({"a": [W, Projections(W, W)], "a/1/value": W}, "a/1/value"),
    ],
)
def test_two_leaves_of_one_path_are_refused(use, tree, path):
    """A rule, a scale and an alpha by path would be one for both."""
    with pytest.raises(ValueError, match=f"path '{path}' is that of two leaves.* Rename"):
        use(tree, Rules([(".*", INT4)]))


# Estimators as values, alpha by path


def parq(w, quantizer, alpha):
    """A proximal map, as a user would write it."""
    q = quantizer.quantize(jax.lax.stop_gradient(w)).dequantize()
    prox = w + alpha * jnp.clip(q - w, -0.01, 0.01)
    return w + jax.lax.stop_gradient(prox - w)


def test_an_estimator_of_ones_own_needs_no_other_edit(rng):
    params = {"kernel": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32), "bias": jnp.ones(3)}
    blend = jax.jit(lambda p, a: ab.blend(p, KERNELS, a, estimator=parq))
    blended, pull_back = jax.vjp(lambda p: blend(p, 0.5), params)
    w, q = params["kernel"], ab.dequantize(ab.quantize(params, KERNELS))["kernel"]
    wanted = w + 0.5 * np.clip(q - w, -0.01, 0.01)
    np.testing.assert_allclose(blended["kernel"], wanted, rtol=1e-5, atol=1e-6)
    assert (np.abs(q - w) > 0.01).any()
    (gradient,) = pull_back(params)
    np.testing.assert_array_equal(gradient["kernel"], w)


def test_an_estimator_gets_the_weight_its_quantizer_and_alpha(params):
    seen = []

    def spy(w, quantizer, alpha):
        seen.append((w.shape, quantizer, alpha))
        return w

    rules = Rules([("head/kernel", INT8), *KERNELS.rules])
    ab.blend(params, rules, 0.75, estimator=spy)
    assert seen == [
        ((4, 3), INT4, 0.75),
        ((2, 3), INT4, 0.75),
        ((4, 3), INT8, 0.75),
        ((3, 3, 1, 4), INT4, 0.75),
    ]


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jitted"])
def test_alpha_may_be_a_function_of_the_path(params, jit):
    """Layers that follow ramps of their own."""
    ramps = {"stem/kernel": ab.jump(10), "head/kernel": ab.linear_ramp(0, 10)}

    def blended(params, step):
        return ab.blend(params, KERNELS, lambda path: ramps[path](step) if path in ramps else 0.0)

    found = (jax.jit(blended) if jit else blended)(params, 5)
    q = ab.dequantize(ab.quantize(params, KERNELS))
    assert_same_bits(found["stem"], params["stem"])  # before its jump
    assert_same_bits(found["blocks"], params["blocks"])
    np.testing.assert_allclose(
        found["head"]["kernel"], (params["head"]["kernel"] + q["head"]["kernel"]) / 2, rtol=1e-6
    )
    assert_same_bits(blended(params, 10)["stem"]["kernel"], q["stem"]["kernel"])


# Rules


def test_the_first_match_of_the_whole_path_decides():
    rules = Rules([("a/kernel", INT8), ("kernel", Binary()), ("(.*/)?kernel", INT4), (".*", None)])
    paths = ["a/kernel", "kernel", "b/a/kernel", "kernel/bias", "kernels"]
    assert rules.assign(paths) == [0, 1, 2, 3, 3]


def test_a_catch_all_may_find_nothing_left():
    for catch_all in (".*", r"[\s\S]*", "(.*/)?kernel"):
        assert Rules([("kernel", INT4), (catch_all, None)]).assign(["kernel"]) == [0]


def test_rules_are_hashable_iterables_of_any_kind():
    pairs = [["kernel", INT4], [".*", None]]
    assert Rules(pairs) == Rules(tuple(pair) for pair in pairs) == Rules(iter(pairs))
    assert len({Rules(pairs), Rules(list(pairs)), Rules([(".*", None)])}) == 2


TREE = {"dense": {"kernel": np.ones((4, 3), np.float32), "bias": np.ones(3, np.float32)}}
COUNTER = {"kernel": np.ones((4, 3), np.float32), "step.count": np.zeros((2, 2), np.int32)}


@pytest.mark.parametrize(
    "use", [lambda *a: ab.blend(*a, 0.5), ab.quantize, ab.describe, ab.clip_latent]
)
@pytest.mark.parametrize(
    ("tree", "rules", "kind", "words"),
    [
        ({}, [(".*", None)], ValueError, ["no parameters", "no leaves"]),
        (  # matches nothing
            TREE,
            [("kernel", INT4), (".*", None)],
            ValueError,
            ["'kernel' matches no parameter", "whole path", "dense/bias, dense/kernel"],
        ),
        (  # uncovered
            TREE,
            [(".*kernel", INT4)],
            ValueError,
            ["No rule covers dense/bias", '(".*", None)'],
        ),
        (  # shadowed
            TREE,
            [(".*/kernel", INT4), ("dense/kernel", INT8), (".*", None)],
            ValueError,
            ["'dense/kernel' decides no parameter", "earlier '.*/kernel'", "Move it further up"],
        ),
        (  # no floating point
            COUNTER,
            [(".*", Binary())],
            TypeError,
            ["'.*'", "step.count", "Binary(", "int32", r"('step\\.count', None)"],
        ),
        (  # no array
            {"kernel": np.ones((4, 3), np.float32), "f": np.tanh},
            [(".*", Binary())],
            TypeError,
            ["'.*'", "gives f ", "not floating point", "('f', None)"],
        ),
        (  # random key
            {"kernel": np.ones((4, 3), np.float32), "key": jax.random.key(0)},
            [(".*", Binary())],
            TypeError,
            ["'.*'", "gives key ", "not floating point", "('key', None)"],
        ),
        (  # an axis it does not have
            TREE,
            [(".*", Uniform(bits=4, axis=1))],
            ValueError,
            ["Rule '.*'", "dense/bias", "axis 1", "(3,)", "axis=None"],
        ),
        (  # groups that do not fit
            TREE,
            [(".*kernel", Uniform(bits=4, group_size=3)), (".*", None)],
            ValueError,
            ["Rule '.*kernel'", "dense/kernel", "groups of 3", "has size 4"],
        ),
    ],
    ids=[
        *("empty", "matches nothing", "uncovered", "shadowed", "integer", "function", "key"),
        *("axis", "groups"),
    ],
)
def test_errors_name_the_rule_the_parameter_and_the_fix(use, tree, rules, kind, words):
    with pytest.raises(kind) as caught:
        use(tree, Rules(rules))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "use",
    [
        *(lambda *a: ab.blend(*a, 0.5), ab.quantize, ab.describe, ab.clip_latent, ab.fit),
        *(ab.initial_scales, ab.quantized_paths, lambda *a: ab.mean_alpha(*a, lambda path: 0.5)),
    ],
)
@pytest.mark.parametrize("rules", [[("kernel", INT4), (".*", None)], None, TREE], ids=type)
def test_rules_that_are_none_are_told_how_to_write_them(use, rules):
    with pytest.raises(TypeError, match=rf"rules .* of type {type(rules).__name__}.*Rules\(\["):
        use(TREE, rules)


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda *a: ab.blend(*a, 1.0, estimator="ste"), ["estimator", "straight_through", "'ste'"]),
        (lambda *a: ab.blend(*a, 1.0, estimator=None), ["estimator", "alpha_blend", "None"]),
        (
            lambda *a: ab.blend(*a, 1.0, estimator=ab.learned_step_size, scales=[1]),
            ["scales must be a dictionary, not list", "initial_scales"],
        ),
        (lambda *a: ab.quantize(*a, scales=[1]), ["scales must be a dictionary", "initial_scales"]),
        (
            lambda *a: ab.quantize(*a, scales={"dense/kernel": "1"}),
            ["The scale of dense/kernel is '1'", "initial_scales"],
        ),
    ],
)
def test_arguments_of_other_types_are_named_with_the_fix(use, words):
    with pytest.raises(TypeError) as caught:
        use(TREE, Rules([(".*kernel", INT4), (".*", None)]))
    for word in words:
        assert word in str(caught.value)


def test_long_lists_of_paths_are_cut():
    paths = [f"layer{i}/bias" for i in range(100)]
    with pytest.raises(ValueError, match=r"layer0/bias, .* and 92 more") as caught:
        Rules([("kernel", None)]).assign(paths)
    assert "layer99" not in str(caught.value)


@pytest.mark.parametrize(
    ("rules", "kind", "words"),
    [
        ([("(kernel", INT4)], ValueError, ["'(kernel'", "no regular expression", "position 0"]),
        ([("kernel", 4)], TypeError, ["('kernel', 4)", "pair", "Quantizer", "Rules(["]),
        ([("kernel", Binary)], TypeError, ["pair", "kernel"]),
        (["kernel"], TypeError, ["'kernel'", "pair"]),
        ([("kernel", INT4, 1)], TypeError, ["pair"]),
        ([(INT4, "kernel")], TypeError, ["pair"]),
        (INT4, TypeError, ["pair", "Uniform(bits=4", "Rules(["]),
    ],
)
def test_bad_rules_are_refused_when_they_are_made(rules, kind, words):
    with pytest.raises(kind) as caught:
        Rules(rules)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, -1e-9, float("nan"), float("inf"), 2, np.float32(3)])
def test_alpha_outside_0_to_1_is_refused(alpha):
    with pytest.raises(
        ValueError, match=r"must lie in \[0, 1\].*cubic_ramp\(start, stop\)"
    ) as caught:
        ab.blend(TREE, KERNELS, alpha)
    (named,) = re.findall(r"alpha is (\S+),", str(caught.value))
    np.testing.assert_equal(float(named), float(alpha))
    with pytest.raises(ValueError, match="alpha for dense/kernel is"):
        ab.blend(TREE, KERNELS, lambda path: alpha)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):  # not traced, though in a jit
        jax.jit(lambda p: ab.blend(p, KERNELS, alpha))(TREE)


def test_alpha_is_a_scalar():
    with pytest.raises(ValueError, match=r"alpha must be a scalar.*\(3,\)"):
        ab.blend(TREE, KERNELS, np.ones(3))
    with pytest.raises(ValueError, match=r"alpha for dense/kernel must be a scalar.*\(1,\)"):
        ab.blend(TREE, KERNELS, lambda path: np.ones(1))
    with pytest.raises(ValueError, match=r"alpha must be a scalar.*\(2,\)"):
        jax.jit(lambda a: ab.blend(TREE, KERNELS, a))(np.ones(2))
    with pytest.raises(TypeError, match=r"alpha must be a scalar in \[0, 1\], not None"):
        ab.blend(TREE, KERNELS, None)
    with pytest.raises(TypeError, match=r"alpha for dense/kernel must be a scalar.*not '1'"):
        ab.blend(TREE, KERNELS, lambda path: "1")


# describe


def test_describe_counts_bytes(rng):
    params = {
        "conv": {"kernel": np.zeros((3, 3, 8, 5), np.float32), "bias": np.zeros(5, np.float32)},
        "dense": {"kernel": jnp.zeros((12, 7), jnp.bfloat16)},
        "sign": np.zeros((3, 3), np.float32),
        "step": np.int32(3),
        "ternary": np.zeros((5, 3), np.float32),
    }
    grouped = Uniform(bits=3, symmetric=False, scale="absmax", group_size=4)
    rules = Rules(
        [
            ("conv/kernel", INT4),
            ("dense/.*", grouped),
            ("sign", Binary(axis=None)),
            ("ternary", ab.Ternary(axis=0)),
            (".*", None),
        ]
    )
    description = ab.describe(params, rules, errors=False)
    found = {row.path: row for row in description.rows}
    # Packed codes, then 4 bytes a scale and 1 byte a zero point.
    wanted = {
        "conv/bias": (20, 20),
        "conv/kernel": (1440, 180 + 5 * 4),
        "dense/kernel": (168, math.ceil(84 * 3 / 8) + 21 * 4 + 21),
        "sign": (36, 2 + 4),
        "step": (4, 4),
        "ternary": (60, 3 + 5 * 4),  # five codes to a byte
    }
    assert {p: (row.bytes_before, row.bytes_after) for p, row in found.items()} == wanted
    assert found["dense/kernel"].shape == (12, 7)
    assert found["dense/kernel"].rule == "dense/.*"
    assert found["dense/kernel"].quantizer == grouped
    assert found["conv/bias"].quantizer is None

    lines = str(description).splitlines()
    assert lines[0].split() == [
        *("path", "shape", "rule", "axis", "quantizer", "bits", "bytes", "after"),
    ]
    cells = [line.split() for line in lines]
    assert cells[2] == [
        *("conv/kernel", "3x3x8x5", "conv/kernel", "-1", "Uniform", "4", "1,440", "200"),
    ]
    assert cells[3][3:] == [
        *("-1,", "groups", "of", "4", "on", "-2", "Uniform", "3", "168", "137"),
    ]
    assert cells[4] == ["sign", "3x3", "sign", "tensor", "Binary", "1", "36", "6"]
    assert cells[5][:2] == ["step", "scalar"]
    before, after = (sum(pair[i] for pair in wanted.values()) for i in (0, 1))
    assert cells[-1] == ["total", f"{before:,}", f"{after:,}"]
    assert len({len(line) for line in lines}) == 1  # a table
    assert len(lines) == len(params) + 1 + 2

    # Shapes are all it takes, and the bytes are those of what quantize makes.
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, params))
    assert ab.describe(shapes, rules) == description
    leaves = jax.tree.leaves(ab.quantize(params, rules), is_leaf=lambda x: isinstance(x, Quantized))
    for row, leaf in zip(description.rows, leaves, strict=True):
        if isinstance(leaf, Quantized):
            zero_points = 0 if leaf.zero_point is None else leaf.zero_point.nbytes
            codes = leaf.codes.size
            packed = math.ceil(codes / 5 if leaf.bits == 2 else codes * leaf.bits / 8)
            assert row.bytes_after == packed + leaf.scale.nbytes + zero_points


# clip_latent


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jitted"])
def test_clip_latent_clips_what_is_quantized_after_an_update(jit):
    params = {"kernel": jnp.array([[0.5, -0.9], [1.0, 0.2]]), "bias": jnp.array([5.0, -5.0])}
    gradients = {"kernel": jnp.array([[-1.0, 1.0], [1.0, 0.1]]), "bias": jnp.array([-1.0, 1.0])}
    optimizer = optax.sgd(1.0)

    def update(params, gradients):
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        return ab.clip_latent(optax.apply_updates(params, updates), KERNELS)

    found = (jax.jit(update) if jit else update)(params, gradients)
    np.testing.assert_allclose(found["kernel"], [[1.0, -1.0], [0.0, 0.1]], atol=1e-7)
    np.testing.assert_array_equal(found["bias"], [6.0, -6.0])


def test_clip_latent_takes_another_limit_and_leaves_the_rest_alone(params):
    clipped = ab.clip_latent(params, KERNELS, limit=0.25)
    assert jax.tree.structure(clipped) == jax.tree.structure(params)
    kernel = np.asarray(params["stem"]["kernel"])
    np.testing.assert_array_equal(clipped["stem"]["kernel"], np.clip(kernel, -0.25, 0.25))
    assert np.abs(kernel).max() > 0.25
    assert clipped["stem"]["bias"] is params["stem"]["bias"]


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan"), "1"])
def test_clip_latent_refuses_a_limit_that_is_not_positive(params, limit):
    with pytest.raises(ValueError, match=f"positive limit, not limit={limit!r}"):
        ab.clip_latent(params, KERNELS, limit=limit)


def test_describe_tells_what_is_lost_of_all_and_of_the_worst_slice(rng):
    sizes = np.array([1, 0.5, 0.2, 0.05])
    layers = (rng.normal(size=(4, 64, 8)) * sizes[:, None, None]).astype(np.float32)
    params = {"layers": {"kernel": layers, "scale": np.ones(8, np.float32)}, "head": layers[0]}
    rules = Rules([(".*", ab.Uniform(bits=4))])
    found = {row.path: row for row in ab.describe(params, rules).rows}

    row = found["layers/kernel"]
    value = np.asarray(rules.of("layers/kernel").quantize(layers).dequantize())
    lost, squares = (np.square(x.astype(np.float64)) for x in (layers - value, layers))
    np.testing.assert_allclose(row.error, lost.sum() / squares.sum(), rtol=1e-4)
    of_layers = lost.sum((1, 2)) / squares.sum((1, 2))
    np.testing.assert_allclose(row.worst[0], of_layers.max(), rtol=1e-4)
    assert row.worst[1] == 0
    assert row.note == "a slice of axis 0 is mostly lost"
    assert found["layers/scale"].note == "a vector: a norm or a bias?"
    assert found["head"].note == ""
    assert "worst" in str(ab.describe(params, rules))

    # A scale for each layer as well, and nothing is lost of any layer; the worst is an input's.
    by_layer = Rules([(".*kernel", ab.Uniform(bits=4, axis=(0, -1))), (".*", None)])
    row, *_ = (r for r in ab.describe(params, by_layer).rows if r.path == "layers/kernel")
    value = np.asarray(by_layer.of("layers/kernel").quantize(layers).dequantize())
    lost, squares = (np.square(x.astype(np.float64)) for x in (layers - value, layers))
    inside = [tuple({0, 1, 2} - {axis}) for axis in range(3)]
    worst = [(lost.sum(axes) / squares.sum(axes)).max() for axes in inside]
    assert worst[0] < 0.05
    np.testing.assert_allclose(row.worst[0], max(worst), rtol=1e-4)
    assert row.worst[1] == np.argmax(worst)
    assert row.note == ""


def test_describe_computes_nothing_where_there_is_nothing_to_compute_with(rng):
    params = {"w": rng.normal(size=(8, 4)).astype(np.float32)}
    rules = Rules([("w", ab.Uniform(bits=4))])
    for given in (jax.eval_shape(lambda: params), params):
        found = ab.describe(given, rules, errors=False)
        assert (found.rows[0].error, found.rows[0].worst) == (None, None)
    traced = []
    jax.jit(lambda params: traced.append(ab.describe(params, rules)))(params)
    assert traced[0].rows[0].error is None
    row = ab.describe(
        {"w": jnp.zeros((8, 4)), "v": jnp.full((8, 4), 3e38)},
        Rules([(".*", ab.Uniform(bits=4, scale="absmax"))]),
    ).rows[1]
    assert row.error == 0
    assert row.path == "w"
