"""Norms may give out bfloat16: statistics and logits stay float32, gradients near theirs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array

from ab_jax.models.binarynet import BinaryNet
from ab_jax.models.efficientnet_lite import EfficientNetLite
from ab_jax.models.mobilenet import MobileNet
from ab_jax.models.resnet import TIMM_V2, ResNet
from experiments.settings.build import make_model, settled
from experiments.settings.config import Config, FlagError
from experiments.settings.networks import NETWORKS

BFLOAT16, FLOAT32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
MODELS: dict[str, Callable[..., Any]] = {
    "binarynet": partial(BinaryNet, width=1 / 32),
    "resnet": partial(ResNet, (1, 1), 8, variant=TIMM_V2),
    "mobilenet": partial(MobileNet, width=1 / 32),
    "efficientnet_lite": partial(EfficientNetLite, width=1 / 16),
}


def norms_of(apply: Callable[[], Any]) -> dict[str, tuple[Array, Array]]:
    """By the path of each batch norm that a call runs, what it takes in and what it gives out."""
    found = {}

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        y = call(*args, **kwargs)
        if isinstance(context.module, nn.BatchNorm) and context.method_name == "__call__":
            found["/".join(context.module.path)] = (args[0], y)
        return y

    with nn.intercept_methods(note):
        apply()
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("norm_dtype", [None, FLOAT32, BFLOAT16])
def test_norms_give_out_what_is_asked_for_and_the_rest_stays_float32(
    shapes: Callable[..., Any], name: str, norm_dtype: Any
) -> None:
    asked = {} if norm_dtype is None else {"norm_dtype": norm_dtype}
    model = MODELS[name](dtype=jnp.bfloat16, **asked)
    variables = shapes(model, (32, 32, 3))
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    train = partial(model.apply, train=True, mutable=["batch_stats"])
    results: list[Any] = []
    seen = norms_of(lambda: results.append(jax.eval_shape(train, variables, images)))
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, results))} == {FLOAT32}
    given = {path: y.dtype for path, (_, y) in seen.items()}
    own = FLOAT32 if name == "binarynet" else BFLOAT16
    expected = dict.fromkeys(given, norm_dtype or own)
    if name == "binarynet":
        expected["head_norm"] = FLOAT32  # the logits
    assert given == expected
    assert len(given) > 6


def test_statistics_are_as_exact_as_float32_and_outputs_as_bfloat16(
    rng: np.random.Generator, random_variables: Callable[..., Any]
) -> None:
    model = BinaryNet(width=1 / 32, dtype=jnp.bfloat16, norm_dtype=jnp.bfloat16)
    variables = random_variables(model, (16, 16, 3))
    images = rng.normal(size=(32, 16, 16, 3)).astype(np.float32)
    updated: dict[str, Any] = {}

    def train() -> None:
        _, changed = model.apply(variables, images, train=True, mutable=["batch_stats"])
        updated.update(changed["batch_stats"])

    # Not compiled: between operations a compiler may keep more digits than there are.
    for path, (x, y) in norms_of(train).items():
        x, y = (np.asarray(array, np.float64).reshape(-1, array.shape[-1]) for array in (x, y))
        mean, var = x.mean(0), x.var(0)
        running, params = (tree[path] for tree in (variables["batch_stats"], variables["params"]))
        for kind, value in {"mean": mean, "var": var}.items():
            expected = 0.9 * np.asarray(running[kind], np.float64) + 0.1 * value
            # Of sums in float32, and of E[x^2] - E[x]^2; a sum in bfloat16 is off by 1e-2.
            scale = np.square(x).mean(0) if kind == "var" else np.abs(x).mean(0)
            error = np.abs(np.asarray(updated[path][kind], np.float64) - expected)
            assert np.all(error <= 1e-6 * (scale + np.abs(expected))), (path, kind)
        if path == "head_norm":
            continue
        normalized = (x - mean) / np.sqrt(var + 1e-5)
        expected = normalized * params["scale"] + params["bias"]
        terms = np.abs(normalized * params["scale"]) + np.abs(params["bias"])
        # Half a unit in the last of bfloat16's 8 digits, and what float32 makes of the terms.
        assert np.all(np.abs(y - expected) <= 2.0**-8 * np.abs(expected) + 1e-5 * terms)


def test_gradients_differ_from_those_of_float32_norms_by_roundings(
    rng: np.random.Generator, random_variables: Callable[..., Any]
) -> None:
    """Convolutions are float32, so that what norms give out is all that is rounded."""
    # Without kinks, but for the poolings, where the largest of a window may be another.
    make = partial(BinaryNet, width=1 / 16, activation=lambda x, alpha: jnp.tanh(x))
    models = [make(norm_dtype=dtype) for dtype in (FLOAT32, BFLOAT16)]
    variables = random_variables(models[0], (8, 8, 3))
    params = variables["params"]
    for name, leaves in params.items():
        if name.endswith("_norm"):
            params[name] = {"scale": np.ones_like(leaves["scale"]), "bias": 0 * leaves["bias"]}
    images = rng.normal(size=(64, 8, 8, 3)).astype(np.float32)
    directions = rng.normal(size=(64, 10)).astype(np.float32)

    def gradient(model: Any) -> Any:
        def loss(params: Any) -> Array:
            whole = {**variables, "params": params}
            logits, _ = model.apply(whole, images, train=True, mutable=["batch_stats"])
            return jnp.vdot(logits, directions)

        return jax.jit(jax.grad(loss))(params)

    exact, rounded = (gradient(model) for model in models)
    assert {leaf.dtype for leaf in jax.tree.leaves(rounded)} == {FLOAT32}
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, rounded, exact))
    # 0.02 to 0.16 over 60 seeds; of two gradients that have nothing in common it is above 1.
    assert 0 < difference < 0.5 * optax.tree.norm(exact)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("asked", [None, "float32", "bfloat16"])
def test_the_flag_reaches_each_of_our_networks(network: str, asked: Any) -> None:
    flags = {"network": network, "dtype": "bfloat16"}
    config = settled(Config(**flags, norm_dtype=asked))
    model: Any = make_model(config, num_classes=10, image_size=32)
    default: Any = make_model(settled(Config(**flags)), num_classes=10, image_size=32)
    assert model.norm_dtype == (default.norm_dtype if asked is None else asked)


def test_norms_of_fewer_digits_than_layers_are_refused() -> None:
    with pytest.raises(FlagError, match=r"--norm_dtype=bfloat16.*--dtype=bfloat16 too"):
        settled(Config(norm_dtype="bfloat16"))
