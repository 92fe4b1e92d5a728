"""Where the ramps of a run are at a step: of each quantized parameter and of the activations.

Every checkpoint notes it, so that a run which is resumed with other flags does not go backwards.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from ab_jax.blend import Alpha, mean_alpha
from ab_jax.describe import quantized_paths
from ab_jax.rules import Rules

_ACTIVATIONS = "activations"
_ROUNDING = 1e-6  # of alpha in float32, from one machine to another


@dataclasses.dataclass(frozen=True)
class Alphas:
    """Where the ramps are.

    Attributes:
      weights: alpha of the weights, as `blend` takes it.
      paths: of the parameters that are quantized.
      mean: over these, each counting alike.
      activations: alpha of the activations.
    """

    weights: Alpha
    paths: tuple[str, ...]
    mean: float
    activations: float

    @classmethod
    def of(cls, params: Any, rules: Rules, weights: Alpha, activations: float | None) -> "Alphas":
        """For a tree of parameters; activations: None: as the mean of the weights."""
        mean = float(np.asarray(mean_alpha(params, rules, weights)))
        paths = tuple(quantized_paths(params, rules))
        return cls(weights, paths, mean, mean if activations is None else activations)

    def by_path(self) -> dict[str, float]:
        """By the path of each parameter, and of the activations."""
        weights = self.weights
        own = {
            path: float(np.asarray(weights(path))) if callable(weights) else self.mean
            for path in self.paths
        }
        return {**own, _ACTIVATIONS: self.activations}


def check_never_falls(step: int, before: Mapping[str, float], now: Mapping[str, float]) -> None:
    """Refuse to go on with ramps that are behind those with which a run came to a step.

    Args:
      step: at which the run is resumed.
      before: alpha by name there, as the run came to it.
      now: the same, as the flags would have it.

    Raises:
      ValueError: names the parameter that would fall furthest, and the ways out.
    """
    falls = {name: before[name] - now[name] for name in before if name in now}
    name = max(falls, key=lambda name: falls[name], default=_ACTIVATIONS)
    if falls.get(name, 0) > _ROUNDING:
        raise ValueError(
            f"The ramp would run backwards: at step {step} the alpha of {name} is "
            f"{before[name]:.4g}, with these flags it would fall to {now[name]:.4g}. Keep --epochs "
            f"and the flags of the ramp as they were; or give --ramp_start and --ramp_stop, which "
            f"are parts of the run, such that the ramp starts and stops at the steps where it did; "
            f"or begin a new run under another --name, from this one's weights by --init_from."
        )
