"""Small networks of every kind with random variables, which the tests of exports carry out."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ab_jax as ab
from ab_jax.activations import ACTIVATIONS, ActivationQuantizer
from ab_jax.linen import RANGES, Model, WithQuantizedInputs
from ab_jax.models.binarynet import BinaryNet
from ab_jax.models.mobilenet import MobileNet
from ab_jax.models.resnet import CIFAR, KERAS_V1, KERAS_V2, TIMM_V2, ResNet
from ab_jax.products import ActivationRules

CLASSES = 5


class Network(NamedTuple):
    """A model at alpha 1, its variables with codes in them, and the size of its images."""

    model: Model
    variables: dict[str, Any]
    image_shape: tuple[int, int, int]


def uniform_rules(bits: int, **fields: Any) -> ab.Rules:
    """As the experiments have it: the first and the last layer at 8 bits."""

    def quantizer(bits: int) -> ab.Uniform:
        return ab.Uniform(bits=bits, scale="absmax", **fields)

    return ab.Rules(
        [
            (r"(stem|head)/kernel", quantizer(8)),
            (r"(.*/)?kernel", quantizer(bits)),
            (r".*", None),
        ]
    )


def with_inputs(
    model: nn.Module, bits: int, limit: float | None = None, first: str = "stem"
) -> WithQuantizedInputs:
    """Images signed at 8 bits, the rest as bits say, with measured ranges or a fixed one."""
    images = ActivationQuantizer(bits=8, signed=True)
    return WithQuantizedInputs(
        model,
        ActivationRules(
            [
                (first, images),
                ("head", ActivationQuantizer(bits=8, limit=limit, signed=False)),
                (r".*", ActivationQuantizer(bits=bits, limit=limit, signed=False)),
            ]
        ),
    )


BINARY = ab.Rules([(r"(.*/)?kernel", ab.Binary()), (r".*", None)])
ONE_SCALE = ab.Rules([(r"(.*/)?kernel", ab.Binary(axis=None)), (r".*", None)])
SMALL: dict[str, Any] = {"width": 1 / 16, "num_classes": CLASSES}


def _resnet(**fields: Any) -> ResNet:
    return ResNet(stage_sizes=(1, 2), **SMALL, **fields)


#: Model, rules of its weights, size of its images. Between them they have every operation.
LONG = pytest.mark.long
NETWORKS: dict[str, tuple[Model, ab.Rules, int]] = {
    "binarynet": (with_inputs(BinaryNet(**SMALL), 8, first="conv0"), BINARY, 8),
    "binarynet, sign": (BinaryNet(**SMALL, activation=ACTIVATIONS["sign"]), ONE_SCALE, 8),
    "mobilenet": (
        with_inputs(MobileNet(**SMALL, stem=32), 8, 6.0),
        uniform_rules(4),
        8,
    ),
    "resnet v1": (with_inputs(_resnet(stem=32), 4), uniform_rules(4, axis=None), 8),
    "resnet v1, keras": (
        with_inputs(_resnet(variant=KERAS_V1), 8),
        uniform_rules(8, symmetric=False),
        32,
    ),
    "resnet v2": (
        with_inputs(_resnet(variant=TIMM_V2, stem=64), 8),
        uniform_rules(8),
        16,
    ),
    "resnet v2, keras": (
        with_inputs(_resnet(variant=KERAS_V2), 4),
        uniform_rules(2),
        33,
    ),
    "resnet, basic": (
        with_inputs(
            ResNet((1, 1), 8, bottleneck=False, num_classes=CLASSES, variant=CIFAR, stem=32), 8
        ),
        uniform_rules(4),
        8,
    ),
}

#: For tests of every day some of them, for `make test-full` all.
CASES = [
    name if name in ("binarynet", "mobilenet") else pytest.param(name, marks=LONG)
    for name in NETWORKS
]


def _random_codes(
    shape: tuple[int, ...], quantizer: ab.Quantizer, rng: np.random.Generator
) -> ab.Quantized:
    """As the quantizer could give them, at once: it would be compiled for each shape."""
    scale_shape = quantizer.scale_shape(shape)
    affine = isinstance(quantizer, ab.Uniform) and not quantizer.symmetric
    most = max(1, 2 ** (quantizer.bits - 1) - 1)
    if quantizer.bits == 1:
        codes = rng.choice([-1, 1], shape)
    else:
        codes = rng.integers(-most - affine, most + 1, shape)
    scale = rng.uniform(1, 3, scale_shape) / (most * np.sqrt(np.prod(shape[:-1])))
    return ab.Quantized(
        codes=jnp.asarray(codes, jnp.int8),
        scale=jnp.asarray(scale, jnp.float32),
        zero_point=jnp.asarray(rng.integers(-3, 4, scale_shape), jnp.int8) if affine else None,
        bits=quantizer.bits,
        dtype="float32",
    )


def make(name: str, rng: np.random.Generator) -> Network:
    """The network with kernels of about unit gain, and norms of both signs."""
    model, rules, size = NETWORKS[name]
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array | ab.Quantized:
        name = path[-1].key
        if path[0].key == RANGES:
            return jnp.asarray(rng.uniform(2, 3, leaf.shape), leaf.dtype)
        if name == "kernel":
            where = jax.tree_util.keystr(path[1:], simple=True, separator="/")
            return _random_codes(leaf.shape, rules.of(where), rng)
        if name in ("bias", "mean"):
            value = rng.normal(scale=0.3, size=leaf.shape)
        else:
            value = rng.uniform(0.5, 2, leaf.shape)
            if name == "scale":
                value *= rng.choice([-1, 1], leaf.shape)
        return jnp.asarray(value, leaf.dtype)

    return Network(model, jax.tree.map_with_path(draw, shapes), (size, size, 3))
