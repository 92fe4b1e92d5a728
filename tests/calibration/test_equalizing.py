"""Equalization: the same function, balanced ranges, and whatever is left out by its name."""

import itertools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ab_jax as ab
from ab_jax.calibration import equalize
from ab_jax.products import mark
from tests.products.networks_of_frameworks import NETWORKS


def along_last(sizes, x):
    """Sizes [n] in the layout of an array whose last axis they belong to."""
    return jnp.asarray(sizes, x.dtype).reshape(*[1] * (x.ndim - 1), -1)


def badly_scaled(rng, params):
    """Each entry of the last axis of all parameters with a size of its own, over decades."""
    return jax.tree.map(
        lambda x: x * along_last(np.exp(rng.normal(size=x.shape[-1]) * 1.5), x), params
    )


def shrunk(layer, sizes):
    """A layer whose output channels are divided."""
    return jax.tree.map(lambda p: p / along_last(sizes, p), layer)


def drawn(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def layers(rng, *sizes):
    """Dense layers of these sizes."""
    return {
        f"layer{i}": {"kernel": drawn(rng, *shape), "bias": drawn(rng, shape[1])}
        for i, shape in enumerate(itertools.pairwise(sizes))
    }


def dense(layer, x):
    return x @ layer["kernel"] + layer["bias"].reshape(1, -1)


def mlp(params, x, activation=jax.nn.relu):
    *before, last = params.values()
    for layer in before:
        x = activation(dense(layer, x))
    return dense(last, x)


def same(f, params, found, *inputs, rtol=1e-5):
    """The function is the same, and some parameters are not."""
    wanted = np.asarray(f(params, *inputs))
    size = np.abs(wanted).max()
    np.testing.assert_allclose(f(found.params, *inputs), wanted, atol=rtol * size)
    assert jax.tree.structure(found.params) == jax.tree.structure(params)
    for before, behind in zip(*map(jax.tree.leaves, (params, found.params)), strict=True):
        assert (before.shape, before.dtype) == (behind.shape, behind.dtype)
    assert any(np.ptp(pair.scales) > 0 for pair in found.pairs)


def names(found):
    return [(pair.first, pair.second) for pair in found.pairs]


# One pair, and chains


def test_a_single_pair_has_the_scales_of_the_closed_form(rng):
    params, x = badly_scaled(rng, layers(rng, 6, 8, 3)), drawn(rng, 20, 6)
    found = equalize(mlp, params, x)
    (pair,) = found.pairs
    assert (pair.first, pair.second) == ("layer0/kernel", "layer1/kernel")
    assert pair.divided == ("layer0/kernel", "layer0/bias")
    assert pair.multiplied == "layer1/kernel"
    assert found.left_out == ()
    first = np.abs(np.asarray(params["layer0"]["kernel"], np.float64)).max(0)
    second = np.abs(np.asarray(params["layer1"]["kernel"], np.float64)).max(1)
    np.testing.assert_allclose(pair.scales, np.sqrt(first / second), rtol=1e-6)
    kernels = [np.abs(np.asarray(found.params[f"layer{i}"]["kernel"])) for i in range(2)]
    np.testing.assert_allclose(kernels[0].max(0), np.sqrt(first * second), rtol=1e-6)
    np.testing.assert_allclose(kernels[1].max(1), np.sqrt(first * second), rtol=1e-6)
    np.testing.assert_allclose(
        found.params["layer0"]["bias"], params["layer0"]["bias"] / pair.scales, rtol=1e-6
    )
    assert found.params["layer1"]["bias"] is params["layer1"]["bias"]
    same(mlp, params, found, x)


def test_in_float64_the_function_is_the_same_to_its_rounding(rng):
    with jax.enable_x64(True):
        params = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.float64), badly_scaled(rng, layers(rng, 6, 8, 7, 9, 3))
        )
        x = jnp.asarray(rng.normal(size=(20, 6)))
        found = equalize(mlp, params, x)
        assert len(found.pairs) == 3
        same(mlp, params, found, x, rtol=1e-13)


def test_ranges_of_a_chain_are_balanced_and_a_second_time_changes_nothing(rng):
    params, x = badly_scaled(rng, layers(rng, 6, 8, 7, 9, 3)), drawn(rng, 20, 6)
    found = equalize(mlp, params, x)
    kernels = [np.abs(np.asarray(layer["kernel"])) for layer in found.params.values()]
    for before, behind in itertools.pairwise(kernels):
        np.testing.assert_allclose(before.max(0), behind.max(1), rtol=3e-3)
    again = equalize(mlp, found.params, x)
    for pair in again.pairs:
        np.testing.assert_allclose(pair.scales, 1, atol=3e-3)
    same(mlp, params, found, x)


def test_shapes_alone_count(rng):
    params, x = layers(rng, 6, 8, 3), drawn(rng, 20, 6)
    found = equalize(mlp, params, jax.ShapeDtypeStruct((1, 6), jnp.float32))
    jax.tree.map(np.testing.assert_array_equal, found.params, equalize(mlp, params, x).params)


def test_dead_channels_stay_as_they_are(rng):
    params, x = layers(rng, 6, 8, 3), drawn(rng, 20, 6)
    kernels = [params[f"layer{i}"]["kernel"] for i in range(2)]
    params["layer0"]["kernel"] = kernels[0].at[:, 0].set(0).at[:, 1].mul(1e-9)
    params["layer1"]["kernel"] = kernels[1].at[2].set(0)
    found = equalize(mlp, params, x)
    np.testing.assert_array_equal(found.pairs[0].scales[:3], 1)
    same(mlp, params, found, x)


ACTIVATIONS = {
    "leaky relu": jax.nn.leaky_relu,
    "none": lambda x: x,
    "maximum": lambda x: jnp.maximum(x, 0.1 * x),
    "factor": lambda x: 1.7 * jax.nn.relu(x),
    "magnitude": jnp.abs,
    "where": lambda x: jnp.where(x > 0, x, 0),
    "checkpoint": jax.checkpoint(jax.nn.relu),
    "bfloat16 and back": lambda x: -jax.nn.relu(-x).astype(jnp.bfloat16).astype(jnp.float32),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_what_commutes_with_a_scale(rng, name):
    params, x = badly_scaled(rng, layers(rng, 6, 300, 3)), drawn(rng, 20, 6)
    f = lambda params, x: mlp(params, x, ACTIVATIONS[name])
    found = equalize(f, params, x)
    assert len(found.pairs) == 1
    same(f, params, found, x, rtol=3e-2 if "bfloat16" in name else 1e-5)


# Networks


class Net(nn.Module):
    """Convolutions with biases, norms, a depthwise one and poolings, as flags say."""

    norm: bool = False
    depthwise: bool = False
    activation: object = nn.relu

    @nn.compact
    def __call__(self, x):
        def behind(x, name):
            if self.norm:
                x = nn.BatchNorm(use_running_average=True, name=f"{name}_norm")(x)
            return self.activation(x)

        bias = not self.norm
        x = behind(nn.Conv(8, (3, 3), use_bias=bias, name="stem")(x), "stem")
        if self.depthwise:
            groups = {"feature_group_count": 8, "use_bias": bias}
            x = behind(nn.Conv(8, (3, 3), **groups, name="depthwise")(x), "depthwise")
        x = nn.max_pool(x, (2, 2), strides=(2, 2), padding="SAME")
        x = behind(nn.Conv(6, (1, 1), strides=2, use_bias=bias, name="point")(x), "point")
        x = nn.avg_pool(x, (2, 2), padding="SAME")
        x = nn.Dense(5, name="flat")(x.reshape(x.shape[0], -1))
        return nn.Dense(3, name="head")(self.activation(x))


def initialized(rng, key, model, x):
    """A function, random parameters and the statistics of norms."""
    variables = jax.jit(model.init)(key, x)
    params = jax.tree.map(lambda p: drawn(rng, *p.shape), variables["params"])
    statistics = jax.tree.map(
        lambda s: jnp.asarray(rng.uniform(0.3, 3, s.shape), jnp.float32),
        variables.get("batch_stats", {}),
    )
    f = jax.jit(lambda p, x: model.apply({"params": p, "batch_stats": statistics}, x))
    return f, params, statistics


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_convolutional_networks(rng, key, norm, depthwise):
    model, x = Net(norm=norm, depthwise=depthwise), drawn(rng, 2, 9, 9, 3)
    f, params, statistics = initialized(rng, key, model, x)
    params = badly_scaled(rng, params)
    found = equalize(f, params, x)
    chain = ["stem", *["depthwise"] * depthwise, "point", "flat", "head"]
    wanted = [(f"{a}/kernel", f"{b}/kernel") for a, b in itertools.pairwise(chain)]
    assert names(found) == wanted
    assert found.left_out == ()
    same(f, params, found, x)
    if norm:
        assert found.pairs[0].divided == ("stem_norm/scale", "stem_norm/bias")
        np.testing.assert_array_equal(found.params["stem"]["kernel"], params["stem"]["kernel"])
    # The ranges, in a layout of their own: the last kernel axis is that of outputs.
    for before, behind in itertools.pairwise(chain):
        first = np.abs(np.asarray(found.params[before]["kernel"], np.float64))
        first = first.max(tuple(range(first.ndim - 1)))
        if norm and before != "flat":
            variance = np.asarray(statistics[f"{before}_norm"]["var"], np.float64)
            gain = np.abs(np.asarray(found.params[f"{before}_norm"]["scale"]))
            first = first * gain / np.sqrt(variance + 1e-5)
        second = np.abs(np.asarray(found.params[behind]["kernel"]))
        if behind == "depthwise":
            second = second.max((0, 1, 2))
        elif behind == "flat":  # positions, and of each the channels
            second = second.reshape(-1, 6, 5).max((0, 2))
        else:
            second = np.moveaxis(second, -2, 0).reshape(second.shape[-2], -1).max(1)
        np.testing.assert_allclose(first, second, rtol=3e-3)


class Small(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.up = nnx.LinearGeneral(8, (2, 5), rngs=rngs)
        self.down = nnx.LinearGeneral((2, 5), 3, axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x))).mean((1, 2))
        return self.down(nnx.relu(self.up(x)))


def test_networks_of_nnx(rng):
    model, x = Small(nnx.Rngs(0)), drawn(rng, 2, 6, 6, 3)
    model.norm.mean[...] = drawn(rng, 8)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    params = badly_scaled(rng, params)
    f = lambda params, x: nnx.merge(graph, params, rest, copy=True)(x)
    found = equalize(f, params, x)
    assert names(found) == [("conv/kernel", "up/kernel"), ("up/kernel", "down/kernel")]
    assert found.pairs[0].divided == ("norm/scale", "norm/bias")
    assert found.pairs[1].scales.shape == (10,)
    same(f, params, found, x)


def test_networks_of_equinox(rng, key):
    keys = jax.random.split(key, 3)
    model = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(3, 6, 3, padding=1, key=keys[0]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Conv2d(6, 6, 3, groups=6, key=keys[1]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.AvgPool2d(2, 2),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(6 * 2 * 2, 3, key=keys[2]),
        ]
    )
    params, static = eqx.partition(model, eqx.is_inexact_array)
    f = lambda p, x: jax.vmap(eqx.combine(p, static))(x)
    x = drawn(rng, 2, 3, 6, 6)
    found = equalize(f, params, x)
    assert names(found) == [
        ("layers/0/weight", "layers/2/weight"),
        ("layers/2/weight", "layers/6/weight"),
    ]
    same(f, params, found, x)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_every_framework_keep_their_function(name):
    f, params, inputs = NETWORKS[name]()
    found = equalize(f, params, *inputs)
    f = jax.jit(f)
    for before, behind in zip(
        jax.tree.leaves(f(params, *inputs)), jax.tree.leaves(f(found.params, *inputs)), strict=True
    ):
        np.testing.assert_allclose(before, behind, atol=2e-5 * max(1, np.abs(before).max()))
    assert found.pairs or found.left_out
    assert all(pair.first in str(found) and pair.second in str(found) for pair in found.pairs)
    assert all(left.first in str(found) and left.reason in str(found) for left in found.left_out)


def across(x):
    """A vector in the layout of images' channels."""
    return x.reshape(1, 1, 1, -1)


def convolved(x, kernel):
    layout = ("NHWC", "HWIO", "NHWC")
    groups = x.shape[-1] // kernel.shape[2]
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=layout, feature_group_count=groups
    )


# Of the last value, an earlier one, and parameters of this name that are drawn among two of each.
STEPS = {
    "relu": lambda a, b, p: jax.nn.relu(a),
    "leaky relu": lambda a, b, p: jnp.where(a > 0, a, 0.3 * a),
    "gain": lambda a, b, p: a * across(p("gain")),
    "bias": lambda a, b, p: a + across(p("bias")),
    "mean": lambda a, b, p: a - across(jnp.arange(4.0)),
    "deviation": lambda a, b, p: a / across(1 + jnp.arange(4.0)),
    "convolution": lambda a, b, p: convolved(a, p("full")),
    "depthwise": lambda a, b, p: convolved(a, p("depthwise")),
    "dense": lambda a, b, p: a @ p("full")[0, 0],
    "turned": lambda a, b, p: a.transpose(0, 2, 1, 3)[..., ::-1],
    "sum": lambda a, b, p: a + b,
    "product": lambda a, b, p: a * b,
    "greater": lambda a, b, p: jnp.maximum(a, b),
    "gate": lambda a, b, p: a * jax.nn.silu(b),
    "mask": lambda a, b, p: jnp.where(b > 0, a, 0),
    "signs": lambda a, b, p: a * (b > 0),
    "first channel": lambda a, b, p: jnp.broadcast_to(a[..., :1], a.shape),
    "relu6": lambda a, b, p: jnp.clip(a, 0, 6),
}


def test_random_functions_stay_the_same(rng):
    """Of steps that commute and steps that do not, of values and parameters that are read twice."""
    shapes = {"gain": (4,), "bias": (4,), "full": (3, 3, 4, 4), "depthwise": (3, 3, 1, 4)}
    names, count = list(STEPS), 0
    often = np.asarray([4.0] * 9 + [1] * 9)
    with jax.enable_x64(True):
        for _ in range(40):
            chosen = rng.choice(names, rng.integers(2, 9), p=often / often.sum())
            seed = rng.integers(2**31)
            params = {
                f"{n}{i}": jnp.asarray(rng.normal(size=shapes[n])) for n in shapes for i in "01"
            }
            params |= {n: jnp.asarray(rng.normal(size=(4, 4))) for n in ("first", "last")}
            x = jnp.asarray(rng.normal(size=(2, 3, 3, 4)))

            def f(params, x, chosen=chosen, seed=seed):
                draw = np.random.default_rng(seed)
                values = [x @ params["first"]]
                for name in chosen:
                    earlier = values[draw.integers(len(values))]
                    of = lambda name: params[f"{name}{draw.integers(2)}"]
                    values.append(STEPS[name](values[-1], earlier, of))
                return values[-1] @ params["last"]

            found = equalize(f, params, x)
            wanted = f(params, x)
            np.testing.assert_allclose(
                f(found.params, x), wanted, atol=1e-10 * float(jnp.abs(wanted).max())
            )
            count += len(found.pairs)
    assert count > 10


def test_a_bias_that_decides_on_signs_alone_is_divided_too(rng):
    params, x = layers(rng, 6, 8, 3), drawn(rng, 20, 6)
    params["threshold"] = drawn(rng, 8)

    def f(params, x):
        hidden = dense(params["layer0"], x)
        chosen = hidden + params["threshold"].reshape(1, -1) > 0
        return dense(params["layer1"], jnp.where(chosen, hidden, 0) * (hidden > 0))

    found = equalize(f, params, x)
    assert found.pairs[0].divided == ("layer0/kernel", "layer0/bias", "threshold")
    same(f, params, found, x)


def test_a_gated_layer_is_scaled_beside_its_gate(rng):
    params = {
        "gate": drawn(rng, 4, 6),
        "up": drawn(rng, 4, 6) * jnp.exp(drawn(rng, 1, 6)),
        "down": drawn(rng, 6, 2),
    }
    x = drawn(rng, 5, 4)
    f = lambda p, x: (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]
    found = equalize(f, params, x)
    assert names(found) == [("up", "down")]
    (left,) = found.left_out
    assert (left.first, left.seconds) == ("gate", ("down",))
    assert "logistic" in left.reason
    same(f, params, found, x)


def test_marked_products_have_their_addresses(rng):
    params, x = layers(rng, 6, 8, 3), drawn(rng, 20, 6)

    def f(params, x):
        hidden = jax.nn.relu(dense(params["layer0"], x))
        return dense(params["layer1"], mark(hidden, "layer1/kernel"))

    found = equalize(f, params, x)
    assert names(found) == [("layer0/kernel", "layer1/kernel")]
    assert found.left_out == ()
    same(f, params, found, x)


@pytest.mark.parametrize("norm", [False, True])
def test_few_bits_with_one_scale_for_a_weight_lose_less(rng, key, norm):
    """Over thirty networks of badly scaled channels, the error of the outputs at 4 bits."""
    rules = ab.Rules([(".*kernel", ab.Uniform(bits=4, axis=None)), (".*", None)])
    x, f = drawn(rng, 50, 6), mlp
    if norm:
        x = drawn(rng, 4, 9, 9, 3)
        f, start, _ = initialized(rng, key, Net(norm=True, depthwise=True), x)
    ratios = []
    for _ in range(30):
        # The sizes of channels cancel, one layer's against the next one's.
        if norm:
            params = jax.tree.map(lambda p: drawn(rng, *p.shape), start)
            sizes = jnp.exp(drawn(rng, 8) * 1.5)
            params["depthwise_norm"] = shrunk(params["depthwise_norm"], sizes)
            params["point"]["kernel"] *= sizes.reshape(1, 1, 8, 1)
        else:
            params = layers(rng, 6, 32, 32, 3)
            for i in range(2):
                sizes = jnp.exp(drawn(rng, 32) * 1.5)
                params[f"layer{i}"] = shrunk(params[f"layer{i}"], sizes)
                params[f"layer{i + 1}"]["kernel"] *= sizes.reshape(-1, 1)
        wanted = f(params, x)
        errors = [
            float(jnp.mean((f(ab.dequantize(ab.quantize(p, rules)), x) - wanted) ** 2))
            for p in (equalize(f, params, x).params, params)
        ]
        if errors[1] > 0:  # of a network that relu cuts off wholly there is no error
            ratios.append(errors[0] / errors[1])
    assert np.median(ratios) < (0.7 if norm else 0.2)


# What is left out


def left_out(f, params, *inputs):
    """By name, of a function that has no pairs; nothing is changed."""
    found = equalize(f, params, *inputs)
    assert found.pairs == ()
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    assert str(found).startswith("No pairs are equalized\nleft out:")
    return {left.first: left for left in found.left_out}


NOT_COMMUTING = {
    "relu6": (jax.nn.relu6, "cut off at 6, which a scale would move; with relu"),
    "clip": (lambda x: jnp.clip(x, 0, 6), "cut off at 6"),
    "clamp": (lambda x: jax.lax.clamp(jnp.float32(0), x, jnp.float32(6)), "cut off at 6"),
    "floor": (lambda x: jnp.maximum(x, -1), "kept above -1"),
    "gelu": (jax.nn.gelu, "it goes through"),
    "sigmoid": (jax.nn.sigmoid, "it goes through logistic"),
    "swish": (jax.nn.silu, "it goes through logistic"),
    "softmax": (jax.nn.softmax, "reduce_max runs over its channels"),
    "square": (lambda x: x * x, "multiplied by itself"),
    "fixed": (lambda x: jax.nn.relu(x + 1), "a fixed value is added"),
    "threshold": (lambda x: jnp.where(x > 1, x, 0), "compared with a fixed value"),
    "signs": (lambda x: (x > 0).astype(x.dtype), "its signs are read"),
    "shares": (lambda x: x / (1 + x), "a fixed value is added"),
    "sum": (lambda x: x + x.sum(-1, keepdims=True), "reduce_sum runs over its channels"),
    "joined": (lambda x: jnp.concatenate([x[:, :4], x[:, 4:]], 1), "other channels of its own"),
    "scan": (
        lambda x: jax.lax.scan(lambda c, y: (c, jnp.tanh(y)), 0.0, x)[1],
        "goes into a scan",
    ),
}


@pytest.mark.parametrize("name", NOT_COMMUTING)
def test_what_does_not_commute_is_left_out_by_name(rng, name):
    activation, reason = NOT_COMMUTING[name]
    params, x = layers(rng, 6, 8, 3), drawn(rng, 20, 6)
    found = left_out(lambda p, x: mlp(p, x, activation), params, x)
    (left,) = found.values()
    assert (left.first, left.seconds) == ("layer0/kernel", ("layer1/kernel",))
    assert reason in left.reason


def test_a_network_of_relu6_has_no_pairs(rng, key):
    model, x = Net(norm=True, depthwise=True, activation=nn.relu6), drawn(rng, 2, 9, 9, 3)
    f, params, _ = initialized(rng, key, model, x)
    found = left_out(f, params, x)
    assert list(found) == [f"{name}/kernel" for name in ("stem", "depthwise", "point", "flat")]
    assert all("cut off at 6" in left.reason for left in found.values())


def test_sums_of_branches_are_left_out_by_name(rng):
    params, x = layers(rng, 6, 6, 6, 3), drawn(rng, 20, 6)

    def residual(params, x):
        x = jax.nn.relu(dense(params["layer0"], x))
        x = x + dense(params["layer1"], x)
        return dense(params["layer2"], x)

    found = left_out(residual, params, x)
    assert found["layer0/kernel"].seconds == ("layer1/kernel", "layer2/kernel")
    assert "output of another product" in found["layer0/kernel"].reason
    assert found["layer1/kernel"].seconds == ("layer2/kernel",)

    def from_input(params, x):
        return dense(params["layer2"], x + dense(params["layer0"], x))

    found = left_out(from_input, {k: params[k] for k in ("layer0", "layer2")}, x)
    assert found["layer0/kernel"].reason == "it is added to another value"


def test_outputs_that_are_read_twice_are_left_out(rng):
    params, x = layers(rng, 6, 6, 3), drawn(rng, 20, 6)
    hidden = lambda p, x: jax.nn.relu(dense(p["layer0"], x))

    def returned(p, x):
        return dense(p["layer1"], hidden(p, x)), hidden(p, x)

    def returned_at_last(p, x):
        h = hidden(p, x)
        return dense(p["layer1"], h), jnp.tanh(h)

    def once_returned(p, x):
        h = hidden(p, x)
        return dense(p["layer1"], h), h

    def twice(p, x):
        h = hidden(p, x)
        return dense(p["layer1"], h) + h @ p["more"]

    # Computed twice, each is read once; their weight is read twice.
    assert (
        "layer0/kernel is read elsewhere" in left_out(returned, params, x)["layer0/kernel"].reason
    )
    assert "result of the function" in left_out(once_returned, params, x)["layer0/kernel"].reason
    assert "tanh" in left_out(returned_at_last, params, x)["layer0/kernel"].reason
    more = {**params, "more": drawn(rng, 6, 3)}
    assert "further products" in left_out(twice, more, x)["layer0/kernel"].reason


def test_parameters_that_are_read_elsewhere_are_left_out(rng):
    x = drawn(rng, 20, 6)
    tied = {"kernel": drawn(rng, 6, 6)}
    f = lambda p, x: jax.nn.relu(x @ p["kernel"]) @ p["kernel"].T
    found = equalize(f, tied, x)
    assert found.pairs == ()
    assert found.left_out[0].reason == "kernel is read elsewhere too"

    params = layers(rng, 6, 6, 3)
    penalty = lambda p, x: (mlp(p, x), jnp.sum(p["layer0"]["bias"] ** 2))
    assert left_out(penalty, params, x)["layer0/kernel"].reason == (
        "layer0/bias is read elsewhere too"
    )


def test_weights_and_biases_that_are_no_parameters_are_left_out(rng):
    x = drawn(rng, 20, 6)
    params = {"a": drawn(rng, 6, 6), "b": drawn(rng, 6, 3), "c": drawn(rng)}
    normed = lambda p, x: jax.nn.relu(x @ (p["a"] / jnp.linalg.norm(p["a"]))) @ p["b"]
    assert "no parameter as it is" in left_out(normed, params, x)["a"].reason
    one_bias = lambda p, x: jax.nn.relu(x @ p["a"] + p["c"]) @ p["b"]
    assert "an entry a channel" in left_out(one_bias, params, x)["a"].reason
