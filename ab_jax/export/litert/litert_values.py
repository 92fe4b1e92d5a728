"""Where the values of a graph are in a LiteRT file: as floats, as int8 codes, or as both."""

import math

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from ab_jax.export.graph.operations import Clip, Graph, Operation, Pads, Quantize
from ab_jax.export.litert.flatbuffer import Flatbuffer, Scales
from ab_jax.export.litert.litert_integers import activation_scales

#: Clippings that operators do by themselves, by their upper end.
CLIPS = {
    math.inf: schema.ActivationFunctionType.RELU,
    6.0: schema.ActivationFunctionType.RELU6,
}


class Values:
    """The file so far. Values are numbered as `Node.inputs` has them.

    Attributes:
      file: that is written.
      graph: that is written into it.
      codes: tensors of the values that are quantized, by number.
      done: nodes that are a part of an operator before them.
    """

    def __init__(self, graph: Graph) -> None:
        self.file = Flatbuffer()
        self.graph = graph
        self.codes: dict[int, int] = {}
        self.done: set[int] = set()
        self._floats = {0: self.file.tensor("images", graph.image_shape)}

    def floats(self, value: int) -> int:
        """The tensor that has a value in float; dequantizes it where there is none."""
        if value not in self._floats:
            name, codes = self.graph.nodes[value - 1].name, self.codes[value]
            floats = self.new_floats(f"{name}/values", value)
            options = schema.DequantizeOptionsT()
            self.file.operator("DEQUANTIZE", [codes], [floats], options, version=2)
        return self._floats[value]

    def new_floats(self, name: str, value: int) -> int:
        """A tensor for a value in float, which the next operator gives."""
        self._floats[value] = self.file.tensor(name, self.shape(value))
        return self._floats[value]

    def new_codes(self, name: str, value: int, quantize: Quantize) -> int:
        """A tensor for a value in codes, which the next operator gives."""
        scales = activation_scales(quantize)
        self.codes[value] = self.file.tensor(name, self.shape(value), "INT8", scales)
        return self.codes[value]

    def shape(self, value: int) -> tuple[int, ...]:
        """Without the batch."""
        return self.graph.nodes[value - 1].shape if value else self.graph.image_shape

    def operation(self, value: int) -> Operation | None:
        """What gives a value; None gives the images."""
        return self.graph.nodes[value - 1].operation if value else None

    def only_user(self, value: int) -> int | None:
        """The node that takes a value, if there is one and no other."""
        users = self.graph.users(value)
        return users[0] if len(users) == 1 else None

    def clip_after(self, value: int) -> tuple[int, int]:
        """The clipping that is all that is done with a value, now done, and the value it gives."""
        user = self.only_user(value)
        if user is not None:
            operation = self.graph.nodes[user].operation
            if isinstance(operation, Clip) and operation.high in CLIPS:
                self.done.add(user)
                return CLIPS[operation.high], user + 1
        return schema.ActivationFunctionType.NONE, value

    def padded(
        self,
        name: str,
        x: int,
        shape: tuple[int, ...],
        pads: Pads,
        fill: float = 0.0,
        scales: Scales | None = None,
    ) -> int:
        """A tensor [batch, *shape] surrounded by a number; codes by that which stands for 0."""
        (top, bottom), (left, right) = pads
        height, width, channels = shape
        larger = (height + top + bottom, width + left + right, channels)
        sizes = np.array([(0, 0), (top, bottom), (left, right), (0, 0)], np.int32)
        kind = "FLOAT32" if scales is None else "INT8"
        y = self.file.tensor(name, larger, kind, scales)
        inputs = [x, self.file.constant(f"{name}/sizes", sizes)]
        if fill:
            inputs.append(self.file.constant(f"{name}/fill", np.array([fill], np.float32)))
            self.file.operator("PADV2", inputs, [y], schema.PadV2OptionsT())
        else:
            version = 1 if scales is None else 2
            self.file.operator("PAD", inputs, [y], schema.PadOptionsT(), version)
        return y


def padding_kind(
    shape: tuple[int, ...], window: tuple[int, ...], strides: tuple[int, int], pads: Pads
) -> int | None:
    """The padding of LiteRT's operators that is this one, or None: it takes an operator of its own.

    Args:
      shape: of the input, height first.
      window: height and width.
      strides: along height and along width.
      pads: those asked for.
    """
    if pads == ((0, 0), (0, 0)):
        return int(schema.Padding.VALID)
    same = []
    for size, taps, stride in zip(shape, window, strides, strict=False):
        total = max((-(-size // stride) - 1) * stride + taps - size, 0)
        same.append((total // 2, total - total // 2))
    return int(schema.Padding.SAME) if pads == tuple(same) else None
