"""What becomes of an equation that takes no value: constants and codes in, the same out."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from ab_jax.export.traced.layouts import JOINS, MOVES, SAME, joined, moved
from ab_jax.export.traced.traced_graph import Codes, Constant, Operand
from ab_jax.products.intercepting import evaluated

# They make as many floats of codes: evaluated, a file would hold these and not the codes.
_LEFT_TO_THE_FILE = {
    *("add", "sub", "mul", "div", "neg", "convert_element_type", "select_n", "max", "min"),
    *("broadcast_in_dim", "tile", "concatenate", "stack", "pad"),
}
# They pick entries of their first operand by the others.
_PICKS = {"gather", "dynamic_slice"}


def without_values(
    jaxpr: Any, equation: Any, params: Mapping[str, Any], operands: Sequence[Operand]
) -> list[Operand] | None:
    """The results of an equation of constants and codes; None: it is left to the file.

    Args:
      jaxpr: the one that the equation is of.
      equation: in which no size is open.
      params: its parameters.
      operands: none of them a value.
    """
    name = equation.primitive.name
    if name in SAME:
        return list(operands)
    codes = [operand for operand in operands if isinstance(operand, Codes)]
    if codes:
        if name == "convert_element_type" and params["new_dtype"] == codes[0].dtype:
            return [codes[0]]
        kept = _as_codes(jaxpr, equation, params, operands)
        if kept is not None:
            return kept
        if name in _LEFT_TO_THE_FILE:
            return None
    paths = [o.path for o in operands if isinstance(o, Constant | Codes) and o.path]
    path = paths[0] if paths else None
    arrays = [o.values() if isinstance(o, Codes) else _array(o) for o in operands]
    if name in MOVES and not _is_extended(arrays[0]):
        return [Constant(part, path) for part in moved(name, params, arrays[0])]
    if name in JOINS and not any(map(_is_extended, arrays)):
        return [Constant(joined(name, params, arrays), path)]
    return [Constant(a, path) for a in _bound(jaxpr, equation, arrays)]


def _as_codes(
    jaxpr: Any, equation: Any, params: Mapping[str, Any], operands: Sequence[Operand]
) -> list[Operand] | None:
    name, (first, *others) = equation.primitive.name, operands
    if not isinstance(first, Codes):
        return None
    if name in MOVES:
        grown = sum(v.aval.size for v in equation.outvars) > first.codes.size
        if grown or others:
            return None
        return _each(first, lambda x: moved(name, params, x))
    if name in _PICKS and all(isinstance(other, Constant) for other in others):
        arrays = [_array(other) for other in others if isinstance(other, Constant)]
        return _each(first, lambda x: _bound(jaxpr, equation, [x, *arrays]))
    if name in JOINS:
        return _joined_codes(name, params, operands)
    return None


def _each(codes: Codes, f: Callable[[np.ndarray], list[np.ndarray]]) -> list[Operand]:
    """The several results of cutting codes up."""
    stored = f(codes.codes)
    scales = [f(scale) for scale in codes.scales]
    zeros = None if codes.zero_point is None else f(codes.zero_point)
    return [
        dataclasses.replace(
            codes,
            codes=np.ascontiguousarray(part),
            scales=tuple(scale[i] for scale in scales),
            zero_point=None if zeros is None else zeros[i],
        )
        for i, part in enumerate(stored)
    ]


def _joined_codes(
    name: str, params: Mapping[str, Any], operands: Sequence[Operand]
) -> list[Operand] | None:
    """Codes put together, where all are of a kind."""
    parts = [operand for operand in operands if isinstance(operand, Codes)]
    kinds = {(part.bits, part.dtype, len(part.scales)) for part in parts}
    if len(parts) < len(operands) or len(kinds) > 1:
        return None
    zeros = None
    if any(part.zero_point is not None for part in parts):
        given = [np.zeros_like(p.codes) if p.zero_point is None else p.zero_point for p in parts]
        zeros = joined(name, params, given)
    scales = zip(*(part.scales for part in parts), strict=True)
    return [
        dataclasses.replace(
            parts[0],
            codes=joined(name, params, [part.codes for part in parts]),
            scales=tuple(joined(name, params, scale) for scale in scales),
            zero_point=zeros,
        )
    ]


def _array(constant: Operand) -> Any:
    assert isinstance(constant, Constant)
    return constant.array


def _is_extended(array: Any) -> bool:
    """Whether it is of random keys, which NumPy has not."""
    return bool(jax.dtypes.issubdtype(array.dtype, jax.dtypes.extended))


def _bound(jaxpr: Any, equation: Any, arrays: Sequence[Any]) -> list[Any]:
    """The results by JAX, as arrays of NumPy."""
    known = {
        v: a
        for v, a in zip(equation.invars, arrays, strict=True)
        if not isinstance(v, core.Literal)
    }
    results = evaluated(jaxpr, [equation], known)
    found = [results.get(v) for v in equation.outvars]
    return [_fetched(v, a) for v, a in zip(equation.outvars, found, strict=True)]


def _fetched(variable: Any, array: Any) -> Any:
    if array is None:  # nothing takes it
        return np.zeros((), np.float32)
    return array if _is_extended(array) else np.asarray(array)
