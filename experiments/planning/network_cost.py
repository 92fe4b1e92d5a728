"""What a training step of a network takes, counted from its shapes; nothing is computed."""

import dataclasses
import math
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
