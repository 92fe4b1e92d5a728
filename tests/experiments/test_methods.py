"""Methods by name: their estimators, and layers in the order in which a network calls them."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ab_jax as ab
from ab_jax.models.binarynet import BinaryNet
from experiments.settings.build import layerwise_schedule, make_model, settled
from experiments.settings.config import Config, FlagError
from experiments.settings.levels import WEIGHTS, weight_quantizer, weight_rules
from experiments.settings.methods import METHODS, estimator_of

RULES = ab.Rules([(r"(.*/)?kernel", ab.Binary()), (r".*", None)])
BINARYNET = [*(f"conv{i}" for i in range(6)), "dense0", "dense1", "head"]


def test_the_cap_is_that_of_the_compensation() -> None:
    w, alpha = jnp.asarray([[0.3], [-0.7]]), 0.9
    for cap, factor in ((1.0, 0.1), (4.0, 0.4), (20.0, 1.0)):
        estimator = estimator_of(METHODS["ab_compensated"], {"cap": cap})
        gradient = jax.grad(lambda w, f=estimator: f(w, ab.Binary(), alpha).sum())(w)
        np.testing.assert_allclose(gradient, factor, rtol=1e-5)
    for name, method in METHODS.items():
        if name != "ab_compensated":
            assert estimator_of(method, {"cap": 1.0, "layer_order": "forward"}) is method.estimator


def test_what_a_method_does_not_read_is_not_compared() -> None:
    ramp = {"ramp", "ramp_start", "ramp_stop", "act_start", "act_stop"}
    for name, ramp_flags in (
        ("float", set()),
        ("ste", set()),
        ("lsq", set()),
        ("float_then_ste", {"ramp_stop", "act_stop"}),
        ("ab", ramp),
        ("parq", ramp),
    ):
        assert ramp - METHODS[name].unread == ramp_flags, name
    for name, flag in (("ab_compensated", "cap"), ("ab_layerwise", "layer_order")):
        assert [m for m, method in METHODS.items() if flag not in method.unread] == [name]


def test_a_methods_ramp_is_its_own_unless_the_flag_says() -> None:
    assert settled(Config(method="ab")).ramp == "cubic"
    assert settled(Config(method="parq")).ramp == "sigmoid"
    assert settled(Config(method="parq", ramp="linear")).ramp == "linear"


def test_every_name_of_weights_is_its_quantizer() -> None:
    expected = {
        "binary": ab.Binary(),
        "ternary": ab.Ternary(),
        **{f"int{bits}": ab.Uniform(bits=bits) for bits in range(2, 9)},
        **{f"least_squares_binary{b}": ab.LeastSquaresBinary(bits=b) for b in range(1, 5)},
    }
    assert {name: weight_quantizer(Config(), name) for name in WEIGHTS} == expected
    assert weight_quantizer(Config(weight_scale="one"), "binary") == ab.Binary(fixed_scale=1.0)
    bitnet = Config(weights="ternary", weight_scale="absmean", weight_granularity="tensor")
    assert weight_quantizer(bitnet, "ternary") == ab.Ternary(scale="absmean", axis=None)
    outer, *_ = weight_rules(dataclasses.replace(bitnet, outer_bits=8)).rules
    assert outer[1] == ab.Uniform(bits=8, axis=None)
    groups = Config(weight_granularity="group", weight_group_size=32, weight_zero_point=True)
    assert weight_quantizer(groups, "int3") == ab.Uniform(bits=3, symmetric=False, group_size=32)


@pytest.mark.parametrize("network", ["mobilenet_v1", "efficientnet_lite0"])
def test_depthwise_convolutions_may_have_bits_of_their_own(network: str) -> None:
    config = Config(network=network, weights="int3", depthwise_bits=6, outer_bits=8)
    model = make_model(config, num_classes=5, image_size=32)
    images = jnp.zeros((1, 32, 32, 3))
    init = functools.partial(model.init, train=False)
    params = jax.eval_shape(init, jax.random.key(0), images)["params"]
    codes = jax.eval_shape(lambda p: ab.quantize(p, weight_rules(config)), params)
    widths: dict[int, set[str]] = {}
    for path, leaf in jax.tree.leaves_with_path(
        codes, is_leaf=lambda leaf: isinstance(leaf, ab.Quantized)
    ):
        if isinstance(leaf, ab.Quantized):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            widths.setdefault(leaf.bits, set()).add(name)
    assert widths[8] == {"stem/kernel", "head/kernel"}
    assert widths[6] == {name for paths in widths.values() for name in paths if "depthwise" in name}
    assert len(widths[6]) > 10
    assert len(widths) == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"network": "resnet20", "depthwise_bits": 8}, "names no depthwise convolutions"),
        ({"weights": "int9"}, "--weights=int9 is not known. Choose one of binary"),
        ({"weights": "binary", "weight_scale": "absmax"}, "takes least_squares or one"),
        ({"weights": "ternary", "weight_scale": "one"}, "takes absmean or least_squares"),
        ({"weights": "int4", "weight_scale": "absmean"}, "takes absmax or least_squares"),
        ({"weights": "int4", "weight_scale": "one"}, "takes absmax or least_squares"),
        ({"weight_granularity": "group"}, "give group and a size, or neither"),
        ({"weight_group_size": 4}, "give group and a size, or neither"),
        ({"weights": "ternary", "weight_zero_point": True}, "--weight_zero_point is for"),
        ({"act_bits": 4, "activation": "sign"}, "--act_bits=4 is for --activation=relu"),
        ({"act_stop": 0.5}, "--act_start and --act_stop are for --act_bits"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(FlagError, match=message):
        settled(Config(**flags))


class Middle(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.relu(nn.Conv(2, (1, 1), name="inner")(x))


class Upwards(nn.Module):
    """Calls its layers against the alphabet, one of them within another module."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = nn.Conv(2, (1, 1), name="z")(x)
        x = Middle(name="m")(x)
        return nn.Dense(3, name="a")(x.reshape(x.shape[0], -1))


@pytest.mark.parametrize("order", ["forward", "backward"])
@pytest.mark.parametrize(
    ("model", "layers"),
    [(BinaryNet(num_classes=3, width=1 / 32), BINARYNET), (Upwards(), ["z", "m/inner", "a"])],
    ids=["BinaryNet", "Upwards"],
)
def test_layers_follow_the_calls(model: Any, layers: list[str], order: Any) -> None:
    n = len(layers)
    config = Config(layer_order=order, ramp="linear", ramp_start=0.1, ramp_stop=1.0)
    schedule = layerwise_schedule(config, model, (8, 8, 1), RULES, steps=100 * n)
    in_order = layers if order == "forward" else layers[::-1]
    for i, layer in enumerate(in_order):
        # Each has a window of 90 steps, from 10 n on.
        middle = 10 * n + 90 * i + 45
        alphas = [float(schedule(middle)(f"{other}/kernel")) for other in in_order]
        np.testing.assert_allclose(alphas, [1.0] * i + [0.5] + [0.0] * (n - i - 1), atol=1e-6)
        assert float(schedule(100 * n)(f"{layer}/kernel")) == 1.0


@pytest.mark.parametrize(
    ("granularity", "axes"), [("channel", (0, 1, 2)), ("tensor", (0, 1, 2, 3))]
)
def test_scales_at_the_largest_magnitude_of_a_channel_or_the_tensor(
    granularity: Any, axes: tuple[int, ...], rng: np.random.Generator
) -> None:
    w = rng.normal(size=(3, 3, 4, 5)).astype(np.float32)
    config = Config(weight_scale="absmax", weight_granularity=granularity)
    quantized = weight_quantizer(config, "int4").quantize(jnp.asarray(w))
    largest = np.abs(w).max(axes, keepdims=True)
    np.testing.assert_allclose(quantized.scale, largest / 7, rtol=1e-6)
