"""Where a value of a function comes from: which parameters, which inputs, which products before it.

Each value that a jaxpr computes has an `Origin`. Those of the parameters and the inputs are known;
`derived` tells that of an equation's results from those of its operands.

Of a parameter the axes are followed too, through transposes, reshapes and whatever else keeps them:
which of them a product sums over says which are its channels.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

# The index of an equation in its jaxpr, after those of the equations around it.
Key = tuple[int, ...]
# For each axis of a value, the axes of a parameter that it is made of; none where that is unknown.
Axes = tuple[frozenset[int], ...]

_UNKNOWN = frozenset[int]()
# Equations that leave the entries of a parameter what they are.
_LAYOUT = {
    *("reshape", "transpose", "convert_element_type", "squeeze", "broadcast_in_dim", "slice"),
    *("copy", "copy_p", "expand_dims", "sharding_constraint", "reshard", "reduce_precision"),
    *("optimization_barrier", "name"),
}
#: Stands for the axes that the function itself is mapped over, as by `jax.pmap` around it.
AROUND = ""
# Collectives whose results are the same on all devices of their axes.
_SAME_AFTER = {
    *("psum", "psum2", "psum_invariant", "pmax", "pmin"),
    *("all_gather", "all_gather_invariant"),
}


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a value comes from.

    Attributes:
      data: whether it depends on the inputs of the function.
      leaves: the parameters that it depends on, by their paths, each with its axes. Of data none
        are known, but for `looked_up`.
      looked_up: whether it is entries of one parameter, picked by data: those of an embedding, or
        the weights of experts.
      above: the nearest products before it.
      scans: the scans that hand it out slice by slice, where it depends on parameters alone.
      varies: the axes of meshes along which devices may have different ones, and `AROUND`.
    """

    data: bool = False
    leaves: Mapping[str, Axes] = dataclasses.field(default_factory=dict)
    looked_up: bool = False
    above: frozenset[Key] = frozenset()
    scans: frozenset[Key] = frozenset()
    varies: frozenset[str] = frozenset()


NOWHERE = Origin()  # of constants
INPUT = Origin(data=True, varies=frozenset({AROUND}))


def of_parameter(path: str, axes: int) -> Origin:
    """The origin of a parameter with so many axes."""
    own = {path: tuple(frozenset({i}) for i in range(axes))}
    return Origin(leaves=own, varies=frozenset({AROUND}))


def joined(origins: Iterable[Origin]) -> Origin:
    """The origin of what is one of several values of a shape, or is made of all of them."""
    known = [origin for origin in origins if origin is not NOWHERE and origin != NOWHERE]
    if len(known) <= 1:
        return known[0] if known else NOWHERE
    data = any(origin.data for origin in known)
    looked_up = data and all(
        origin.looked_up and origin.leaves.keys() == known[0].leaves.keys() for origin in known
    )
    leaves: dict[str, Axes] = {}
    for origin in known if looked_up or not data else []:
        for path, axes in origin.leaves.items():
            leaves[path] = _united(leaves[path], axes) if path in leaves else axes
    return Origin(
        data=data,
        leaves=leaves,
        looked_up=looked_up,
        above=frozenset().union(*(origin.above for origin in known)),
        scans=frozenset().union(*(origin.scans for origin in known)),
        varies=varying(known),
    )


def varying(origins: Iterable[Origin]) -> frozenset[str]:
    """The axes along which devices may have different ones of any of these."""
    return frozenset[str]().union(*(origin.varies for origin in origins))


def sliced(origin: Origin, scan: Key) -> Origin:
    """The origin of a slice along the first axis, as a scan hands it to its body."""
    if origin.data or not origin.leaves:
        return origin
    leaves = {path: axes[1:] for path, axes in origin.leaves.items()}
    return dataclasses.replace(origin, leaves=leaves, scans=origin.scans | {scan})


def stacked(origin: Origin) -> Origin:
    """The origin of what a scan gathers, slice by slice along a new first axis."""
    leaves = {path: (_UNKNOWN, *axes) for path, axes in origin.leaves.items()}
    return dataclasses.replace(origin, leaves=leaves)


def derived(
    primitive: str,
    params: Mapping[str, Any],
    shapes: Sequence[tuple[Any, ...]],
    origins: Sequence[Origin],
    results: Sequence[tuple[Any, ...]],
) -> list[Origin]:
    """The origins of an equation's results.

    Args:
      primitive, params: of the equation.
      shapes, origins: of its operands.
      results: the shapes of its results.
    """
    found = joined(_moved(primitive, params, s, o) for s, o in zip(shapes, origins, strict=True))
    looked_up, leaves = found.looked_up, found.leaves
    if found.data:
        looked_up, leaves = False, {}
        if primitive in ("gather", "dynamic_slice") and not origins[0].data:
            looked_up, leaves = bool(origins[0].leaves), dict(origins[0].leaves)
        elif primitive in _LAYOUT:
            touched = [origin for origin in origins if origin != NOWHERE]
            if len(touched) == 1:
                looked_up, leaves = touched[0].looked_up, dict(touched[0].leaves)
    varies = _after(primitive, params, found.varies)
    if not leaves and not found.leaves and (looked_up, varies) == (found.looked_up, found.varies):
        return [found] * len(results)  # as of most equations, without a copy
    return [
        dataclasses.replace(
            found,
            looked_up=looked_up,
            varies=varies,
            leaves={
                path: axes if len(axes) == len(shape) else (_UNKNOWN,) * len(shape)
                for path, axes in leaves.items()
            },
        )
        for shape in results
    ]


def _after(primitive: str, params: Mapping[str, Any], varies: frozenset[str]) -> frozenset[str]:
    """The axes along which the results of an equation vary, whose operands vary along these."""
    if primitive not in _SAME_AFTER and primitive != "axis_index":
        return varies
    named = params["axes"] if "axes" in params else params["axis_name"]
    names = named if isinstance(named, tuple) else (named,)
    if primitive == "axis_index":
        return varies.union(names)
    return varies.difference(names) if params.get("axis_index_groups") is None else varies


def _united(one: Axes, other: Axes) -> Axes:
    """Of a value made of both; a scalar has no axes to add."""
    if len(one) == len(other):
        return tuple(a | b for a, b in zip(one, other, strict=True))
    if not one or not other:
        return one or other
    return (_UNKNOWN,) * max(len(one), len(other))


def _moved(
    primitive: str, params: Mapping[str, Any], shape: tuple[Any, ...], origin: Origin
) -> Origin:
    """The origin of an operand with the axes where they are in the results."""
    if origin.data or not origin.leaves:
        return origin
    place = _places(primitive, params, shape)
    return dataclasses.replace(origin, leaves={p: place(axes) for p, axes in origin.leaves.items()})


def _places(
    primitive: str, params: Mapping[str, Any], shape: tuple[int, ...]
) -> Callable[[Axes], Axes]:
    """What an equation makes of the axes of an operand of this shape."""
    match primitive:
        case "transpose":
            return lambda axes: tuple(axes[i] for i in params["permutation"])
        case "broadcast_in_dim":
            return lambda axes: _broadcast(axes, shape, params)
        case "reshape":
            return lambda axes: _reshaped(axes, shape, params["new_sizes"])
        case "dot_general" | "conv_general_dilated" | "ragged_dot_general" | "gather":
            return lambda axes: ()
    gone = params.get("dimensions" if primitive == "squeeze" else "axes", ())
    if primitive == "squeeze" or primitive.startswith(("reduce_", "arg")):
        return lambda axes: tuple(a for i, a in enumerate(axes) if i not in gone)
    return lambda axes: axes


def _broadcast(axes: Axes, shape: tuple[int, ...], params: Mapping[str, Any]) -> Axes:
    result = [_UNKNOWN] * len(params["shape"])
    for place, found, size in zip(params["broadcast_dimensions"], axes, shape, strict=True):
        result[place] = found if size > 1 else _UNKNOWN
    return tuple(result)


def _reshaped(axes: Axes, old: Sequence[int], new: Sequence[int]) -> Axes:
    """Axes that are merged or split go together. New ones of size 1 are made of none."""
    result = [_UNKNOWN] * len(new)
    if 0 in old:
        return tuple(result)
    i = j = 0
    while i < len(old) and j < len(new):
        to_i, to_j = i + 1, j + 1
        while (before := math.prod(old[i:to_i])) != (after := math.prod(new[j:to_j])):
            to_i, to_j = (to_i + 1, to_j) if before < after else (to_i, to_j + 1)
        together = [
            found for found, size in zip(axes[i:to_i], old[i:to_i], strict=True) if size > 1
        ]
        for k in range(j, to_j):
            result[k] = _UNKNOWN.union(*together) if new[k] > 1 else _UNKNOWN
        i, j = to_i, to_j
    return tuple(result)
