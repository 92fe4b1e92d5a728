"""The graph of a trained model of ours at alpha 1, layer by layer as its code runs them.

    graph = describe(model, {"params": ab.quantize(params, rules), **model_state}, (224, 224, 3))

Batch norms are those of evaluation: a scale and a shift by channel, of the running statistics.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ab_jax.activations import TokenQuantizer, relu, relu6, sign
from ab_jax.export.dictionaries import check_unboxed
from ab_jax.export.graph.operations import (
    Add,
    Affine,
    Clip,
    Convolution,
    Dense,
    Flatten,
    Graph,
    MaxPool,
    Mean,
    Node,
    Operation,
    Pads,
    Quantize,
    Sign,
    Subsample,
    Weights,
    apply,
    check_one_scale,
    shape_of,
)
from ab_jax.input_ranges import checked_range
from ab_jax.linen import (
    RANGES,
    ActivationRules,
    Model,
    QuantizedInputs,
    WithQuantizedInputs,
    keep_input,
    module_of,
)
from ab_jax.models.binarynet import BinaryNet
from ab_jax.models.convolution import Padding, lax_padding
from ab_jax.models.mobilenet import MobileNet
from ab_jax.models.resnet import ResNet


def describe(
    model: Model, variables: Mapping[str, Any], image_shape: tuple[int, int, int]
) -> Graph:
    """The model's inference as a graph.

    Args:
      model: a `BinaryNet`, `MobileNet` or `ResNet`, or `WithQuantizedInputs` of one.
      variables: its collections; in `params` there is a `Quantized` for each leaf that has codes.
      image_shape: (height, width, channels).

    Raises:
      ValueError: another model, an activation that is none of `ab_jax.activations`, images of a
        shape that the model does not take, variables that are not its own or in boxes of Flax's, a
        range that is not finite, or a kernel with a scale for each bit (`LeastSquaresBinary`).
    """
    module = module_of(model)
    network = _NETWORKS.get(type(module))
    if network is None:
        raise ValueError(
            f"{type(module).__name__} is none of the models that can be described: "
            f"{', '.join(kind.__name__ for kind in _NETWORKS)}."
        )
    check_unboxed(variables)
    rules = model.rules if isinstance(model, WithQuantizedInputs) else _rules_of_module(module)
    builder = _Builder(module, rules, variables, image_shape)
    network(builder, module)
    return Graph(tuple(builder.nodes), image_shape)


def _binarynet(graph: "_Builder", model: BinaryNet) -> None:
    x = 0
    for i in range(6):
        x = graph.convolution(f"conv{i}", x)
        if i % 2:
            x = graph.add(f"pool{i}", MaxPool((2, 2), (2, 2), ((0, 0), (0, 0))), x)
        x = graph.activation(f"conv{i}", graph.norm(f"conv{i}_norm", x, 1e-5))
    x = graph.add("flatten", Flatten(), x)
    for name in ("dense0", "dense1"):
        x = graph.norm(f"{name}_norm", graph.dense(name, x), 1e-5)
        x = graph.activation(name, x)
    graph.norm("head_norm", graph.dense("head", x), 1e-5)


def _mobilenet(graph: "_Builder", model: MobileNet) -> None:
    def normed(name: str, x: int, stride: int = 1) -> int:
        x = graph.convolution(name, x, stride, model.padding)
        return graph.activation(name, graph.norm(f"{name}_norm", x, model.epsilon))

    x = normed("stem", 0, model.strides[0])
    for i, stride in enumerate(model.strides[1:]):
        x = normed(f"block{i}/depthwise", x, stride)
        x = normed(f"block{i}/pointwise", x)
    graph.dense("head", graph.add("mean", Mean(), x))


def _resnet(graph: "_Builder", model: ResNet) -> None:
    variant = model.variant
    norm = functools.partial(graph.norm, epsilon=variant.epsilon)
    x = graph.convolution("stem", 0, 1 if model.stem == 32 else 2, variant.padding)
    if variant.version == 1:
        x = graph.activation("stem", norm("stem_norm", x))
    if model.stem == 224:
        pads = graph.pads(x, (3, 3), 2, variant.padding)
        x = graph.add("stem_pool", MaxPool((3, 3), (2, 2), pads, variant.pool_padding), x)
    for name, _, stride in model.blocks():
        x = _residual_block(graph, model, name, x, stride)
    if variant.version == 2:
        x = graph.activation("output", norm("output_norm", x))
    graph.dense("head", graph.add("mean", Mean(), x))


def _residual_block(graph: "_Builder", model: ResNet, name: str, x: int, stride: int) -> int:
    variant = model.variant
    norm = functools.partial(graph.norm, epsilon=variant.epsilon)
    first = variant.version == 1
    y = x if first else graph.activation(f"{name}/input", norm(f"{name}/input_norm", x))
    if graph.has(f"{name}/shortcut"):
        shortcut = graph.convolution(f"{name}/shortcut", y, stride, variant.padding)
        if first:
            shortcut = norm(f"{name}/shortcut_norm", shortcut)
    else:
        given_out = graph.features(f"{name}/conv{2 if model.bottleneck else 1}")
        channels = given_out - graph.shape(x)[-1]
        shortcut = x
        if stride > 1 or channels:
            shortcut = graph.add(f"{name}/shortcut", Subsample(stride, channels), x)
    windows = (1, 3, 1) if model.bottleneck else (3, 3)
    strided = windows.index(3) if variant.strided_conv == "3x3" else 0
    for i in range(len(windows)):
        last = i == len(windows) - 1
        y = graph.convolution(f"{name}/conv{i}", y, stride if i == strided else 1, variant.padding)
        if first or not last:
            y = norm(f"{name}/conv{i}_norm", y)
        if not last:
            y = graph.activation(f"{name}/conv{i}", y)
    y = graph.add(f"{name}/sum", Add(), y, shortcut)
    return graph.activation(f"{name}/sum", y) if first else y


_NETWORKS: dict[type[nn.Module], Callable[["_Builder", Any], None]] = {
    BinaryNet: _binarynet,
    MobileNet: _mobilenet,
    ResNet: _resnet,
}


class _Builder:
    """The nodes so far, and the variables that further ones are made of. Values are numbered."""

    def __init__(
        self,
        model: nn.Module,
        rules: ActivationRules | None,
        variables: Mapping[str, Any],
        image_shape: tuple[int, int, int],
    ) -> None:
        self._model: Any = model
        self._rules = rules
        self._variables = variables
        self._shapes: list[tuple[int, ...]] = [image_shape]
        self.nodes: list[Node] = []

    def add(self, name: str, operation: Operation, *inputs: int) -> int:
        specs = [jax.ShapeDtypeStruct((1, *self._shapes[i]), jnp.float32) for i in inputs]
        try:
            given = jax.eval_shape(lambda *arrays: apply(operation, arrays), *specs)
        except (TypeError, ValueError) as error:
            shapes = ", ".join(str(list(spec.shape)) for spec in specs)
            raise ValueError(f"{name} does not take an input {shapes}: {error}") from error
        self._shapes.append(given.shape[1:])
        self.nodes.append(Node(name, operation, inputs, given.shape[1:]))
        return len(self.nodes)

    def shape(self, value: int) -> tuple[int, ...]:
        return self._shapes[value]

    def has(self, path: str) -> bool:
        branch = self._variables["params"]
        for key in path.split("/"):
            if key not in branch:
                return False
            branch = branch[key]
        return True

    def features(self, path: str) -> int:
        """How many features a layer gives out."""
        return shape_of(self._weights(path)[0])[-1]

    def pads(self, value: int, window: tuple[int, int], stride: int, padding: Padding) -> Pads:
        """What a window wants around a value, in numbers."""
        asked = lax_padding(padding, window[0])
        if isinstance(asked, str):
            size = self._shapes[value][:2]
            asked = lax.padtype_to_pads(size, window, (stride, stride), asked)
        (top, bottom), (left, right) = asked
        return (top, bottom), (left, right)

    def convolution(self, path: str, x: int, stride: int = 1, padding: Padding = "same") -> int:
        x = self._quantized(path, x)
        kernel, bias = self._weights(path)
        height, width, channels, _ = shape_of(kernel)
        pads = self.pads(x, (height, width), stride, padding)
        groups = self._shapes[x][-1] // channels
        return self.add(path, Convolution(kernel, bias, (stride, stride), pads, groups), x)

    def dense(self, path: str, x: int) -> int:
        return self.add(path, Dense(*self._weights(path)), self._quantized(path, x))

    def norm(self, path: str, x: int, epsilon: float) -> int:
        # In numpy, since JAX would compile each line for each number of channels.
        learned = jax.tree.map(np.asarray, self._at("params", path))
        statistics = jax.tree.map(np.asarray, self._at("batch_stats", path))
        scale = learned["scale"] / np.sqrt(statistics["var"] + np.float32(epsilon))
        shift = learned["bias"] - statistics["mean"] * scale
        return self.add(path, Affine(jnp.asarray(scale), jnp.asarray(shift)), x)

    def activation(self, name: str, x: int) -> int:
        function = self._model.activation
        plain = function.func if isinstance(function, functools.partial) else function
        if plain not in _ACTIVATIONS:
            raise ValueError(
                f"The activation {function} cannot be described. Those of ab_jax.activations can: "
                f"{', '.join(known.__name__ for known in _ACTIVATIONS)}."
            )
        return self.add(f"{name}_activation", _ACTIVATIONS[plain], x)

    def _quantized(self, path: str, x: int) -> int:
        """The value as the layer sees it."""
        quantizer = None if self._rules is None else self._rules.of(path)
        if quantizer is None:
            return x
        if isinstance(quantizer, TokenQuantizer):
            raise ValueError(
                f"The input of {path} has a scale for each image, which the formats for inference "
                f"do not hold. Give it an ActivationQuantizer."
            )
        limit = quantizer.limit
        if limit is None:
            by_hand = isinstance(self._model.quantize_input, QuantizedInputs)
            name = f"{path}_input" if by_hand else f"{path}/kernel"
            limit = checked_range(path, self._at(RANGES, name))
            if not limit > 0:  # never measured: the model leaves it alone, too
                return x
        return self.add(f"{path}_input", Quantize(quantizer, limit), x)

    def _weights(self, path: str) -> tuple[Weights, Array | None]:
        layer = self._at("params", path)
        check_one_scale(f"{path}/kernel", layer["kernel"])
        return layer["kernel"], layer.get("bias")

    def _at(self, collection: str, path: str) -> Any:
        branch = self._variables
        for key in (collection, *path.split("/")):
            if key not in branch:
                raise ValueError(
                    f"There is no {path} in the {collection} of these variables. Give those of "
                    f"the model itself."
                )
            branch = branch[key]
        return branch


def _rules_of_module(module: Any) -> ActivationRules | None:
    """Those of a model that calls its `quantize_input`, as until version 0.2; None: it has none."""
    quantize = module.quantize_input
    if quantize is keep_input:
        return None
    if not isinstance(quantize, QuantizedInputs):
        raise ValueError(f"quantize_input is {quantize}, which cannot be described.")
    return quantize.rules


_ACTIVATIONS: dict[Callable[..., Any], Operation] = {
    relu: Clip(float("inf")),
    relu6: Clip(6.0),
    sign: Sign(),
}
