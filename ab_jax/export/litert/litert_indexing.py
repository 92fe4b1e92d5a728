"""Gathers, and slices at places that inputs tell, written into a LiteRT file of a function.

XLA's gathers take windows at many places. Each becomes a GATHER_ND of single entries along the axes
that places are told for: windows that are longer there get an entry for each of theirs. A GATHER
does, where places are told for one axis.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from ab_jax.export.litert.litert_elementwise import Write, each
from ab_jax.export.litert.litert_file import LitertFile
from ab_jax.export.litert.litert_layouts import counted
from ab_jax.export.litert.litert_tensors import Tensor, orderable
from ab_jax.export.traced import Constant, Dim, Operand, Operation, Shape, Size
from ab_jax.export.traced.carrying import NotCarriedError


class _Places:
    """Places of windows: int32 [batch..., axes], as XLA's indices tell them."""

    def __init__(self, file: LitertFile, operation: Operation) -> None:
        data, indices = operation.inputs[:2]
        self.file = file
        self.data: Shape = data.shape
        self.axes = list(operation.params["dimension_numbers"].start_index_map)
        self.known = np.asarray(indices.array) if isinstance(indices, Constant) else None
        self.tensor = file.cast(file.tensor(indices), np.int32)

    def limits(self, window: Sequence[Dim]) -> list[Dim]:
        """The last place at which a window lies inside, for each number."""
        return [self.data[a] - size for a, size in zip(self.axes, window, strict=True)]

    def are_inside(self, window: Sequence[Dim]) -> bool:
        """Whether that is known of all."""
        limits = self.limits(window)
        if self.known is None or any(isinstance(limit, Size) for limit in limits):
            return False
        return bool(np.all((self.known >= 0) & (self.known <= np.array(limits))))

    def inside(self, window: Sequence[Dim]) -> Tensor:
        """Whether each place lies inside, bool [batch...]."""
        file, limits = self.file, self.file.shape(self.limits(window))
        low = each(file, "GREATER_EQUAL", self.tensor, np.int32(0), dtype=np.bool_)
        high = each(file, "LESS_EQUAL", self.tensor, limits, dtype=np.bool_)
        both = each(file, "LOGICAL_AND", low, high)
        axes = np.array([len(both.shape) - 1], np.int32)
        options = schema.ReducerOptionsT(keepDims=False)
        return file.op("REDUCE_ALL", both, axes, shape=both.shape[:-1], options=options)

    def clipped(self, window: Sequence[Dim]) -> None:
        """Move each place inside."""
        file = self.file
        self.tensor = each(file, "MAXIMUM", self.tensor, np.int32(0))
        self.tensor = each(file, "MINIMUM", self.tensor, file.shape(self.limits(window)))

    def widen(self, window: Sequence[Dim]) -> list[int]:
        """A place for each entry of the windows; the numbers whose windows got an axis for that."""
        file = self.file
        wide = [k for k, size in enumerate(window) if size != 1]
        for k in wide:
            steps = file.reshape(counted(file, window[k]), (window[k], 1))
            unit = np.eye(len(self.axes), dtype=np.int32)[k : k + 1]
            shape = self.tensor.shape
            places = file.reshape(self.tensor, (*shape[:-1], 1, shape[-1]))
            self.tensor = each(file, "ADD", places, each(file, "MUL", steps, unit))
        return wide


def _gather(file: LitertFile, operation: Operation) -> Tensor:
    data, indices = operation.inputs
    numbers, sizes = operation.params["dimension_numbers"], operation.params["slice_sizes"]
    batching = numbers.operand_batching_dims
    places = _Places(file, operation)
    if not places.axes:
        raise NotCarriedError("of no axes")
    window = [sizes[a] for a in places.axes]
    # Axes of the data that places say nothing of: whole, or cut to their beginning.
    rest = [i for i in range(len(data.shape)) if i not in places.axes and i not in batching]
    kind = orderable(data.dtype)
    tensor = file.cast(file.tensor(data), kind)
    for axis in rest:
        tensor = file.slice(tensor, axis, 0, sizes[axis])
    inside = None
    if not places.are_inside(window):
        if str(operation.params["mode"]).upper().endswith("FILL_OR_DROP"):
            inside = places.inside(window)
        places.clipped(window)
    wide = places.widen(window)
    tensor = _picked(file, tensor, places, numbers, rest)
    # Now [batch..., wide windows..., rest...]; the result has these, and windows of size 1, where
    # `offset_dims` says.
    count, shape = len(indices.shape) - 1, operation.outputs[0].shape
    own = {places.axes[k]: count + i for i, k in enumerate(wide)}
    own |= {axis: count + len(wide) + i for i, axis in enumerate(rest)}
    gone = (*numbers.collapsed_slice_dims, *batching)
    kept = [a for a in range(len(data.shape)) if a not in gone]
    of_places = [i for i in range(len(shape)) if i not in numbers.offset_dims]
    source = {place: i for i, place in enumerate(of_places)}
    for place, axis in zip(numbers.offset_dims, kept, strict=True):
        if axis in own:
            source[place] = own[axis]
    tensor = file.transpose(tensor, [source[i] for i in sorted(source)])
    tensor = file.reshape(tensor, shape)
    if inside is not None:
        middle = tuple(shape[i] if i in of_places else 1 for i in range(len(shape)))
        outside = np.asarray(_fill_value(operation), kind)
        is_inside = file.reshape(inside, middle)
        tensor = each(file, "SELECT_V2", is_inside, tensor, outside, dtype=kind)
    return file.cast(tensor, operation.outputs[0].dtype)


def _picked(
    file: LitertFile, data: Tensor, places: _Places, numbers: Any, rest: Sequence[int]
) -> Tensor:
    """Entries of the data as [batch of places..., rest...]."""
    batching, of_batch = numbers.operand_batching_dims, numbers.start_indices_batching_dims
    batch = places.tensor.shape[:-1]
    if len(places.axes) == 1 and not batching:
        (axis,) = places.axes
        one = file.reshape(places.tensor, batch)
        shape = (*data.shape[:axis], *batch, *data.shape[axis + 1 :])
        found = file.op("GATHER", data, one, shape=shape, options=schema.GatherOptionsT(axis=axis))
        front, count = sum(i < axis for i in rest), len(batch)
        order = [*range(front, front + count), *range(front)]
        return file.transpose(found, [*order, *range(front + count, count + len(rest))])
    data = file.transpose(data, [*batching, *places.axes, *rest])
    where = places.tensor
    for axis in reversed(of_batch):
        steps = counted(file, batch[axis])
        middle = tuple(size if i == axis else 1 for i, size in enumerate(batch))
        steps = file.expand(file.reshape(steps, (*middle, 1)), (*batch, 1))
        where = file.joined([steps, where], len(batch))
    shape = (*batch, *data.shape[len(data.shape) - len(rest) :])
    return file.op("GATHER_ND", data, where, shape=shape)


def _fill_value(operation: Operation) -> Any:
    """JAX's value for what lies outside."""
    dtype, value = np.dtype(operation.outputs[0].dtype), operation.params["fill_value"]
    if value is not None:
        return value
    if dtype.kind == "b":
        return True
    if np.issubdtype(dtype, np.integer):
        ends = np.iinfo(dtype)
        return ends.min if ends.min < 0 else ends.max
    return np.nan


def _starts(file: LitertFile, indices: Sequence[Operand], limits: Sequence[Dim]) -> Tensor:
    """Where a slice begins, moved inside, int32 [axes]."""
    known = [int(np.asarray(index.array)) for index in indices if isinstance(index, Constant)]
    if len(known) == len(indices) and not any(isinstance(limit, Size) for limit in limits):
        return file.array(np.clip(known, 0, np.array(limits)).astype(np.int32))
    parts = [file.reshape(file.cast(file.tensor(i), np.int32), (1,)) for i in indices]
    begins = file.joined(parts, 0)
    begins = each(file, "MAXIMUM", begins, np.int32(0))
    return each(file, "MINIMUM", begins, file.shape(limits))


def _dynamic_slice(file: LitertFile, operation: Operation) -> Tensor:
    x, *indices = operation.inputs
    sizes = operation.params["slice_sizes"]
    limits = [whole - size for whole, size in zip(x.shape, sizes, strict=True)]
    begins = _starts(file, indices, limits)
    return file.op("SLICE", file.tensor(x), begins, file.shape(sizes), shape=tuple(sizes))


def _dynamic_update_slice(file: LitertFile, operation: Operation) -> Tensor:
    x, update, *indices = operation.inputs
    limits = [whole - size for whole, size in zip(x.shape, update.shape, strict=True)]
    begins = _starts(file, indices, limits)
    return file.op("DYNAMIC_UPDATE_SLICE", file.tensor(x), file.tensor(update), begins)


INDEXING: dict[str, Write] = {
    "gather": _gather,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
}
