"""An ONNX file of a function in the making: names of its values, sizes of open axes, weights.

What depends on no input stands at the head of the file, so that bodies of loops see it, and ONNX
Runtime computes it once, when it loads the file.
"""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from ab_jax.export.onnx.function_weights import stored
from ab_jax.export.onnx.onnx_file import OnnxFile
from ab_jax.export.traced import Codes, Dim, Ending, Operand, Operation, Shape, Size, Value

#: The end of a Slice past the end of any axis.
FAR = 2**62
# What ONNX Runtime computes numbers in that it has few kernels for.
_COMPUTED_IN: dict[str, str] = {
    **dict.fromkeys(("float16", "bfloat16"), "float32"),
    **dict.fromkeys(("int8", "int16", "uint8", "uint16"), "int32"),
    "uint32": "int64",
}
_MOST_SHARED = 16  # entries of an array that is looked for among others

Input = str | np.ndarray | np.generic


@dataclasses.dataclass(frozen=True)
class QuantizedName:
    """Codes of an activation in the file.

    Attributes:
      codes, scale, zero_point: names of the uint8 codes, and of what their numbers are made by.
      offset, unit: zero point and scale as numbers.
    """

    codes: str
    scale: str
    zero_point: str
    offset: int
    unit: np.ndarray


class FunctionFile(OnnxFile):
    """A file that is written operation by operation.

    Attributes:
      names: of the values so far.
      quantized: those of which there are codes.
      endings: of products that a bias or codes follow.
      written: operations that were written with others.
      fused, integer_biases: as `function_to_onnx` has them.
      stem: what names begin with.
    """

    def __init__(
        self,
        inputs: Mapping[Value, str],
        *,
        endings: Mapping[Operation, Ending],
        fused: bool,
        integer_biases: bool,
    ) -> None:
        super().__init__()
        self.names: dict[Operand, str] = {}
        self.quantized: dict[Operand, QuantizedName] = {}
        self.endings = endings
        self.written: set[Operation] = set()
        self.fused = fused
        self.integer_biases = integer_biases
        self.stem = ""
        self._head: list[onnx.NodeProto] = []
        self._by_content: dict[Any, str] = {}  # arrays and weights
        self._sizes: dict[Any, str] = {}
        self._axes: dict[str, tuple[str, int]] = {}
        for value, name in inputs.items():
            self.names[value] = self.unique(name)
            for axis, size in enumerate(value.shape):
                if isinstance(size, Size) and len(size.terms) == 1:
                    ((names, _),) = size.terms.items()
                    self._axes.setdefault(names[0], (name, axis))

    # Nodes

    def op(self, operator: str, *inputs: Input, **attributes: Any) -> str:
        """Append a node of one result; arrays among its inputs go into the file."""
        return self.ops(operator, *inputs, count=1, **attributes)[0]

    def ops(self, operator: str, *inputs: Input, count: int, **attributes: Any) -> list[str]:
        """Append a node of several results."""
        names = [self.given(x) for x in inputs]
        return self.node_of_several(operator, names, f"{self.stem}/{operator}", count, **attributes)

    def given(self, x: Input) -> str:
        """The name of an array, or a name as it is."""
        if isinstance(x, str):
            return x
        return self.constant(x) if x.size <= _MOST_SHARED else self.array(self.stem, x)

    def array(self, name: str, values: np.ndarray | np.generic) -> str:
        """Add an array, unless there is one of the same numbers; returns its name."""
        values = np.asarray(values)
        key = _content(values)
        if key not in self._by_content:
            turned = _content(values.T)
            if values.ndim == 2 and turned in self._by_content:
                with self.at_head(name):
                    self._by_content[key] = self.turned(self._by_content[turned])
            else:
                self._by_content[key] = super().array(name, values)
        return self._by_content[key]

    def own_array(self, name: str, values: np.ndarray) -> str:
        """Add an array, whether there is such a one or not; returns its name."""
        return super().array(name, values)

    @contextlib.contextmanager
    def at_head(self, stem: str) -> Iterator[None]:
        """Nodes within go to the head of the file."""
        outer, self.stem = (self.nodes, self.stem), stem
        self.nodes = self._head
        yield
        self.nodes, self.stem = outer

    @contextlib.contextmanager
    def apart(self) -> Iterator[list[onnx.NodeProto]]:
        """Nodes within go to a list of their own, that of a body."""
        outer, self.nodes = self.nodes, []
        yield self.nodes
        self.nodes = outer

    def finish(self, outputs: Sequence[str]) -> None:
        """Put the head in front, and leave out what the outputs do not need."""
        self.nodes = pruned([*self._head, *self.nodes], outputs)

    # Operands

    def ending(self, operation: Operation) -> Ending | None:
        """What follows a product of float32, to be written with it."""
        is_float32 = operation.outputs[0].dtype == np.float32
        return self.endings.get(operation) if is_float32 else None

    def name(self, operand: Operand) -> str:
        """The name of an operand's values."""
        if operand not in self.names:
            assert not isinstance(operand, Value), "values are named where they are written"
            if isinstance(operand, Codes):
                self.names[operand] = self.weight(operand)
            else:
                array = np.asarray(operand.array)
                if array.size <= _MOST_SHARED:
                    return self.constant(array)
                self.names[operand] = self.array(operand.path or "constant", array)
        return self.names[operand]

    def weight(
        self,
        codes: Codes,
        *,
        channels: int | None = None,
        in_product: bool = False,
        finer: bool = False,
    ) -> str:
        """The name of a weight's values.

        Args:
          codes: of the weight.
          channels: the axis of the channels of a product in which they meet codes.
          in_product: whether they are the matrix of a product.
          finer: see `Stored.written`.
        """
        fused = in_product and self.fused
        key = (codes.path, *_contents(codes), channels, fused, finer)
        if key not in self._by_content:
            with self.at_head(codes.path):
                turned = (codes.path, *_contents(codes.moved(np.transpose)), None, False, False)
                if turned in self._by_content and channels is None and not fused:
                    self._by_content[key] = self.turned(self._by_content[turned])
                else:
                    found = stored(codes)
                    self._by_content[key] = found.written(
                        self, channels=channels, fused=fused, finer=finer
                    )
        return self._by_content[key]

    def turned(self, matrix: str) -> str:
        """The name of the transpose of what stands in the file already, as tied weights do."""
        return self.op("Transpose", matrix)

    # Sizes

    def shape(self, dims: Sequence[Dim]) -> str:
        """The name of a shape, int64."""
        if not any(isinstance(dim, Size) for dim in dims):
            return self.constant(np.array(dims, np.int64).reshape(-1))
        key = tuple(dims)
        if key not in self._sizes:
            with self.at_head("shape"):
                parts = [self._size(dim) for dim in dims]
                self._sizes[key] = (
                    parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=0)
                )
        return self._sizes[key]

    def scalar(self, dim: Dim, dtype: Any = np.int64) -> str:
        """The name of a size as a scalar."""
        if not isinstance(dim, Size):
            return self.constant(np.array(dim, dtype))
        key = (dim, np.dtype(dtype).name)
        if key not in self._sizes:
            one = self.shape([dim])
            with self.at_head("size"):
                found = self.op("Squeeze", one, np.array([0]))
                self._sizes[key] = self.cast(found, np.int64, dtype)
        return self._sizes[key]

    def _size(self, dim: Dim) -> str:
        if not isinstance(dim, Size):
            return self.constant(np.array([dim], np.int64))
        if dim not in self._sizes:
            products = []
            for names, count in dim.terms.items():
                factors: list[Input] = [self._axis(name) for name in names]
                if count != 1 or not names:
                    factors.append(np.array([count], np.int64))
                products.append(functools.reduce(lambda a, b: self.op("Mul", a, b), factors))
            total = functools.reduce(lambda a, b: self.op("Add", a, b), products)
            self._sizes[dim] = self.given(total)
        return self._sizes[dim]

    def _axis(self, name: str) -> str:
        """The size of an open axis, int64 [1]."""
        if name not in self._sizes:
            of, axis = self._axes[name]
            self._sizes[name] = self.op("Shape", of, start=axis, end=axis + 1)
        return self._sizes[name]

    # What many operations need

    def cast(self, x: str, before: Any, after: Any) -> str:
        """The name of numbers in another dtype."""
        if np.dtype(before) == np.dtype(after):
            return x
        return self.op("Cast", x, to=onnx_type(after))

    def reshape(self, x: str, before: Shape, after: Shape) -> str:
        """The name of an array in another shape."""
        if tuple(before) == tuple(after):
            return x
        opened = [i for i, dim in enumerate(after) if isinstance(dim, Size)]
        if len(opened) == 1 and 0 not in after:
            wanted = [-1 if i in opened else dim for i, dim in enumerate(after)]
            return self.op("Reshape", x, np.array(wanted, np.int64))
        zeros = {"allowzero": 1} if 0 in after else {}
        return self.op("Reshape", x, self.shape(after), **zeros)

    def transpose(self, x: str, axes: Sequence[int]) -> str:
        """The name of an array with its axes in another order."""
        if list(axes) == sorted(axes):
            return x
        return self.op("Transpose", x, perm=[int(axis) for axis in axes])

    def slice(self, x: str, axis: int, start: Dim | str, end: Dim | str, step: int = 1) -> str:
        """The name of a part along an axis; ends may be names of int64 [1]."""
        starts, ends = (e if isinstance(e, str) else self.shape([e]) for e in (start, end))
        return self.op("Slice", x, starts, ends, np.array([axis]), np.array([step]))


def onnx_type(dtype: Any) -> int:
    """The number that ONNX has for a dtype."""
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def computed_in(dtype: Any) -> np.dtype:
    """What numbers of a dtype are computed in."""
    return np.dtype(_COMPUTED_IN.get(np.dtype(dtype).name, dtype))


def pruned(nodes: Sequence[onnx.NodeProto], outputs: Sequence[str]) -> list[onnx.NodeProto]:
    """The nodes that outputs need."""
    taken, kept = set(outputs), []
    for node in reversed(nodes):
        if not taken.isdisjoint(node.output):
            kept.append(node)
            taken.update(_names_in([node]))
    return kept[::-1]


def _names_in(nodes: Sequence[onnx.NodeProto]) -> Iterator[str]:
    """What nodes take, those of their bodies too."""
    for node in nodes:
        yield from node.input
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _names_in(graph.node)
                yield from (output.name for output in graph.output)


def orderable(dtype: Any) -> np.dtype:
    """What numbers are computed in, bools too: of these there are more kernels than of bools."""
    return np.dtype(np.int32) if np.dtype(dtype).kind == "b" else computed_in(dtype)


def _contents(codes: Codes) -> list[Any]:
    """What tells a weight from others."""
    return [_content(array) for array in (codes.codes, *codes.scales, codes.zero_point)]


def _content(array: np.ndarray | None) -> Any:
    """What tells arrays from others."""
    if array is None:
        return None
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()
    return array.dtype.name, array.shape, digest
