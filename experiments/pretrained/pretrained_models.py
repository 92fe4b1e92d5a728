"""The networks to calibrate: with published weights, or --network=package.module:NAME of a user's.

That NAME is a function without arguments that returns a `PretrainedModel`:

    def mine():
        return PretrainedModel(forward=forward, params=params, normalize=normalize)
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import ab_jax as ab
from ab_jax.models.efficientnet_lite import EfficientNetLite
from ab_jax.models.mobilenet import MobileNet
from ab_jax.models.pretrained import load_pretrained, published_weights
from experiments.settings.choices import choose, is_elsewhere, load_elsewhere
from experiments.settings.config import FlagError

Forward = Callable[[Any, Array], Array]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PretrainedModel:
    """A network that was trained on ImageNet.

    Attributes:
      forward: of the parameters and normalized images, `[N, size, size, 3]`, returns logits
        `[N, 1000]` in ImageNet's order, in inference. Its products are JAX's own, by which
        `ab_jax.calibration` finds them.
      params: nested dictionaries of float arrays.
      normalize: uint8 pixels, RGB, as `forward` wants them: float32, of their shape.
      size: height and width of the images.
      weights: a pattern of the paths of all weights to quantize.
      depthwise, outer: of those among them that are depthwise, and that are in the first and the
        last layer; None: there are none, or they are as the others.
      reading: `forward` in a faster form, to read accuracies by; None: there is none.
      state: what else belongs to the network in a file, as collections of arrays.
    """

    forward: Forward
    params: Any
    normalize: Callable[[np.ndarray], np.ndarray]
    size: int = 224
    weights: str = r"(.*/)?kernel"
    depthwise: str | None = None
    outer: str | None = None
    reading: Forward | None = None
    state: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def rules(self, bits: int, depthwise_bits: int, outer_bits: int) -> ab.Rules:
        """A scale for each output channel, fitted by least squares, at these widths.

        Raises:
          ValueError: a width that there is not, or a pattern of which nothing is found.
        """
        widths = ((self.outer, outer_bits), (self.depthwise, depthwise_bits), (self.weights, bits))
        rules: list[tuple[str, ab.Quantizer | None]] = [
            (pattern, ab.Uniform(bits=width, axis=-1)) for pattern, width in widths if pattern
        ]
        return ab.Rules([*rules, (".*", None)])


def _minus_one_to_one(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32) / 127.5 - 1


def _about_127(pixels: np.ndarray) -> np.ndarray:
    return (pixels.astype(np.float32) - 127) / 128


@dataclasses.dataclass(frozen=True)
class _Published:
    make: Callable[..., nn.Module]
    normalize: Callable[[np.ndarray], np.ndarray]
    default_file: Callable[[], Path]


def _no_mobilenet() -> Path:
    raise FlagError(
        "--network=mobilenet_v1_025 needs --weights_file=PATH: the MobileNet of Keras applications "
        "of width 0.25, as keras.applications.MobileNet(alpha=0.25).save('mobilenet.h5') writes "
        "it, or as .safetensors with its names."
    )


PUBLISHED = {
    "mobilenet_v1_025": _Published(
        functools.partial(MobileNet, width=0.25), _minus_one_to_one, _no_mobilenet
    ),
    "efficientnet_lite0": _Published(
        EfficientNetLite,
        _about_127,
        functools.partial(published_weights, "efficientnet_lite0"),
    ),
}


def pretrained_model(network: str, weights_file: Path | None) -> PretrainedModel:
    """The network of a flag's value: published, or a user's.

    Args:
      network: a name in `PUBLISHED`, or `package.module:NAME`.
      weights_file: of a published one; None: that of an installed package, where there is one.

    Raises:
      FlagError: there is none of that name, it makes no `PretrainedModel`, or needs a file.
      ValueError: a file of other weights. OSError: it is not there, or cannot be read.
    """
    if is_elsewhere(network):
        if weights_file is not None:
            raise FlagError(f"--weights_file is not for --network={network}: omit it.")
        made = load_elsewhere("network", network)
        found = made() if callable(made) else made
        if not isinstance(found, PretrainedModel):
            raise FlagError(
                f"--network={network} gives a {type(found).__name__}; it should be a function that "
                f"returns a {PretrainedModel.__module__}.{PretrainedModel.__name__}."
            )
        return found
    published = choose("network", network, PUBLISHED)
    path = weights_file or published.default_file()
    # The convolutions made for CPUs are custom derivatives, in which no products are found.
    plain, fast = published.make(cpu_convolutions=False), published.make()
    like = jax.eval_shape(
        functools.partial(plain.init, train=False), jax.random.key(0), jnp.zeros((1, 224, 224, 3))
    )
    variables = load_pretrained(path, like)
    state = {"batch_stats": variables["batch_stats"]}

    def forward(model: nn.Module, params: Any, images: Array) -> Any:
        return model.apply({"params": params, **state}, images, train=False)

    return PretrainedModel(
        forward=functools.partial(forward, plain),
        reading=functools.partial(forward, fast),
        params=variables["params"],
        normalize=published.normalize,
        depthwise=r"(.*/)?depthwise/kernel",
        outer=r"(stem|head)/kernel",
        state=state,
    )
