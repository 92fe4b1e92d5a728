"""Ramps: schedules that raise alpha from 0 to 1 as training goes on.

Each function returns an optax schedule, a function from the step to alpha (a float32 scalar): 0 up
to `start`, 1 from `stop` on, both in steps, and never lower at a later step. A step is an int or an
integer scalar of any width, traced or not (or an array of them). Floats are taken too; a NaN among
them is a ValueError, and NaN where it is traced.

Start the ramp from a network that is trained already and let it end before training does: under
alpha-blending the weights move by a factor `1 - alpha`, so a ramp from the very first step starves
them, and one that ends with training leaves batch norm no time to settle.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike

_END_OF_STEPS = 2**63  # no counter of 64 bits goes so far
_SHORTEST = 2.0**-60  # steps; a window must be a normal float32


def cubic_ramp(start: int, stop: int) -> optax.Schedule:
    """`alpha = 1 - (1 - p)**3` with `p = (step - start) / (stop - start)`.

    Fast at first and slow towards the end, where the gradient is nearly gone: the ramp of QKeras,
    which adopted alpha-blending. Under plain SGD it lets a quarter of the movement through.

    >>> [float(cubic_ramp(start=100, stop=300)(step)) for step in (0, 100, 200, 300, 400)]
    [0.0, 0.0, 0.875, 1.0, 1.0]

    Raises:
      ValueError: `stop <= start`, a negative `start`, or one that is not finite. TypeError: one
        that is no number.
    """
    return _ramp(*check_window("cubic_ramp", start, stop), lambda p: 1 - (1 - p) ** 3)


def linear_ramp(start: int, stop: int) -> optax.Schedule:
    """`alpha = (step - start) / (stop - start)`.

    >>> [float(linear_ramp(start=100, stop=300)(step)) for step in (0, 100, 200, 300, 400)]
    [0.0, 0.0, 0.5, 1.0, 1.0]

    Raises:
      ValueError: `stop <= start`, a negative `start`, or one that is not finite. TypeError: one
        that is no number.
    """
    return _ramp(*check_window("linear_ramp", start, stop), lambda p: p)


def cosine_ramp(start: int, stop: int) -> optax.Schedule:
    """`alpha = (1 - cos(pi * p)) / 2` with `p = (step - start) / (stop - start)`.

    Slow at both ends.

    >>> [round(float(cosine_ramp(start=100, stop=300)(step)), 3) for step in (0, 150, 200, 400)]
    [0.0, 0.146, 0.5, 1.0]

    Raises:
      ValueError: `stop <= start`, a negative `start`, or one that is not finite. TypeError: one
        that is no number.
    """
    return _ramp(
        *check_window("cosine_ramp", start, stop),
        lambda p: (1 - jnp.cos(np.float32(np.pi) * p)) / 2,
    )


def sigmoid_ramp(start: int, stop: int, steepness: float = 10.0) -> optax.Schedule:
    """`alpha = (S(p) - S(0)) / (S(1) - S(0))` with `S(p) = 1 / (1 + exp(-steepness * (p - 1/2)))`.

    And `p = (step - start) / (stop - start)`: PARQ's annealing (arXiv 2503.15748), whose inverse
    slope is `1 - alpha`. Slow at both ends, the more so the larger the steepness; with a steepness
    below 1 it is almost linear. The default is that of the authors' code.

    >>> [round(float(sigmoid_ramp(100, 300)(step)), 3) for step in (0, 150, 200, 250, 400)]
    [0.0, 0.07, 0.5, 0.93, 1.0]

    Raises:
      ValueError: `stop <= start`, a negative `start`, one that is not finite, or a steepness that
        is not positive and finite. TypeError: one that is no number.
    """
    window = check_window("sigmoid_ramp", start, stop)
    if not 0 < steepness < math.inf:
        raise ValueError(
            f"sigmoid_ramp(start={start}, stop={stop}, steepness={steepness}): the steepness must "
            f"be positive and finite. Give 10 for PARQ's, or use linear_ramp."
        )
    # Beyond these ends it is the line, and the jump in the middle, to the last digit of float32.
    half = min(max(steepness, 1e-3), 1e12) / 4
    at_the_end = math.tanh(half)
    return _ramp(*window, lambda p: _sigmoid(p, np.float32(half), np.float32(at_the_end)))


def jump(at: int) -> optax.Schedule:
    """0 before step `at`, 1 from it on: a ramp whose start and stop are one.

    >>> [float(jump(at=100)(step)) for step in (0, 99, 100, 101)]
    [0.0, 0.0, 1.0, 1.0]

    Raises:
      ValueError: an `at` that is negative or not finite. TypeError: one that is no number.
    """
    call = f"jump(at={at})"
    number = _number(call, "at", at)
    if number < 0:
        raise ValueError(f"{call}: a step cannot be negative. Give at >= 0.")
    return _ramp(number - 1, number, jnp.floor)


def check_window(name: str, start: Any, stop: Any) -> tuple[Any, Any]:
    """Start and stop as Python's numbers.

    Raises:
      ValueError: `stop <= start`, a negative `start`, one that is not finite; names the ramp.
        TypeError: one that is no number.
    """
    call = f"{name}(start={start}, stop={stop})"
    first, last = _number(call, "start", start), _number(call, "stop", stop)
    if last <= first:
        raise ValueError(
            f"{call}: the ramp must stop after it starts. "
            f"Give stop > start, in steps, or use jump(at={start}) for a sudden change."
        )
    if first < 0:
        raise ValueError(f"{call}: a step cannot be negative. Give start >= 0.")
    if last - first < _SHORTEST:
        raise ValueError(f"{call}: the ramp is shorter than a step can tell. Use jump(at={start}).")
    return first, last


def _number(call: str, name: str, value: Any) -> Any:
    number = value.item() if isinstance(value, np.generic | np.ndarray | Array) else value
    if not isinstance(number, int | float):
        raise TypeError(f"{call}: {name} must be a number of steps, not {value!r}.")
    if not abs(number) < _END_OF_STEPS:  # nor is NaN
        raise ValueError(f"{call}: {name} must be finite, and below 2**63 steps.")
    return number


def _ramp(start: float, stop: float, formula: Callable[[Array], Array]) -> optax.Schedule:
    """The schedule whose alpha is `formula` of the progress from `start` to `stop`."""

    def ramp(step: ArrayLike) -> ArrayLike:
        p = _progress(step, start, stop)
        between = jnp.clip(formula(p), 0, 1)
        return jnp.where(p <= 0, 0, jnp.where(p >= 1, 1, between)).astype(jnp.float32)

    return ramp


def _progress(step: ArrayLike, start: float, stop: float) -> Array:
    """`(step - start) / (stop - start)`, cut off at 0 and 1, in float32.

    The start is subtracted in the step's own type, so that no digit of a step is lost; integers are
    brought into the window before, so that nothing wraps around. Steps that are not JAX's stay
    NumPy's until then, since JAX may cut them to 32 bits.
    """
    if isinstance(step, int):  # of any size
        step = max(-_END_OF_STEPS, min(step, _END_OF_STEPS - 1))
    steps = step if isinstance(step, Array) else np.asarray(step)
    if jnp.issubdtype(steps.dtype, jnp.integer):
        of_type, limits = steps.dtype.type, jnp.iinfo(steps.dtype)
        first, last = (
            of_type(min(max(end, limits.min), limits.max))
            for end in (math.floor(start), math.ceil(stop))
        )
        done = steps.clip(first, last) - first
        ahead = start - int(first)  # a part of a step, unless steps are too narrow for the window
    elif jnp.issubdtype(steps.dtype, jnp.floating):
        if not isinstance(steps, jax.core.Tracer) and np.isnan(steps).any():
            raise ValueError("A ramp was asked for its alpha at a step that is NaN.")
        steps = steps if steps.dtype == np.float64 else steps.astype(np.float32)
        done, ahead = steps - steps.dtype.type(start), 0
    else:
        raise TypeError(f"A ramp takes a step, an integer or a float, not {step!r}.")
    p = (jnp.asarray(done.astype(np.float32)) - np.float32(ahead)) / np.float32(stop - start)
    return jnp.clip(p, 0, 1)


@jax.jit
def _sigmoid(p: Array, half: np.float32, at_the_end: np.float32) -> Array:
    """`(1 + tanh(half * (2 p - 1)) / tanh(half)) / 2`: the sigmoid ramp by an odd function.

    XLA's own `tanh` falls now and then by its last digit. Here it is that of `expm1(2 x)`, which is
    its series for small numbers: all the terms of that rise.
    """
    x = 2 * p - 1
    double = 2 * half * jnp.abs(x)
    series = functools.reduce(
        lambda rest, n: double / n * (1 + rest), range(12, 0, -1), jnp.zeros_like(double)
    )
    tanh = 1 / (1 + 2 / jnp.where(double < 1, series, jnp.expm1(double)))
    risen = jnp.minimum(tanh / (2 * at_the_end), 0.5)
    return jnp.where(x < 0, 0.5 - risen, 0.5 + risen)


def layerwise_ramp(
    layers: Sequence[str],
    start: int,
    stop: int,
    *,
    ramp: Callable[[int, int], optax.Schedule] = cubic_ramp,
    overlap: float = 0.0,
    paths: Sequence[str] | None = None,
) -> Callable[[ArrayLike], Callable[[str], Array]]:
    """Layer by layer: a schedule `step -> (path -> alpha)`, as `blend` takes it.

        paths = quantized_paths(params, rules)
        alpha = layerwise_ramp(["stem/.*", "block0/.*", "block1/.*"], 0, 90_000, paths=paths)
        effective = blend(params, rules, alpha(step))     # alpha(step) is a function of the path

    Each layer has a window, all of one length. The first begins at `start`, the last ends at
    `stop`, and each begins a share `1 - overlap` of a window after the one before: `overlap` 0 has
    them one after another, 1 all at once. For n layers a window takes the part
    `1 / (1 + (n - 1) * (1 - overlap))` of the whole, its ends rounded to steps.

    Layer by layer from input to output is the order of progressive freezing (arXiv 2606.27759),
    which finds that it matters with binary activations and hardly with binary weights alone. It
    replaces random parts of a layer where this blends all of it.

    >>> alpha = layerwise_ramp(["conv/kernel", "head/kernel"], 0, 200)
    >>> [round(float(alpha(step)("conv/kernel")), 3) for step in (0, 50, 100, 150, 200)]
    [0.0, 0.875, 1.0, 1.0, 1.0]
    >>> [round(float(alpha(step)("head/kernel")), 3) for step in (0, 50, 100, 150, 200)]
    [0.0, 0.0, 0.0, 0.875, 1.0]

    Args:
      layers: regular expressions in the order in which alpha rises. A parameter belongs to the
        first that matches its whole path; `reversed` gives the other direction.
      start, stop: of the whole, in steps.
      ramp: of a window, from its start and stop.
      overlap: share of a window that it has in common with the next, 0 to 1.
      paths: of the parameters that are quantized (`quantized_paths`), to check the layers against
        before anything is compiled; None: a path is checked once `blend` asks for it.

    Raises:
      ValueError: no layers, or one twice; an overlap outside [0, 1]; a start and a stop that are
        none of a ramp; windows shorter than a step; a path that belongs to no layer; with `paths`,
        a layer to which none belongs.
    """
    layers = tuple(layers)
    if not layers or len({*layers}) < len(layers):
        raise ValueError(f"layerwise_ramp takes one or more layers, each once, not {layers}.")
    if not 0 <= overlap <= 1:
        raise ValueError(f"layerwise_ramp(overlap={overlap}): give a share from 0 to 1.")
    first, last = check_window("layerwise_ramp", start, stop)
    span = last - first
    length = span / (1 + (len(layers) - 1) * (1 - overlap))
    if length < 1:
        raise ValueError(
            f"layerwise_ramp(start={start}, stop={stop}): {len(layers)} windows do not fit into "
            f"{span} steps. Give more steps, or a larger overlap."
        )
    begins = [i * (1 - overlap) * length for i in range(len(layers))]
    # Rounded half up, by which a window of a step or more keeps one.
    windows = [
        (first + math.floor(begin + 0.5), first + min(math.floor(begin + length + 0.5), span))
        for begin in begins
    ]
    ramps = [ramp(*window) for window in windows]

    def layer_of(path: str) -> int:
        for i, layer in enumerate(layers):
            if re.fullmatch(layer, path):
                return i
        raise ValueError(
            f"{path} is quantized, but belongs to none of the layers {', '.join(layers)} of "
            f"layerwise_ramp. Patterns must match a whole path: add one for it."
        )

    if paths is not None:
        found = {layer_of(path) for path in paths}
        if idle := [layer for i, layer in enumerate(layers) if i not in found]:
            raise ValueError(
                f"No quantized parameter belongs to {', '.join(idle)} of layerwise_ramp. Patterns "
                f"must match a whole path; the paths are {', '.join(paths)}."
            )

    def schedule(step: ArrayLike) -> Callable[[str], Array]:
        return lambda path: ramps[layer_of(path)](step)

    return schedule
