"""An ONNX file in the making: its nodes and its arrays, each under a name of its own."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper


class OnnxFile:
    """Nodes in the order they run, and the arrays they take (initializers).

    Names of a network's layers appear in the names of what belongs to them.
    """

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._arrays: dict[str, onnx.TensorProto] = {}
        self._taken: set[str] = set()

    def node(self, operator: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """Append a node; returns the name of what it gives out."""
        return self.node_of_several(operator, inputs, name, 1, **attributes)[0]

    def node_of_several(
        self, operator: str, inputs: list[str], name: str, count: int, **attributes: Any
    ) -> list[str]:
        """Append a node; returns the names of the several things that it gives out."""
        names = [self.unique(name) for _ in range(count)]
        called = names[0] if names else self.unique(name)
        self.nodes.append(helper.make_node(operator, inputs, names, name=called, **attributes))
        return names

    def array(self, name: str, values: np.ndarray | np.generic) -> str:
        """Add an array; returns its name."""
        name = self.unique(name)
        self._arrays[name] = numpy_helper.from_array(np.asarray(values), name)
        return name

    def constant(self, values: np.ndarray | np.generic) -> str:
        """The name of a small array that all who need the like share."""
        values = np.asarray(values)
        text = "x".join(map(str, values.ravel().tolist()))
        name = f"constant/{values.dtype}{list(values.shape)}/{text}"
        if name not in self._arrays:
            self.array(name, values)
        return name

    def whole_numbers(self, name: str, values: np.ndarray, *, int4: bool) -> str:
        """The name of int8 values; int4 in the file if asked for, and cast where it is loaded."""
        if not int4:
            return self.array(name, values)
        stored = self.int4_array(f"{name}_int4", values)
        return self.node("Cast", [stored], name, to=onnx.TensorProto.INT8)

    def int4_array(self, name: str, values: np.ndarray) -> str:
        """Add int8 values in 4 bits; returns the name."""
        halves = np.zeros(values.size + values.size % 2, np.uint8)
        halves[: values.size] = values.reshape(-1).view(np.uint8) & 15
        data = (halves[::2] | halves[1::2] << 4).tobytes()  # the first of two in the lower half
        name = self.unique(name)
        self._arrays[name] = helper.make_tensor(
            name, onnx.TensorProto.INT4, values.shape, data, raw=True
        )
        return name

    def rename(self, old: str, new: str) -> None:
        """Give what a node gives out another name."""
        for node in self.nodes:
            for names in (node.input, node.output):
                for i, name in enumerate(names):
                    if name == old:
                        names[i] = new

    def model(
        self,
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: Sequence[onnx.ValueInfoProto],
        *,
        opset: int,
        ir_version: int,
        metadata: dict[str, str],
    ) -> onnx.ModelProto:
        """The model from inputs to outputs, checked by ONNX's own checker."""
        graph = helper.make_graph(
            self.nodes, "network", inputs, outputs, list(self._arrays.values())
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", opset)],
            ir_version=ir_version,
            producer_name="ab_jax",
        )
        helper.set_model_props(model, metadata)
        onnx.checker.check_model(model, full_check=True)
        return model

    def unique(self, name: str) -> str:
        """The name, with a number behind it if it is taken."""
        unique, number = name, 1
        while unique in self._taken:
            number += 1
            unique = f"{name}_{number}"
        self._taken.add(unique)
        return unique
