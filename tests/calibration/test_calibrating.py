"""Calibration of whole functions, against closed forms and against rounding."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ab_jax as ab
from ab_jax.calibration import Gptq, Rounding, WeightedScales, calibrate
from ab_jax.products import find_products
from tests.products.networks_of_frameworks import NETWORKS

THREE = ab.Rules([(r"(.*/)?(kernel|weight|w|embedding)", ab.Uniform(bits=3)), (".*", None)])


def two_layers(params, x):
    hidden = jax.nn.relu(x @ params["first"]["kernel"] + params["first"]["bias"].reshape(1, -1))
    return hidden @ params["second"]["kernel"] + params["second"]["bias"].reshape(1, -1)


@pytest.fixture
def params(rng):
    return {
        name: {
            "kernel": jnp.asarray(rng.normal(size=shape), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=shape[1]), jnp.float32),
        }
        for name, shape in {"first": (6, 8), "second": (8, 3)}.items()
    }


@pytest.fixture
def batches(rng):
    """Inputs that have something to do with each other, as those of networks have."""
    mixed = rng.normal(size=(6, 6))
    return [(jnp.asarray(rng.normal(size=(50, 6)) @ mixed + 1, jnp.float32),) for _ in range(3)]


def outputs(params, batches, f=two_layers):
    return np.concatenate([np.asarray(f(params, *inputs)) for inputs in batches])


def test_without_help_it_rounds(params, batches):
    found = calibrate(
        two_layers, params, THREE, batches, method=Rounding(), regression=np.inf, matching="none"
    )
    jax.tree.map(np.testing.assert_array_equal, found.codes, ab.quantize(params, THREE))
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    assert [layer.address for layer in found.layers] == ["first/kernel", "second/kernel"]
    assert all(layer.bias is None and not layer.note for layer in found.layers)


def test_means_and_deviations_of_every_layer_are_those_in_float(params, batches):
    found = calibrate(two_layers, params, THREE, batches, matching="deviation")
    assert [layer.bias for layer in found.layers] == ["first/bias", "second/bias"]
    values = ab.dequantize(found.codes)

    def hidden(params, x):
        return x @ params["first"]["kernel"] + params["first"]["bias"].reshape(1, -1)

    for f in (hidden, two_layers):
        in_float, in_few_bits = outputs(params, batches, f), outputs(values, batches, f)
        np.testing.assert_allclose(in_few_bits.mean(0), in_float.mean(0), atol=1e-4)
        np.testing.assert_allclose(in_few_bits.std(0), in_float.std(0), rtol=1e-3)
    # Weights in float, biases and scales: what training would start from has the same means.
    again = ab.quantize(found.params, THREE)
    assert again["first"]["kernel"].codes.shape == (6, 8)
    np.testing.assert_array_equal(found.params["first"]["bias"], found.codes["first"]["bias"])


def test_the_regressed_weight_is_that_of_the_closed_form(params, batches):
    """Of the second layer, whose inputs differ in the two networks; nothing is matched."""
    found = calibrate(
        two_layers, params, THREE, batches, method=Rounding(), regression=0.1, matching="none"
    )
    x = np.concatenate([np.asarray(inputs[0], np.float64) for inputs in batches])
    bias = np.asarray(params["first"]["bias"]).reshape(1, -1)
    first = found.codes["first"]["kernel"].dequantize()
    plain = np.maximum(x @ np.asarray(params["first"]["kernel"], np.float64) + bias, 0)
    seen = np.maximum(x @ np.asarray(first, np.float64) + bias, 0)
    kernel = np.asarray(params["second"]["kernel"], np.float64)
    # min |seen w - plain kernel|^2 / rows + penalty |w - kernel|^2, solved as one system.
    penalty = 0.1 * np.mean(seen**2)
    stacked = np.concatenate([seen / np.sqrt(len(x)), np.sqrt(penalty) * np.eye(8)])
    wanted = np.concatenate([plain @ kernel / np.sqrt(len(x)), np.sqrt(penalty) * kernel])
    solved = np.linalg.lstsq(stacked, wanted, rcond=None)[0]
    np.testing.assert_allclose(found.params["second"]["kernel"], solved, rtol=1e-3, atol=1e-4)
    # The first layer has the same inputs in both networks: nothing is to be made good.
    np.testing.assert_allclose(
        found.params["first"]["kernel"], params["first"]["kernel"], rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("method", [Gptq(), WeightedScales()], ids=str)
def test_methods_that_know_the_inputs_lose_less_than_rounding(rng, method):
    """Over ten networks, at 3 bits, of what calibration loses by plain rounding."""
    ratios = []
    for _ in range(10):
        kernel = jnp.asarray(rng.normal(size=(24, 10)), jnp.float32)
        # Scales are chosen by the size of inputs alone, GPTQ knows what they have in common.
        sizes = np.diag(np.exp(rng.normal(size=24)))
        mixed = rng.normal(size=(24, 24)) + 1 if isinstance(method, Gptq) else sizes
        x = jnp.asarray(rng.normal(size=(200, 24)) @ mixed, jnp.float32)
        f = lambda params, x: x @ params["kernel"]
        lost = [
            calibrate(
                f, {"kernel": kernel}, THREE, [(x,)], method=m, regression=np.inf, matching="none"
            )
            .layers[0]
            .lost
            for m in (method, Rounding())
        ]
        ratios.append(lost[0] / lost[1])
    assert np.median(ratios) < (0.6 if isinstance(method, Gptq) else 0.95)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_every_framework_are_calibrated(name):
    f, params, inputs = NETWORKS[name]()
    weights = {p.weight for p in find_products(f, params, *inputs) if p.kind == "weight"}
    pattern = "|".join(map(re.escape, sorted(weights)))
    rules = ab.Rules([(pattern, ab.Uniform(bits=3)), (".*", None)])
    found = calibrate(f, params, rules, [inputs])
    rounded = ab.quantize(params, rules)
    assert jax.tree.structure(found.codes) == jax.tree.structure(rounded)
    assert jax.tree.structure(found.params) == jax.tree.structure(params)
    wanted = jax.tree.leaves(f(params, *inputs))[0]
    lost = [
        float(jnp.mean((jax.tree.leaves(f(ab.dequantize(codes), *inputs))[0] - wanted) ** 2))
        for codes in (found.codes, rounded)
    ]
    # At worst as rounding, but for chance: there are a handful of inputs.
    assert lost[0] < 1.5 * lost[1]
    assert found.layers
    assert all(np.isfinite(layer.lost) or layer.note for layer in found.layers)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(5, name="dense")(x)), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return layers(name="layers")(x, None)[0]


def test_a_scan_over_layers_is_its_layers_one_after_another(rng, key):
    x = jnp.asarray(rng.normal(size=(40, 5)), jnp.float32)
    stacked = Scanned().init(key, x)["params"]["layers"]["dense"]
    per_layer = ab.Rules([(".*kernel", ab.Uniform(bits=3, axis=(0, -1))), (".*", None)])
    scanned = calibrate(
        lambda p, x: Scanned().apply({"params": p}, x),
        {"layers": {"dense": stacked}},
        per_layer,
        [(x,)],
    )

    def written_out(params, x):
        for i in range(3):
            x = jnp.tanh(x @ params[f"kernel{i}"] + params[f"bias{i}"].reshape(1, -1))
        return x

    params = {f"{name}{i}": stacked[name][i] for name in stacked for i in range(3)}
    alone = calibrate(
        written_out, params, ab.Rules([("kernel.", ab.Uniform(bits=3)), (".*", None)]), [(x,)]
    )
    found = scanned.codes["layers"]["dense"]
    for i in range(3):
        one = alone.codes[f"kernel{i}"]
        np.testing.assert_array_equal(found["kernel"].codes[i], one.codes)
        np.testing.assert_allclose(found["kernel"].scale[i], one.scale, rtol=1e-4)
        np.testing.assert_allclose(found["bias"][i], alone.codes[f"bias{i}"], rtol=1e-3, atol=1e-5)
    assert [layer.address for layer in scanned.layers] == ["layers/dense/kernel"] * 3


def test_the_bias_of_a_norm_behind_a_convolution_is_found(rng, key):
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3), use_bias=False, name="conv")(x)
            return nn.BatchNorm(use_running_average=True, name="norm")(x)

    x = jnp.asarray(rng.normal(size=(4, 6, 6, 3)), jnp.float32)
    variables = Normed().init(key, x)
    statistics = {
        "mean": jnp.asarray(rng.normal(size=4), jnp.float32),
        "var": jnp.asarray(rng.uniform(0.5, 2, 4), jnp.float32),
    }
    rest = {"batch_stats": {"norm": statistics}}
    f = lambda p, x: Normed().apply({"params": p, **rest}, x)
    found = calibrate(f, variables["params"], THREE, [(x,)], matching="deviation")
    assert found.layers[0].bias == "norm/bias"
    y, wanted = f(ab.dequantize(found.codes), x), f(variables["params"], x)
    np.testing.assert_allclose(y.mean((0, 1, 2)), wanted.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(y.std((0, 1, 2)), wanted.std((0, 1, 2)), rtol=1e-3)


# What cannot be done


def test_one_scale_for_several_channels_takes_no_gains(params, batches):
    rules = ab.Rules([(".*kernel", ab.Uniform(bits=4, axis=None)), (".*", None)])
    found = calibrate(two_layers, params, rules, batches, matching="deviation")
    assert all("several channels have one scale" in layer.note for layer in found.layers)
    values = ab.dequantize(found.codes)
    np.testing.assert_allclose(
        outputs(values, batches).mean(0), outputs(params, batches).mean(0), atol=1e-4
    )


def test_a_weight_that_is_computed_is_rounded_and_named(rng, params, batches):
    def normed(params, x):
        kernel = params["first"]["kernel"]
        return x @ (kernel / jnp.linalg.norm(kernel, axis=0, keepdims=True))

    found = calibrate(normed, params, THREE, batches)
    (layer,) = found.layers
    assert layer.note == "first/kernel is not all that its weight is made of: it is rounded"
    rounded = ab.quantize(params, THREE)["first"]["kernel"]
    np.testing.assert_array_equal(found.codes["first"]["kernel"].codes, rounded.codes)


def test_levels_that_are_not_even_are_rounded_and_named(params, batches):
    rules = ab.Rules([(".*kernel", ab.LeastSquaresBinary(bits=2)), (".*", None)])
    found = calibrate(two_layers, params, rules, batches)
    assert all("not evenly spaced" in layer.note for layer in found.layers)


def test_a_weight_of_two_products_is_decided_once(rng, batches):
    kernel = jnp.asarray(rng.normal(size=(6, 6)), jnp.float32)
    twice = lambda p, x: jnp.tanh(x @ p["kernel"]) @ p["kernel"]
    found = calibrate(twice, {"kernel": kernel}, THREE, batches)
    assert [layer.note for layer in found.layers] == [
        "",
        "its weight was calibrated where it was met before",
    ]
    once = calibrate(lambda p, x: x @ p["kernel"], {"kernel": kernel}, THREE, batches)
    np.testing.assert_array_equal(found.codes["kernel"].codes, once.codes["kernel"].codes)


def test_weights_of_loops_and_of_look_ups_are_rounded_and_named(rng):
    kernel = jnp.asarray(rng.normal(size=(6, 6)), jnp.float32)

    def looped(params, x):
        return jax.lax.scan(lambda h, _: (jnp.tanh(h @ params["kernel"]), None), x, length=3)[0]

    def tied(params, tokens):
        return params["kernel"][tokens] @ params["kernel"].T

    rounded = ab.quantize({"kernel": kernel}, THREE)["kernel"]
    x = jnp.asarray(rng.normal(size=(20, 6)), jnp.float32)
    for f, inputs, reason in (
        (looped, x, "in every step of a loop"),
        (tied, jnp.asarray(rng.integers(0, 6, (20,))), "looked up too"),
    ):
        found = calibrate(f, {"kernel": kernel}, THREE, [(inputs,)])
        np.testing.assert_array_equal(found.codes["kernel"].codes, rounded.codes)
        assert all(reason in layer.note for layer in found.layers)


@pytest.mark.parametrize("method", [Gptq(), WeightedScales()], ids=str)
def test_layers_of_a_stack_that_share_scales_keep_them(rng, method):
    stack = jnp.asarray(rng.normal(size=(3, 5, 5)), jnp.float32)

    def scanned(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["kernel"])[0]

    x = jnp.asarray(rng.normal(size=(40, 5)), jnp.float32)
    found = calibrate(
        scanned, {"kernel": stack}, THREE, [(x,)], method=method, matching="deviation"
    )
    scale = ab.quantize({"kernel": stack}, THREE)["kernel"].scale
    np.testing.assert_array_equal(found.codes["kernel"].scale, scale)
    assert all("other layers have its scales too" in layer.note for layer in found.layers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": []}, "no batch to calibrate on"),
        ({"regression": 0.0}, "regression=0.0 must be positive"),
        ({"regression": np.nan}, "regression=nan must be positive"),
        ({"matching": "variance"}, "'variance' is none of"),
        ({"batches": [(jnp.ones((2, 6)),), (jnp.ones((3, 6)),)]}, "shapes.*Make them alike"),
        ({"rules": ab.Rules([("kernel", None)])}, "No rule covers"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(params, batches, change, message):
    given = {"rules": THREE, "batches": batches, **change}
    rules, batches = given.pop("rules"), given.pop("batches")
    with pytest.raises(ValueError, match=message):
        calibrate(two_layers, params, rules, batches, **given)


def test_a_way_that_depends_on_the_inputs_is_refused(params, batches):
    def branching(params, x):
        return jax.lax.cond(
            x.sum() > 0, lambda: x @ params["first"]["kernel"], lambda: x[:, :1] + jnp.zeros((1, 8))
        )

    with pytest.raises(ValueError, match="depends on its inputs"):
        calibrate(branching, params, THREE, batches)
