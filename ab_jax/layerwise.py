"""Layer by layer: a ramp that reaches one layer after another, from input to output or back.

paths = quantized_paths(params, rules)
alpha = layerwise_ramp(["stem/.*", "block0/.*", "block1/.*"], 0, 90_000, paths=paths)
effective = blend(params, rules, alpha(step))     # alpha(step) is a function of the path
"""

import math
import re
from collections.abc import Callable, Sequence

import optax
from jax import Array
from jax.typing import ArrayLike

from ab_jax.schedules import check_window, cubic_ramp


def layerwise_ramp(
    layers: Sequence[str],
    start: int,
    stop: int,
    *,
    ramp: Callable[[int, int], optax.Schedule] = cubic_ramp,
    overlap: float = 0.0,
    paths: Sequence[str] | None = None,
) -> Callable[[ArrayLike], Callable[[str], Array]]:
    """A schedule `step -> (path -> alpha)`, as `blend` takes it, with a window for each layer.

    All windows are equally long. The first begins at `start`, the last ends at `stop`, and each
    begins a share `1 - overlap` of a window after the one before: `overlap` 0 has them one after
    another, 1 all at once. For n layers a window takes the part `1 / (1 + (n - 1) * (1 - overlap))`
    of the whole, its ends rounded to steps.

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
