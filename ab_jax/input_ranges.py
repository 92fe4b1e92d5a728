"""Ranges of layers' inputs: where they are kept, and what a pass makes of its measurements.

A pass is one `apply`. It asks for the largest measurement of a layer's calls (each call sees those
up to its own), and momentum is between passes: a layer that is called again and again has one
range. A measurement that is not finite leaves the range alone, and is counted.
"""

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import Scope
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.typing import ArrayLike

from ab_jax.activations import ActivationQuantizer
from ab_jax.products.ranges import InPass

#: The collection of the ranges, float32 scalars.
RANGES = "activation_ranges"
#: The collection of the counts by layer, int32: how many measurements were not finite.
NOT_FINITE = "activations_not_finite"

_START = f"{RANGES!r}: initial_ranges(layer_paths(model, ...), rules)"

Keys = tuple[str, ...]


# What passes under way have measured, by the scope that Flax makes for each, and gone with it: one
# `apply` may call several methods of a model, or a module several times.
_MEASURED: weakref.WeakKeyDictionary[Scope, dict[Keys, InPass]] = weakref.WeakKeyDictionary()


@dataclasses.dataclass
class Pass:
    """A pass that is known as a whole, by the method that `apply` calls first.

    Attributes:
      root: its outermost scope.
      lifted: layers within `nn.scan` and the like that have a range.
      created: those of them whose range was not there before.
      ranks: by layer, how many axes its kernel has where it is called.
    """

    root: Scope
    lifted: list[str] = dataclasses.field(default_factory=list)
    created: list[str] = dataclasses.field(default_factory=list)
    ranks: dict[str, int] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def ranges(self) -> Iterator[None]:
        """Within it the ranges that are measured are `InPass`; then they are what follows.

        Raises:
          ValueError: a loop does not carry the ranges as it should; names the layer.
        """
        measures = self.root.is_mutable_collection(RANGES)
        so_far = _MEASURED.setdefault(self.root, {})

        def begin(keys: Keys, limit: Any) -> Any:
            found = so_far.get(keys) or InPass.of(limit)
            return found._replace(not_finite=jnp.zeros_like(found.not_finite))

        def end(keys: Keys, found: Any) -> Any:
            if not isinstance(found, InPass):  # initialized just now
                return found
            so_far[keys] = found
            return found.limit

        with self._loops_named():
            if measures:
                self._each_range(begin)
            yield
        if measures:
            self._each_range(end)
            self._count(so_far)
            for path, rank in self.ranks.items():
                self._check_one_range(path, rank)

    @contextlib.contextmanager
    def _loops_named(self) -> Iterator[None]:
        """What JAX and Flax say of ranges that a loop does not carry, with the layer's name."""
        try:
            yield
        except (TypeError, ValueError) as error:
            rests = not self.root.is_mutable_collection(RANGES)
            carried = isinstance(error, TypeError) and "carry" in str(error)
            if not self.lifted or not (
                (carried and (rests or self.created)) or "broadcasted variable" in str(error)
            ):
                raise
            way = (
                f"They rest in this pass: give it variable_broadcast=['params', {RANGES!r}]."
                if rests
                else f"Give it variable_carry={RANGES!r}, initialize the model outside "
                f"quantized_inputs, and begin with {_START}."
            )
            raise ValueError(
                f"{self.lifted[0]} lies in a loop that does not take its range as it should. {way}"
            ) from error

    def _each_range(self, function: Callable[[Keys, Any], Any]) -> None:
        """Replace each, in place: scopes of submodules hold the same dictionaries."""

        def replaced(keys: Keys, value: Any) -> Any:
            if not isinstance(value, dict):
                return function(keys, value)
            for key in value:
                value[key] = replaced((*keys, key), value[key])
            return value

        for name in list(self.root.variables().get(RANGES, {})):
            value = replaced((name,), self.root.get_variable(RANGES, name))
            self.root.put_variable(RANGES, name, value)

    def _count(self, so_far: dict[Keys, InPass]) -> None:
        if not self.root.is_mutable_collection(NOT_FINITE) or not so_far:
            return
        counts = dict(flatten_dict(self.root.variables().get(NOT_FINITE, {})))
        for keys, found in so_far.items():
            counts[keys] = counts.get(keys, 0) + found.not_finite
        for name, value in unflatten_dict(counts).items():
            self.root.put_variable(NOT_FINITE, name, value)

    def _check_one_range(self, path: str, rank: int) -> None:
        """A stack has a kernel and a range a layer; a loop has one kernel, and so one range."""
        leaves: Any = self.root.variables()
        kernel, found = (
            flatten_dict(leaves.get(collection, {})).get((*split(path), name))
            for collection, name in (("params", "kernel"), (RANGES, "input"))
        )
        if kernel is None or found is None or np.ndim(found) <= axes_of(kernel) - rank:
            return
        raise ValueError(
            f"The input of {path} has a range of shape {np.shape(found)}, one for each step of a "
            f"loop that calls the layer again and again. Let the loop carry them, by "
            f"variable_carry={RANGES!r} in place of variable_axes, and begin with {_START}."
        )


def split(path: str) -> Keys:
    """The keys of a path; none of the empty one, that of a model which is a layer itself."""
    return tuple(path.split("/")) if path else ()


def axes_of(kernel: Any) -> int:
    """How many axes a kernel has, also in a box of Flax's."""
    return np.ndim(jax.tree.leaves(kernel)[0])


def limit_of(
    module: nn.Module,
    name: str,
    path: str,
    quantizer: ActivationQuantizer,
    x: Array,
    axis_name: str | None,
    under_way: Pass | None,
) -> ArrayLike:
    """The end of the range of a layer's input, measured where ranges are mutable.

    Args:
      module, name: where it is kept, in a variable of that name.
      path: of the layer.
      quantizer: of the input.
      x: the input, [batch, ...].
      axis_name: the mapped axis over which the batch is spread, if any.
      under_way: the pass, where it is known as a whole. Else the calls that this trace sees are
        one: all of an `apply`, or of one run of the body in a loop.

    Raises:
      ValueError: there is no range, and none may be made.
    """
    if quantizer.limit is not None:
        return quantizer.limit
    scope = module.scope
    assert scope is not None, "a module that is called is bound"
    mutable = scope.is_mutable_collection(RANGES)
    new = not scope.has_variable(RANGES, name)
    if new:
        if not mutable:
            raise ValueError(
                f"There is no range for the input of {path}. Call the model with "
                f"mutable=[{RANGES!r}, ...] on training images first, and pass on the "
                f"{RANGES!r} it returns. If {path} lies within nn.scan, nn.vmap or another lifted "
                f"transformation, give that one variable_axes={{{RANGES!r}: 0}} if it is a stack "
                f"of layers, variable_carry={RANGES!r} if it is a loop, such as nn.RNN."
            )
        scope.put_variable(RANGES, name, jnp.zeros((), jnp.float32))
    if under_way is not None and scope.root is not under_way.root:
        under_way.lifted.append(path)
        under_way.created += [path] if new else []
    found: Any = scope.get_variable(RANGES, name)
    if not mutable or scope.get_flag("initializing", False):
        return found.limit if isinstance(found, InPass) else found
    measured = quantizer.measure(x, axis_name)
    if under_way is not None:
        found = found if isinstance(found, InPass) else InPass.of(found)
        found = found.after(measured, quantizer.momentum)
        scope.put_variable(RANGES, name, found)
        return found.limit
    so_far, keys = _MEASURED.setdefault(scope.root, {}), (*scope.path, name)
    found = (so_far.get(keys) or InPass.of(found)).after(measured, quantizer.momentum)
    so_far[keys] = found
    scope.put_variable(RANGES, name, found.limit)
    if scope.is_mutable_collection(NOT_FINITE):
        count = scope.get_variable(NOT_FINITE, name, jnp.zeros((), jnp.int32))
        scope.put_variable(NOT_FINITE, name, count + (~jnp.isfinite(measured)).astype(jnp.int32))
    return found.limit


def checked_range(path: str, found: Any, axes: int = 0) -> Any:
    """The range of the input of the layer at `path`, as the variables hold it.

    Args:
      path, found: of the layer, its range.
      axes: how many it may have at most: 1 for a stack of layers (`nn.scan`).

    Returns:
      A float, or a list of them, for each layer of a stack.

    Raises:
      ValueError: it has more axes, or is negative or not finite.
    """
    found = np.asarray(found)
    if found.ndim > axes:
        raise ValueError(
            f"The input of {path} has ranges of shape {found.shape}, and at most {axes} axes are "
            f"taken. Export a StableHLO program, which takes the ranges as they are."
        )
    if not np.all((found >= 0) & np.isfinite(found)):
        raise ValueError(
            f"The range of the input of {path} is {found}. Measure it again: set it to 0, and call "
            f"the model with mutable=[{RANGES!r}] on training images."
        )
    return found.tolist()
