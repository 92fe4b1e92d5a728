"""What a training step takes: of a network counted from its shapes, of a program from its text.

Nothing is computed.
"""

import collections
import dataclasses
import math
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

_FLOAT32 = 4  # bytes
_LAYERS = (nn.Conv, nn.Dense)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution or dense layer, for one image.

    Attributes:
      multiply_adds: of its product with the kernel.
      inputs, outputs: numbers it reads and gives.
    """

    multiply_adds: int
    inputs: int
    outputs: int


@dataclasses.dataclass(frozen=True)
class NetworkCost:
    """Numbers of a network.

    Attributes:
      parameters: how many there are.
      statistics: means and variances of its norms, together.
      norms: how many norms.
      layers: by path, in the order of the forward pass.
    """

    parameters: int
    statistics: int
    norms: int
    layers: dict[str, Layer]

    @property
    def multiply_adds(self) -> int:
        """Of the forward pass, for one image."""
        return sum(layer.multiply_adds for layer in self.layers.values())

    @property
    def training_flops(self) -> int:
        """Of forward and backward pass, for one image; a multiply-add counts twice.

        The backward pass has two products of the same size for each layer, the gradients of its
        kernel and of its input; nobody needs the latter of the first layer.
        """
        first = next(iter(self.layers.values()))
        return 2 * (3 * self.multiply_adds - first.multiply_adds)

    @property
    def activation_numbers(self) -> int:
        """Numbers between layers that are read or written at least, for one image.

        Each of the three products of a layer reads or writes its inputs and its outputs once. What
        is between layers (norms, activations) is taken to be fused with them.
        """
        return 3 * sum(layer.inputs + layer.outputs for layer in self.layers.values())

    @property
    def gradient_bytes(self) -> int:
        """All-reduced in a step: float32, whatever the network computes in."""
        return _FLOAT32 * self.parameters

    @property
    def norm_bytes(self) -> int:
        """All-reduced in a step: each norm's statistics forward, and their gradients backward."""
        return 2 * _FLOAT32 * self.statistics


def network_cost(model: nn.Module, image_shape: tuple[int, int, int]) -> NetworkCost:
    """Count a network.

    Args:
      model: takes images and `train`.
      image_shape: (height, width, channels).
    """
    layers: dict[str, Layer] = {}

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        outputs = call(*args, **kwargs)
        module = context.module
        if isinstance(module, _LAYERS) and context.method_name == "__call__":
            kernel = module.variables["params"]["kernel"]
            layers["/".join(module.path)] = Layer(
                multiply_adds=outputs.size * math.prod(kernel.shape[:-1]),
                inputs=args[0].size,
                outputs=outputs.size,
            )
        return outputs

    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    with nn.intercept_methods(note):
        variables = jax.eval_shape(
            lambda images: model.init(jax.random.key(0), images, train=False), images
        )
    statistics = jax.tree.leaves(variables["batch_stats"])
    return NetworkCost(
        parameters=sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        statistics=sum(leaf.size for leaf in statistics),
        norms=len(statistics) // 2,
        layers=layers,
    )


_KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
# `%name = f32[8,4]{1,0} all-reduce(...)`, or a tuple of shapes where XLA has joined several.
_LINE = re.compile(rf"= (.*?) ({_KINDS})(?:-start)?\(")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+)\[([\d,]*)\]")


def collective_bytes(text: str) -> dict[str, int]:
    """Bytes of the results of each kind of collective on one device; one in a loop counts once.

    Args:
      text: `jax.jit(f).lower(...).compile().as_text()`.

    Returns:
      Bytes by kind (`all-reduce`, `all-gather`, ...); kinds that do not occur are left out.
    """
    found: collections.Counter[str] = collections.Counter()
    for shapes, kind in _LINE.findall(re.sub(r"/\*.*?\*/", "", text)):
        for dtype, sizes in _SHAPE.findall(shapes):
            bits = 8 if dtype == "pred" else int(re.sub(r"\D+", "", dtype))
            found[kind] += math.prod(int(n) for n in sizes.split(",") if n) * bits // 8
    return dict(found)
