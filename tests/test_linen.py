"""Linen modules with quantized inputs: values, collections, and the ranges of older networks."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ab_jax as ab
from ab_jax.activations import ActivationQuantizer, TokenQuantizer
from ab_jax.linen import (
    CUT_OFF,
    NOT_FINITE,
    RANGES,
    QuantizedInputs,
    WithQuantizedInputs,
    check_ranges,
    ranges_by_address,
)
from ab_jax.models.mobilenet import MobileNet
from ab_jax.models.resnet import ResNet
from ab_jax.products import ActivationRules, CutOffWarning, mark
from tests.products.rounded_inputs import clear, rounded

EIGHT = ActivationRules([(".*", ActivationQuantizer(bits=8))])
MIXED = ActivationRules(
    [
        ("stem", ActivationQuantizer(bits=8, momentum=0.9)),
        ("head", ActivationQuantizer(bits=8, limit=6.0, signed=False)),
        (".*", ActivationQuantizer(bits=4, percentile=99.0, momentum=0.5, signed=False)),
    ]
)


class Net(nn.Module):
    """Two layers, one after a GELU, with dropout and an argument `alpha` that is given out."""

    @nn.compact
    def __call__(self, x: Any, *, train: bool, alpha: Any = 0.25) -> Any:
        x = nn.gelu(nn.Dense(8, name="first")(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(3, name="second")(x), alpha


def leaves(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree.leaves_with_path(tree)
    }


def test_values_and_ranges_are_those_of_numpy(rng, key):
    rules = ActivationRules(
        [
            ("first", ActivationQuantizer(bits=4, momentum=0.75)),
            ("second/kernel", ActivationQuantizer(bits=3, limit=1.5, signed=False)),
        ]
    )
    model = WithQuantizedInputs(Net(), rules)
    variables = model.init(key, np.ones((5, 6)), train=False)
    assert leaves(variables[RANGES]) == {"first/kernel": 0, "second/kernel": 1.5}
    params = jax.tree.map(np.asarray, variables["params"])
    all_clear = False
    while not all_clear:
        x = rng.normal(size=(5, 6)).astype(np.float32)
        seen = rounded(x, np.abs(x).max(), 4, True)
        first = seen @ params["first"]["kernel"] + params["first"]["bias"].reshape(1, -1)
        hidden = np.asarray(nn.gelu(first))
        all_clear = clear(x, np.abs(x).max(), 4, True) and clear(hidden, 1.5, 3, False)
    (y, alpha), state = model.apply(
        variables, x, train=False, alpha=1.0, mutable=[RANGES, CUT_OFF, NOT_FINITE]
    )
    assert alpha == 1, "the model is given it too"
    wanted = rounded(hidden, 1.5, 3, False) @ params["second"]["kernel"]
    np.testing.assert_allclose(y, wanted + params["second"]["bias"].reshape(1, -1), atol=1e-5)
    np.testing.assert_allclose(state[RANGES]["first"]["kernel"], np.abs(x).max())
    cut = np.maximum(-hidden, 0).sum() / np.abs(hidden).sum()
    np.testing.assert_allclose(state[CUT_OFF]["second"]["kernel"], cut, rtol=1e-4)
    assert leaves(state[NOT_FINITE]) == {"first/kernel": 0, "second/kernel": 0}

    variables = {**variables, RANGES: state[RANGES]}
    _, moved = model.apply(variables, 3 * x, train=False, mutable=[RANGES])
    assert set(moved) == {RANGES}
    expected = np.abs(x).max() * (0.75 + 3 * 0.25)
    np.testing.assert_allclose(moved[RANGES]["first"]["kernel"], expected, rtol=1e-6)
    # They rest where they are not mutable, and what is beyond them looks alike.
    far = [model.apply(variables, gain * x, train=False)[0] for gain in (1e9, 2e9)]
    np.testing.assert_array_equal(*far)


def test_alpha_0_is_the_model_bit_for_bit(rng, key):
    x = rng.normal(size=(5, 6)).astype(np.float32)
    model = WithQuantizedInputs(Net(), EIGHT)
    variables = model.init({"params": key, "dropout": key}, x, train=True)
    dropped = {"train": True, "rngs": {"dropout": key}}
    got, state = model.apply(variables, x, **dropped, alpha=0.0, mutable=True)
    plain = {"params": variables["params"]}
    wanted, _ = Net().apply(plain, x, **dropped, alpha=0.0, mutable=True)
    np.testing.assert_array_equal(got[0], wanted[0])
    assert set(state) == {"params", RANGES, CUT_OFF, NOT_FINITE}


SMALL: dict[str, Any] = {"num_classes": 3, "width": 1 / 16}


@pytest.mark.filterwarnings("ignore:.*goes with the next release:FutureWarning")
@pytest.mark.parametrize(
    "network",
    [
        ResNet(stage_sizes=(1, 1), stem=32, **SMALL),
        pytest.param(
            ResNet(stage_sizes=(1, 1), stem=32, **SMALL, cpu_convolutions=False),
            marks=pytest.mark.long,
        ),
        pytest.param(MobileNet(**SMALL, stem=32), marks=pytest.mark.long),
    ],
    ids=["ResNet for CPUs", "ResNet", "MobileNet"],
)
def test_our_networks_train_as_by_their_own_calls_bit_for_bit(rng, key, network):
    """Of version 0.2: logits, statistics, ranges and gradients of three steps."""
    old, new = (
        network.clone(quantize_input=QuantizedInputs(MIXED)),
        WithQuantizedInputs(network, MIXED),
    )
    images = rng.normal(size=(3, 4, 8, 8, 3)).astype(np.float32)
    state = {
        model: jax.jit(lambda x, model=model: model.init(key, x, train=False))(images[0])
        for model in (old, new)
    }
    found: dict[Any, list[Any]] = {old: [], new: []}
    for model in state:
        params = state[model].pop("params")

        def loss_fn(params, rest, x, model=model):
            y, rest = model.apply(
                {"params": params, **rest},
                x,
                train=True,
                alpha=0.5,
                mutable=["batch_stats", RANGES],
            )
            return jnp.sum(jnp.sin(y)), (rest, y)

        step = jax.jit(jax.grad(loss_fn, has_aux=True))
        for x in images:
            gradient, (state[model], y) = step(params, state[model], x)
            found[model].append((gradient, y))
    jax.tree.map(np.testing.assert_array_equal, *found.values())
    like = new.initial_ranges({"params": params, **state[new]}, images[0], train=False)
    state[old][RANGES] = ranges_by_address(state[old][RANGES], like)
    fixed = state[new][RANGES]["head"]["kernel"]
    assert fixed == 6
    jax.tree.map(np.testing.assert_array_equal, state[old], state[new])


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x, x)


def test_attention_has_ranges_by_the_names_of_its_operands(rng, key):
    x = rng.normal(size=(2, 5, 8)).astype(np.float32)
    model = WithQuantizedInputs(Attention(), EIGHT)
    variables = model.init(key, x)
    assert set(leaves(variables[RANGES])) == {
        *(f"attention/{name}/kernel" for name in ("query", "key", "value", "out")),
        *("attention/product/query", "attention/product/key"),
        *("attention/product#1/product", "attention/product#1/value"),
    }
    _, state = model.apply(variables, x, mutable=[RANGES])
    assert 0 < state[RANGES]["attention"]["product#1"]["product"] <= 1, "a softmax"


def test_a_scan_of_layers_has_a_range_a_layer_and_needs_no_word_of_it(rng, key):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: Any, _: Any) -> Any:
            return nn.relu(nn.Dense(4, name="dense")(x)), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            layers = nn.scan(
                Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return layers(name="layers")(x, None)[0]

    x = rng.normal(size=(2, 4)).astype(np.float32)
    model = WithQuantizedInputs(Stack(), EIGHT)
    variables = model.init(key, x)
    _, state = model.apply(variables, x, alpha=0.0, mutable=[RANGES])
    dense = jax.tree.map(np.asarray, variables["params"]["layers"]["dense"])
    expected = []
    for kernel, bias in zip(dense["kernel"], dense["bias"], strict=True):
        expected.append(np.abs(x).max())
        x = np.maximum(x @ kernel + bias.reshape(1, -1), 0)
    np.testing.assert_allclose(state[RANGES]["layers"]["dense"]["kernel"], expected, rtol=1e-5)


def test_scales_a_token_need_no_ranges(rng, key):
    x = rng.normal(size=(5, 6)).astype(np.float32)
    rules = ActivationRules([(".*", TokenQuantizer(bits=4))])
    model = WithQuantizedInputs(nn.Dense(3), rules)
    variables = model.init(key, x)
    assert set(variables) == {"params"}
    dense = jax.tree.map(np.asarray, variables["params"])
    seen = np.stack([rounded(row, np.abs(row).max(), 4, True) for row in x])
    wanted = seen @ dense["kernel"] + dense["bias"].reshape(1, -1)
    np.testing.assert_allclose(model.apply(variables, x), wanted, atol=1e-5)


def test_the_table_is_of_shapes_alone(key):
    x = jax.ShapeDtypeStruct((2, 10**5), jnp.float32)
    model = WithQuantizedInputs(Net(), EIGHT)
    variables = jax.eval_shape(lambda x: model.init(key, x, train=False), x)
    rules = ab.Rules([(".*/kernel", ab.Ternary()), (".*", None)])
    table = str(model.describe_products(variables, x, rules=rules, train=False))
    assert "first/kernel" in table
    assert "[2, 100000] x [100000, 8]" in table
    assert table.count("Ternary 2") == table.count("8 bits") == 2


# Errors


def test_variables_without_ranges_are_refused(rng, key):
    x = rng.normal(size=(5, 6)).astype(np.float32)
    variables = Net().init(key, x, train=False)
    model = WithQuantizedInputs(Net(), EIGHT)
    with pytest.raises(ValueError, match=r"hold no 'activation_ranges'.*initial_ranges\("):
        model.apply(variables, x, train=False)
    ranges = model.initial_ranges(variables, x, train=False)
    model.apply({**variables, RANGES: ranges}, x, train=False)
    del ranges["second"]
    with pytest.raises(ValueError, match="no range for the input of second/kernel"):
        model.apply({**variables, RANGES: ranges}, x, train=False)


def test_rules_that_fit_no_product_are_refused(key):
    rules = ActivationRules([("third", ActivationQuantizer(bits=8)), (".*", None)])
    with pytest.raises(ValueError, match="Rule 'third' matches no"):
        WithQuantizedInputs(Net(), rules).init(key, np.ones((5, 6)), train=False)


def test_addresses_that_cannot_be_nested_are_named(key):
    class Marked(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return mark(nn.Dense(3, name="a")(mark(x, "a")), "b")

    with pytest.raises(ValueError, match=r"a and a/kernel cannot both hold a range"):
        WithQuantizedInputs(Marked(), EIGHT).init(key, np.ones((5, 6)))


# Calls of a part of a model, and in other ways


class Tied(nn.Module):
    def setup(self) -> None:
        self.embed, self.dense = nn.Embed(7, 6), nn.Dense(6)

    def __call__(self, tokens: Any) -> Any:
        return self.embed.attend(self.dense(self.embed(tokens)))

    def encode(self, tokens: Any) -> Any:
        return self.dense(self.embed(tokens))

    def look_up(self, tokens: Any) -> Any:
        return self.embed(tokens)


def test_methods_have_the_ranges_of_the_products_that_they_run(key):
    tokens = jnp.arange(4)
    rules = ActivationRules([("embed/embedding", ActivationQuantizer(bits=8)), *EIGHT.rules])
    model = WithQuantizedInputs(Tied(), rules)
    variables = model.init(key, tokens)
    assert set(leaves(variables[RANGES])) == {"dense/kernel", "embed/embedding"}
    y, state = model.apply(variables, tokens, alpha=0.0, mutable=[RANGES], method="encode")
    np.testing.assert_allclose(
        y, Tied().apply({"params": variables["params"]}, tokens, method="encode"), rtol=1e-6
    )
    limits = leaves(state[RANGES])
    largest = np.abs(variables["params"]["embed"]["embedding"][:4]).max()
    assert limits == {"dense/kernel": largest, "embed/embedding": 0}, "as it was"
    model.apply(variables, tokens, mutable=[RANGES], method=Tied.look_up)  # no product at all


def test_a_head_for_training_alone_is_left_out_of_evaluation(rng, key):
    class TwoHeads(nn.Module):
        @nn.compact
        def __call__(self, x: Any, train: bool) -> Any:
            h = nn.Dense(4, name="stem")(x)
            y = nn.Dense(3, name="head")(h)
            return (y, nn.Dense(2, name="aux")(h)) if train or self.is_initializing() else y

    x = rng.normal(size=(5, 6)).astype(np.float32)
    model = WithQuantizedInputs(TwoHeads(), EIGHT)
    variables = model.init(key, x, train=True)
    assert model.apply(variables, x, train=False).shape == (5, 3)
    without = model.init(key, x, train=False)
    with pytest.raises(ValueError, match="no range for the input of aux/kernel"):
        model.apply(without, x, train=True)


def test_a_cache_is_made_by_a_call_of_full_length(rng, key):
    net = nn.MultiHeadDotProductAttention(2, decode=True)
    model = WithQuantizedInputs(net, EIGHT)
    whole = rng.normal(size=(2, 5, 4)).astype(np.float32)
    variables = model.init(key, whole)
    jax.tree.map(np.testing.assert_array_equal, variables["cache"], net.init(key, whole)["cache"])
    plain = {name: variables[name] for name in ("params", "cache")}
    for t in range(5):
        y, state = model.apply(variables, whole[:, t : t + 1], alpha=0.0, mutable=["cache", RANGES])
        wanted, rest = net.apply(plain, whole[:, t : t + 1], mutable=["cache"])
        np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)
        variables, plain = {**variables, **state}, {**plain, **rest}
    assert min(leaves(variables[RANGES]).values()) > 0


def test_arguments_reach_what_is_called_as_those_of_the_model(rng, key):
    class Scaled(nn.Module):
        @nn.compact
        def __call__(self, x: Any, alpha: Any = 1.0, train: bool = False) -> Any:
            y = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(3)(x))
            self.sow("intermediates", "name", "of a string")
            return {"y": y * alpha, "name": "logits", "count": 3}

        def other(self, x: Any) -> Any:
            return self(x)

    x = rng.normal(size=(5, 6)).astype(np.float32)
    model = WithQuantizedInputs(Scaled(), EIGHT)
    variables = model.init(key, x, mutable=["params", "batch_stats"])
    assert set(variables) == {"params", "batch_stats", RANGES}
    full = model.apply(variables, x, alpha=0.0, method="other")
    found, state = model.apply(variables, x, 0.3, np.bool_(False), mutable=["intermediates"])
    assert (found["name"], found["count"]) == ("logits", 3)
    assert state["intermediates"]["name"] == ("of a string",)
    np.testing.assert_allclose(found["y"], 0.3 * full["y"], rtol=1e-6)


def test_what_does_not_fit_is_named(rng, key):
    x = rng.normal(size=(5, 6)).astype(np.float32)
    model = WithQuantizedInputs(Net(), EIGHT)
    variables = model.init(key, x, train=False)
    codes = ab.quantize(variables["params"], ab.Rules([(".*kernel", ab.Ternary()), (".*", None)]))
    with pytest.raises(TypeError, match=r"hold codes.*ab\.dequantize"):
        model.apply({**variables, "params": codes}, x, train=False)
    wrong = {**variables[RANGES], "first": {"kernel": jnp.ones(2)}}
    with pytest.raises(ValueError, match=r"input of first/kernel has the shape \(2,\), not \(\)"):
        model.apply({**variables, RANGES: wrong}, x, train=False)
    with pytest.raises(TypeError, match="must be ActivationRules, not list"):
        WithQuantizedInputs(Net(), [(".*", None)])


def test_ranges_are_looked_at_as_the_call_left_them(rng, key):
    x = rng.normal(size=(50, 6)).astype(np.float32)
    unsigned = ActivationRules([(".*", ActivationQuantizer(bits=8, signed=False))])
    model = WithQuantizedInputs(nn.Dense(3, name="dense"), unsigned)
    variables = model.init(key, x)
    with pytest.raises(ValueError, match="never measured"):
        check_ranges(variables)
    _, state = model.apply(variables, x, mutable=[RANGES, CUT_OFF])
    with pytest.warns(CutOffWarning, match=r"input of kernel cuts off \d\d\.\d%"):
        check_ranges(state)


# Ranges of older networks


def test_ranges_of_older_networks_get_addresses():
    like = {
        "stem": {"kernel": 0.0},
        "block": {"conv_input": {"kernel": 0.0}},
        "head": {"kernel": 6.0},
    }
    beside = {"stem_input": 1.5, "block": {"conv_input_input": 2.5}}
    within = {"stem": {"input": 1.5}, "block": {"conv_input": {"input": 2.5}}}
    wanted = {"stem/kernel": 1.5, "block/conv_input/kernel": 2.5, "head/kernel": 6.0}
    for old in (beside, within):
        assert leaves(ranges_by_address(old, like)) == wanted
    today = ranges_by_address(within, like)
    assert ranges_by_address(today, like) == today
    assert ranges_by_address({"input": 2.0}, {"kernel": 0.0}) == {"kernel": 2.0}, (
        "a model that is a layer"
    )
