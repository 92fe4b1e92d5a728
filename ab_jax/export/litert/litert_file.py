"""A LiteRT file of a function in the making: tensors of its values, sizes of open axes, constants.

A value may be there in other forms than its own, from which its tensor is made once something wants
just that: as codes, and as an array that is still to be repeated along axes of size 1, which
operators on each entry do by themselves.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from ab_jax.export.litert.flatbuffer import OPEN
from ab_jax.export.litert.litert_endings import clipped_sums, code_names, litert_endings
from ab_jax.export.litert.litert_tensors import Tensor, TensorFile
from ab_jax.export.litert.litert_weights import weight_values
from ab_jax.export.traced import Codes, Dim, Graph, Operand, Operation, Shape, Size, Value
from ab_jax.export.traced.carrying import NotCarriedError

_MOST_AXES = 6  # that operators move about


class LitertFile(TensorFile):
    """A file that is written operation by operation.

    Attributes:
      tensors: of the values so far.
      codes: of those of which there are codes.
      dequantized: the values of codes of weights.
      narrow: of those that are still to be repeated along axes of size 1.
      endings: what follows products with a weight.
      clipped: what follows sums.
      code_names: names of the codes that operations make.
      written: operations that were written with others.
      narrowest: the least width of stored codes, in bits.
    """

    def __init__(
        self,
        graph: Graph,
        input_names: Sequence[str],
        *,
        sizes: Mapping[str, tuple[int, int]],
        narrowest: int,
        around: "LitertFile | None" = None,
    ) -> None:
        super().__init__(graph.axes, sizes, around)
        self.tensors: dict[Operand, Tensor] = {}
        self.codes: dict[Operand, Tensor] = {}
        self.narrow: dict[Operand, Tensor] = {}
        self.dequantized: dict[Tensor, Tensor] = {}
        self.endings = litert_endings(graph)
        self.clipped = clipped_sums(graph)
        self.code_names = code_names(graph)
        self.written: set[Operation] = set()
        self.narrowest = narrowest
        self._axes: dict[str, tuple[Tensor, int]] = {}
        for value, name in zip(() if around else graph.inputs, input_names, strict=True):
            self.tensors[value] = tensor = self.new(name, value.shape, value.dtype)
            for axis, size in enumerate(value.shape):
                if isinstance(size, Size) and len(size.terms) == 1:
                    ((names, _),) = size.terms.items()
                    self._axes.setdefault(names[0], (tensor, axis))

    # Operands

    def tensor(self, operand: Operand) -> Tensor:
        """An operand's values."""
        if operand not in self.tensors:
            if operand in self.narrow:
                self.tensors[operand] = self.expand(self.narrow[operand], operand.shape)
            elif operand in self.codes:
                self.tensors[operand] = self.floats(self.codes[operand], operand.dtype)
            elif isinstance(operand, Codes):
                self.tensors[operand] = weight_values(self, operand)
            else:
                assert not isinstance(operand, Value), "values are written before they are taken"
                self.tensors[operand] = self.array(np.asarray(operand.array), operand.path or "")
        return self.tensors[operand]

    def floats(self, codes: Tensor, dtype: Any) -> Tensor:
        """What codes stand for."""
        values = self.op("DEQUANTIZE", codes, dtype=np.float32)
        return self.cast(values, dtype)

    def broadcastable(self, operand: Operand) -> Tensor:
        """An operand's values, with axes of size 1 where they repeat."""
        return self.narrow[operand] if operand in self.narrow else self.tensor(operand)

    # Sizes

    def shape(self, dims: Sequence[Dim]) -> Tensor:
        """A shape, int32."""
        if not any(isinstance(dim, Size) for dim in dims):
            return self.array(np.array(dims, np.int32).reshape(-1))
        key = ("shape", *dims)
        if key not in self.known:
            parts = [self._size(dim) for dim in dims]
            self.known[key] = parts[0] if len(parts) == 1 else self.joined(parts, 0)
        return self.known[key]

    def scalar(self, dim: Dim, dtype: Any = np.int32) -> Tensor:
        """A size as a scalar."""
        if not isinstance(dim, Size):
            return self.array(np.array(dim, dtype))
        return self.cast(self.reshape(self.shape([dim]), ()), dtype)

    def _size(self, dim: Dim) -> Tensor:
        """A size as int32 [1]."""
        if not isinstance(dim, Size):
            return self.array(np.array([dim], np.int32))
        if dim not in self.known:
            products = []
            for names, count in dim.terms.items():
                factors = [self.axis(name) for name in names]
                if count != 1 or not names:
                    factors.append(self.array(np.array([count], np.int32)))
                products.append(functools.reduce(lambda a, b: self.op("MUL", a, b), factors))
            self.known[dim] = functools.reduce(lambda a, b: self.op("ADD", a, b), products)
        return self.known[dim]

    def known_axis(self, name: str, size: Tensor) -> None:
        """Make known what has the size of an open axis, in a body that has no such input."""
        self.known[name] = size

    def axis(self, name: str) -> Tensor:
        """The size of an open axis, int32 [1]."""
        if name not in self.known:
            of, axis = self._axes[name]
            options = schema.ShapeOptionsT(outType=schema.TensorType.INT32)
            shape = self.op(
                "SHAPE", of, shape=(len(of.shape),), dtype=np.int32, options=options, name="shape"
            )
            self.known[name] = self.slice(shape, 0, axis, axis + 1)
        return self.known[name]

    # What many operations need

    def reshape(self, x: Tensor, shape: Shape) -> Tensor:
        """The same numbers in another shape."""
        if tuple(x.shape) == tuple(shape):
            return x
        opened = [i for i, size in enumerate(shape) if isinstance(size, Size)]
        if len(opened) > 1 and _longer(x.shape) == _longer(shape):
            return self._with_ones(x, shape)
        if len(opened) > 1 or (opened and 0 in shape):
            return self.op("RESHAPE", x, self.shape(shape), shape=shape)
        wanted = [OPEN if isinstance(size, Size) else size for size in shape]
        options = schema.ReshapeOptionsT(newShape=wanted)
        return self.op("RESHAPE", x, np.array(wanted, np.int32), shape=shape, options=options)

    def _with_ones(self, x: Tensor, shape: Shape) -> Tensor:
        """In a shape that differs in axes of size 1, which needs no sizes of the others."""
        ones = [i for i, size in enumerate(x.shape) if size == 1]
        if ones:
            options = schema.SqueezeOptionsT(squeezeDims=ones)
            x = self.op("SQUEEZE", x, shape=_longer(x.shape), options=options)
        for axis, size in enumerate(shape):
            if size == 1:
                wider = (*x.shape[:axis], 1, *x.shape[axis:])
                x = self.op("EXPAND_DIMS", x, np.array([axis], np.int32), shape=wider)
        return x

    def transpose(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        """The axes in another order."""
        if list(axes) == sorted(axes):
            return x
        if len(axes) > _MOST_AXES:
            raise NotCarriedError(f"of {len(axes)} axes")
        shape = tuple(x.shape[axis] for axis in axes)
        return self.op("TRANSPOSE", x, np.array(axes, np.int32), shape=shape)

    def slice(self, x: Tensor, axis: int, start: Dim, end: Dim, step: int = 1) -> Tensor:
        """A part along an axis, of which all is inside."""
        count, size = end - start, x.shape[axis]
        if (start, end, step) == (0, size, 1):
            return x
        if step != 1 and not isinstance(count, Size):
            count = -(-count // step)
        elif step != 1:
            raise NotCarriedError(f"in steps of {step} along an axis that is open")
        shape = (*x.shape[:axis], count, *x.shape[axis + 1 :])
        begins = [start if i == axis else 0 for i in range(len(shape))]
        if step == 1:
            whole: Any = -1 if end == size else count
            sizes = [whole if i == axis else -1 for i in range(len(shape))]
            return self.op("SLICE", x, self.shape(begins), self.shape(sizes), shape=shape)
        ends = [end if i == axis else 0 for i in range(len(shape))]
        steps = np.array([step if i == axis else 1 for i in range(len(shape))], np.int32)
        others = sum(1 << i for i in range(len(shape)) if i != axis)
        options = schema.StridedSliceOptionsT(beginMask=others, endMask=others)
        given = (x, self.shape(begins), self.shape(ends), steps)
        return self.op("STRIDED_SLICE", *given, shape=shape, options=options)

    def joined(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        """Several behind one another along an axis."""
        if len(parts) == 1:
            return parts[0]
        size = sum((part.shape[axis] for part in parts[1:]), start=parts[0].shape[axis])
        shape = (*parts[0].shape[:axis], size, *parts[0].shape[axis + 1 :])
        options = schema.ConcatenationOptionsT(axis=axis)
        dtype = parts[0].dtype
        if dtype == np.uint16:  # there is none of these
            parts = [self.cast(part, np.int32) for part in parts]
        found = self.op("CONCATENATION", *parts, shape=shape, options=options)
        return self.cast(found, dtype)

    def expand(self, x: Tensor, shape: Shape) -> Tensor:
        """An array with its axes of size 1 repeated."""
        if tuple(x.shape) == tuple(shape):
            return x
        return self.op("BROADCAST_TO", x, self.shape(shape), shape=shape)


def _longer(shape: Shape) -> Shape:
    """A shape without its axes of size 1."""
    return tuple(size for size in shape if size != 1)
