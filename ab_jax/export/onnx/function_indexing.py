"""Gathers, scatters and slices at places that inputs tell, written into an ONNX file of a function.

XLA's gathers take windows at many places. Each becomes a GatherND of single entries along the axes
that places are told for: windows that are longer there get an entry for each of theirs. Scatters
likewise; an entry that is dropped, since its place lies outside, goes into a row behind the last,
which is cut off.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import TensorProto

from ab_jax.export.onnx.function_elementwise import Write
from ab_jax.export.onnx.function_file import FAR, FunctionFile, orderable
from ab_jax.export.onnx.function_layouts import expanded
from ab_jax.export.traced import Constant, Dim, Operand, Operation, Shape, Size
from ab_jax.export.traced.carrying import NotCarriedError

_REDUCTIONS = {
    "scatter": "none",
    "scatter-add": "add",
    "scatter-mul": "mul",
    "scatter-min": "min",
    "scatter-max": "max",
    "scatter_add": "add",
    "scatter_mul": "mul",
    "scatter_min": "min",
    "scatter_max": "max",
}


def _is_dropping(operation: Operation) -> bool:
    """Whether what lies outside is left out, and not moved inside."""
    return str(operation.params["mode"]).upper().endswith("FILL_OR_DROP")


class _Places:
    """Places of windows: int64 [batch..., axes], as XLA's indices tell them."""

    def __init__(self, file: FunctionFile, operation: Operation, axes: Sequence[int]) -> None:
        self.file = file
        data, indices = operation.inputs[:2]
        self.data: Shape = data.shape
        self.axes = list(axes)  # of the data, one for each number of a place
        self.batch: Shape = indices.shape[:-1]
        self.known = np.asarray(indices.array) if isinstance(indices, Constant) else None
        self.name = file.cast(file.name(indices), indices.dtype, np.int64)

    def limits(self, window: Sequence[Dim]) -> list[Any]:
        """The last place at which a window lies inside, for each number."""
        return [self.data[a] - size for a, size in zip(self.axes, window, strict=True)]

    def are_inside(self, window: Sequence[Dim]) -> bool:
        """Whether that is known of all."""
        limits = self.limits(window)
        if not self.axes:
            return True
        if self.known is None or any(isinstance(limit, Size) for limit in limits):
            return False
        return bool(np.all((self.known >= 0) & (self.known <= np.array(limits))))

    def inside(self, window: Sequence[Dim]) -> str:
        """Whether each place lies inside, bool [batch...]."""
        file, limits = self.file, self.file.shape(self.limits(window))
        low = file.op("GreaterOrEqual", self.name, np.int64(0))
        high = file.op("LessOrEqual", self.name, limits)
        both = file.op("Cast", file.op("And", low, high), to=TensorProto.INT32)
        both = file.op("ReduceMin", both, np.array([-1]), keepdims=0)
        return file.op("Cast", both, to=TensorProto.BOOL)

    def clipped(self, window: Sequence[Dim]) -> None:
        """Move each place inside."""
        file = self.file
        self.name = file.op("Max", self.name, np.int64(0))
        self.name = file.op("Min", self.name, file.shape(self.limits(window)))

    def widen(self, window: Sequence[Dim]) -> list[int]:
        """A place for each entry of the windows; the numbers whose windows got an axis for that."""
        file = self.file
        wide = [k for k, size in enumerate(window) if size != 1]
        for k in wide:
            steps = file.op("Range", np.int64(0), file.scalar(window[k]), np.int64(1))
            steps = file.op("Unsqueeze", steps, np.array([1]))
            unit = np.eye(len(self.axes), dtype=np.int64)[k]
            offsets = file.op("Mul", steps, unit)
            self.name = file.op("Add", file.op("Unsqueeze", self.name, np.array([-2])), offsets)
            self.batch = (*self.batch, window[k])
        return wide


def _gather(file: FunctionFile, operation: Operation) -> str:
    data, indices = operation.inputs
    numbers, sizes = operation.params["dimension_numbers"], operation.params["slice_sizes"]
    batching = numbers.operand_batching_dims
    places = _Places(file, operation, numbers.start_index_map)
    if not places.axes:
        raise NotCarriedError("of no axes")
    window = [sizes[a] for a in places.axes]
    # Axes of the data that places say nothing of: whole, or cut to their beginning.
    rest = [i for i in range(len(data.shape)) if i not in places.axes and i not in batching]
    name = file.name(data)
    for axis in rest:
        if sizes[axis] != data.shape[axis]:
            name = file.slice(name, axis, 0, sizes[axis])
    inside = ""
    if not places.are_inside(window):
        if _is_dropping(operation):
            inside = places.inside(window)
        places.clipped(window)
    wide = places.widen(window)
    name = _picked(file, name, places, numbers, rest)
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
    present = sorted(source)
    name = file.transpose(name, [source[i] for i in present])
    name = file.reshape(name, tuple(shape[i] for i in present), shape)
    if not inside:
        return name
    middle = tuple(shape[i] if i in of_places else 1 for i in range(len(shape)))
    is_inside = file.reshape(inside, tuple(shape[i] for i in of_places), middle)
    return _filled(file, operation, is_inside, name)


def _picked(
    file: FunctionFile, data: str, places: _Places, numbers: Any, rest: Sequence[int]
) -> str:
    """The name of entries of the data as [batch of places..., rest...]."""
    batching, of_batch = numbers.operand_batching_dims, numbers.start_indices_batching_dims
    count = len(places.batch)
    if len(places.axes) == 1 and not batching:
        (axis,) = places.axes
        one = file.op("Squeeze", places.name, np.array([-1]))
        found = file.op("Gather", data, one, axis=axis)  # [in front, batch..., behind]
        front, total = sum(i < axis for i in rest), count + len(rest)
        order = [*range(front, front + count), *range(front), *range(front + count, total)]
        return file.transpose(found, order)
    found = file.transpose(data, [*batching, *places.axes, *rest])
    order = [*of_batch, *(i for i in range(count) if i not in of_batch)]
    where = file.transpose(places.name, [*order, count])
    found = file.op("GatherND", found, where, batch_dims=len(batching))
    back = [order.index(i) for i in range(count)]
    return file.transpose(found, [*back, *range(count, count + len(rest))])


def _filled(file: FunctionFile, operation: Operation, is_inside: str, x: str) -> str:
    """What was gathered, or JAX's value for what lies outside."""
    dtype = np.dtype(operation.outputs[0].dtype)
    value = operation.params["fill_value"]
    if value is None:
        if dtype.kind == "b":
            value = True
        elif np.issubdtype(dtype, np.integer):
            ends = np.iinfo(dtype)
            value = ends.min if ends.min < 0 else ends.max
        else:
            value = np.nan
    kind = orderable(dtype)
    filled = file.op("Where", is_inside, file.cast(x, dtype, kind), np.asarray(value, kind))
    return file.cast(filled, kind, dtype)


def _scatter(file: FunctionFile, operation: Operation) -> str:
    data, _, updates = operation.inputs
    numbers = operation.params["dimension_numbers"]
    batching, of_batch = numbers.operand_batching_dims, numbers.scatter_indices_batching_dims
    axes = list(numbers.scatter_dims_to_operand_dims)
    places = _Places(file, operation, axes)
    windowed = [
        a for a in range(len(data.shape)) if a not in (*numbers.inserted_window_dims, *batching)
    ]
    spans = dict(zip(windowed, (updates.shape[i] for i in numbers.update_window_dims), strict=True))
    window = [spans.get(a, 1) for a in axes]
    rest = [a for a in windowed if a not in axes]
    if any(spans[a] != data.shape[a] for a in rest):
        raise NotCarriedError("of windows that are not whole")
    if not axes:
        raise NotCarriedError("of no axes")
    kind = orderable(data.dtype)
    inside = ""
    if not places.are_inside(window):
        if _is_dropping(operation):
            inside = places.inside(window)
        places.clipped(window)
    if inside:  # first the places of whole windows, so that those outside are dropped as wholes
        is_inside = file.op("Unsqueeze", inside, np.array([-1]))
        behind = [places.data[axes[0]], *(0 for _ in axes[1:])]
        places.name = file.op("Where", is_inside, places.name, file.shape(behind))
    wide = places.widen(window)
    if inside:  # a window behind the last row is one place, whatever its length
        limits = file.shape([places.data[axes[0]], *(FAR for _ in axes[1:])])
        places.name = file.op("Min", places.name, limits)
    # Data as [axes..., batching..., rest...], and places with numbers for batching axes too.
    order = [*axes, *batching, *rest]
    name = file.cast(file.name(data), data.dtype, kind)
    name = file.transpose(name, order)
    shape = tuple(data.shape[i] for i in order)
    for axis in of_batch:
        size = places.batch[axis]
        steps = file.op("Range", np.int64(0), file.scalar(size), np.int64(1))
        middle = tuple(size if i == axis else 1 for i in range(len(places.batch)))
        steps = file.reshape(steps, (size,), (*middle, 1))
        steps = expanded(file, steps, (*middle, 1), (*places.batch, 1))
        places.name = file.op("Concat", places.name, steps, axis=-1)
    ends = [0] * (2 * len(shape))
    if inside:
        ends[len(shape)] = 1
        name = file.op("Pad", name, np.array(ends, np.int64), kind.type(0))
    # Updates as [batch..., wide windows..., rest...], with their windows of size 1 left out.
    where = dict(zip(windowed, numbers.update_window_dims, strict=True))
    order_of_updates = [
        *(i for i in range(len(updates.shape)) if i not in numbers.update_window_dims),
        *(where[axes[k]] for k in wide),
        *(where[a] for a in rest),
    ]
    ones = [i for i in range(len(updates.shape)) if i not in order_of_updates]
    before = tuple(updates.shape[i] for i in [*order_of_updates, *ones])
    given = file.cast(file.name(updates), updates.dtype, kind)
    given = file.transpose(given, [*order_of_updates, *ones])
    given = file.reshape(given, before, before[: len(order_of_updates)])
    reduction = _REDUCTIONS[operation.primitive]
    options = {} if reduction == "none" else {"reduction": reduction}
    name = file.op("ScatterND", name, places.name, given, **options)
    if inside:
        name = file.slice(name, 0, 0, -1)
    name = file.transpose(name, [order.index(i) for i in range(len(order))])
    return file.cast(name, kind, operation.outputs[0].dtype)


def _start(file: FunctionFile, index: Operand, room: Any) -> Any:
    """Where a slice begins, moved inside: a number, or the name of int64 [1]."""
    if isinstance(index, Constant) and not isinstance(room, Size):
        return min(max(int(index.array), 0), room)
    name = file.reshape(file.cast(file.name(index), index.dtype, np.int64), (), (1,))
    name = file.op("Max", name, np.array([0]))
    return file.op("Min", name, file.shape([room]))


def _end(file: FunctionFile, start: Any, size: Dim) -> Any:
    if isinstance(start, str):
        return file.op("Add", start, file.shape([size]))
    return start + size


def _dynamic_slice(file: FunctionFile, operation: Operation) -> str:
    x, *indices = operation.inputs
    name = file.name(x)
    for axis, (size, index) in enumerate(
        zip(operation.params["slice_sizes"], indices, strict=True)
    ):
        if size != x.shape[axis]:
            start = _start(file, index, x.shape[axis] - size)
            name = file.slice(name, axis, start, _end(file, start, size))
    return name


def _dynamic_update_slice(file: FunctionFile, operation: Operation) -> str:
    x, update, *indices = operation.inputs
    differing = [i for i, size in enumerate(x.shape) if size != update.shape[i]]
    starts = {i: _start(file, indices[i], x.shape[i] - update.shape[i]) for i in differing}

    def updated(name: str, axes: Sequence[int]) -> str:
        """With the update in place of its part, axis by axis from outside in."""
        if not axes:
            return file.name(update)
        axis, *others = axes
        start, end = starts[axis], _end(file, starts[axis], update.shape[axis])
        middle = updated(file.slice(name, axis, start, end), others)
        parts = [file.slice(name, axis, 0, start), middle, file.slice(name, axis, end, FAR)]
        return file.op("Concat", *parts, axis=axis)

    return updated(file.name(x), differing)


INDEXING: dict[str, Write] = {
    "gather": _gather,
    **dict.fromkeys(_REDUCTIONS, _scatter),
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
}
