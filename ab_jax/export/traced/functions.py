"""Functions of parameters and inputs as graphs."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ab_jax.export.traced.early_codes import quantize_early
from ab_jax.export.traced.folding import fold_affine
from ab_jax.export.traced.quantized_operands import with_quantized_operands
from ab_jax.export.traced.sizes import OpenAxes
from ab_jax.export.traced.traced_graph import (
    Codes,
    Constant,
    Graph,
    Operand,
    needed,
)
from ab_jax.export.traced.tracing import Walk
from ab_jax.products import ActivationRules, Range
from ab_jax.products.flags import without_flags
from ab_jax.quantized import BinaryCoded, Quantized
from ab_jax.rules import leaves_by_path

#: What is open where nothing else is said: the first axis of each input.
BATCH = "batch"
#: Scans over inputs up to this length are written out.
LONGEST_UNROLLED = 8


@dataclasses.dataclass(frozen=True)
class TracedFunction:
    """A function as a graph.

    Attributes:
      graph: its inputs are the leaves of the function's, and its outputs likewise.
      inputs, outputs: paths of these leaves, such as `0/tokens`.
      structure: of what the function returns.
    """

    graph: Graph
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    structure: Any

    def simplified(self) -> "TracedFunction":
        """The same to rounding: scales and shifts in weights, inputs quantized early."""
        return dataclasses.replace(self, graph=quantize_early(fold_affine(self.graph)))


def trace(
    f: Callable[..., Any],
    params: Any,
    *inputs: Any,
    open_axes: Sequence[Any] | None = None,
    sizes: Mapping[str, tuple[int, int]] | None = None,
    rules: ActivationRules | None = None,
    ranges: Mapping[str, Range] | None = None,
    one_range_a_weight: bool = False,
    longest_unrolled: int = LONGEST_UNROLLED,
) -> TracedFunction:
    """The graph of `f(params, *inputs)`; of inputs only shapes and dtypes are looked at.

    Args:
      f: a forward function that JAX can trace.
      params: a tree; `Quantized` leaves stay codes, for `f` they are arrays of their values.
      *inputs: arrays, `jax.ShapeDtypeStruct` or trees of them. Python's bools and strings are given
        to the function as they are.
      open_axes: for each input a mapping from an axis to the name of its size, for all of its
        leaves, or a tree of such mappings; None: none is open. Sizes of one name are equal. Left
        out: axis 0 of every leaf that has axes is `"batch"`. With bools or strings among the inputs
        an entry for each of the arrays that are left.
      sizes: by name, two sizes to trace an open axis at, where not any will do, such as multiples
        of 8. Others are primes from 7 on.
      rules, ranges: quantize the inputs of products, as `ab_jax.products.quantize_inputs` does at
        alpha 1; each becomes an operation `quantize`.
      one_range_a_weight: as for `quantize_inputs`.
      longest_unrolled: scans over inputs up to this length are written out; those over parameters
        always are.

    Returns:
      The graph: calls are written out, what depends on no input is evaluated, what no output needs
      is left out.

    Raises:
      ValueError: steps or sizes that depend on open axes in other ways than by sums of products,
        as far as that shows here; parameters of which two have one path; rules or ranges that do
        not fit the products.
    """
    leaves = leaves_by_path(params, is_leaf=_is_quantized)
    structure = jax.tree.structure(params, is_leaf=_is_quantized)
    dense = jax.tree.unflatten(structure, [_shown(leaf) for _, leaf in leaves])
    arrays, flags = without_flags(inputs)
    f = flags.held(f)
    named, given = jax.tree.flatten_with_path(arrays)
    shown = [_shown(leaf) for _, leaf in named]
    opened = _opened(arrays, open_axes, shown)
    names = tuple(dict.fromkeys(name for axes in opened for name in axes.values()))
    axes = OpenAxes.of(names, sizes or {})

    def at(corner: Mapping[str, int]) -> Any:
        sized = [_sized(leaf, own, corner) for leaf, own in zip(shown, opened, strict=True)]
        return jax.tree.unflatten(given, sized)

    if rules is not None:
        f = with_quantized_operands(
            f, rules, ranges or {}, dense, at(axes.corners[0]), one_range_a_weight
        )
    elif ranges:
        raise ValueError("There are ranges, but no rules that say what they are of.")
    traced = [jax.make_jaxpr(f, return_shape=True)(dense, *at(corner)) for corner in axes.corners]
    outputs = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree.leaves_with_path(traced[0][1])
    ]
    jaxprs = [jaxpr for jaxpr, _ in traced]
    walk = Walk(axes, longest_unrolled)
    count = len(leaves)
    values = walk.fresh([jaxpr.jaxpr.invars[count:] for jaxpr in jaxprs])
    results = walk.body(jaxprs, [*(_operand(*leaf) for leaf in leaves), *values])
    graph = Graph(tuple(values), tuple(needed(walk.operations, results)), tuple(results), axes)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in named]
    structure_out = jax.tree.structure(traced[0][1])
    return TracedFunction(graph, tuple(paths), tuple(outputs), structure_out)


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)


def _shown(leaf: Any) -> jax.ShapeDtypeStruct:
    """What a leaf is traced as."""
    if isinstance(leaf, Quantized):
        return jax.ShapeDtypeStruct(leaf.codes.shape, jnp.dtype(leaf.dtype))
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    array = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
    if jnp.issubdtype(array.dtype, jax.dtypes.extended):  # random keys
        return jax.ShapeDtypeStruct(array.shape, array.dtype)
    return jax.ShapeDtypeStruct(array.shape, jax.dtypes.canonicalize_dtype(array.dtype))


def _sized(
    leaf: jax.ShapeDtypeStruct, own: Mapping[int, str], corner: Mapping[str, int]
) -> jax.ShapeDtypeStruct:
    """A leaf of the inputs at these sizes of its open axes."""
    shape = tuple(corner[own[i]] if i in own else size for i, size in enumerate(leaf.shape))
    return jax.ShapeDtypeStruct(shape, leaf.dtype)


def _operand(path: str, leaf: Any) -> Operand:
    """A parameter."""
    if not isinstance(leaf, Quantized):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(f"The parameter {path} is a shape alone. Give its numbers.")
        return Constant(
            np.asarray(leaf, jax.dtypes.canonicalize_dtype(jnp.result_type(leaf))), path
        )
    shape, zeros = leaf.codes.shape, leaf.zero_point
    by_bit = isinstance(leaf, BinaryCoded)
    scales = np.moveaxis(np.asarray(leaf.scale), -1, 0) if by_bit else [leaf.scale]
    return Codes(
        codes=np.asarray(leaf.codes),
        scales=tuple(_spread(scale, shape) for scale in scales),
        zero_point=None if zeros is None else _spread(zeros, shape),
        bits=leaf.bits,
        dtype=np.dtype(jnp.dtype(leaf.dtype)),
        path=path,
    )


def _spread(by_block: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Scales at every entry."""
    array = np.asarray(by_block)
    for axis, (count, size) in enumerate(zip(array.shape, shape, strict=True)):
        array = np.repeat(array, size // max(count, 1), axis)
    return array


def _opened(
    arrays: Sequence[Any], open_axes: Sequence[Any] | None, shown: Sequence[Any]
) -> list[dict[int, str]]:
    """For each leaf of the inputs its open axes, by name."""
    if open_axes is None:
        return [{0: BATCH} if leaf.shape else {} for leaf in shown]
    if len(open_axes) != len(arrays):
        raise ValueError(
            f"open_axes has {len(open_axes)} entries for {len(arrays)} inputs. Give one an input, "
            f"such as {{0: 'batch'}}, or None."
        )

    def is_named(node: Any) -> bool:
        return node is None or (
            isinstance(node, Mapping) and all(isinstance(key, int) for key in node)
        )

    for own in jax.tree.leaves(list(open_axes), is_leaf=is_named):
        if not is_named(own) or not all(isinstance(name, str) for name in (own or {}).values()):
            raise ValueError(
                f"open_axes has {own!r} where an axis is given its name, such as {{0: 'batch'}}."
            )
    found: list[dict[int, str]] = []
    for given, array in zip(open_axes, arrays, strict=True):
        spread = jax.tree.map(
            lambda own, part: [own or {}] * len(jax.tree.leaves(part)),
            given,
            array,
            is_leaf=is_named,
        )
        found += [dict(x) for x in jax.tree.leaves(spread, is_leaf=is_named)]
    for own, leaf in zip(found, shown, strict=True):
        wrong = [axis for axis in own if not 0 <= axis < len(leaf.shape)]
        if wrong:
            raise ValueError(f"An input of shape {leaf.shape} has no axis {wrong[0]} to be open.")
    return found
