"""The numbers that differ from run to run and from step to step: learning rate, decay, ramps.

They enter the compiled step as arrays, for many steps at once, and each step picks its own. So two
runs that differ in a rate or a ramp share one program, and no step waits for a number to reach the
device.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from ab_jax.blend import Alpha, AlphaSchedule

#: Steps whose numbers are on the devices at a time. Always as many, so that the length of a run is
#: no part of the program.
BLOCK = 1024


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepNumbers:
    """The numbers of a step; or, with a leading axis, those of `BLOCK` steps from `first` on.

    Attributes:
      first: int32, the step of the first of them.
      learning_rate: float32, of the update that the step belongs to.
      momentum, weight_decay: float32, of the optimizer.
      alpha: float32 of the weights, or one by the path of each that is quantized.
      activation_alpha: float32; None: as the weights.
    """

    first: Any
    learning_rate: Any
    momentum: Any
    weight_decay: Any
    alpha: Any
    activation_alpha: Any

    def at(self, step: Array) -> "StepNumbers":
        """Those of a step, out of a block."""
        index = step - self.first
        return jax.tree.map(lambda x: x if jnp.ndim(x) == 0 else x[index], self)

    @property
    def alpha_of_weights(self) -> Alpha:
        """As `ab_jax.blend` takes it."""
        return self.alpha.__getitem__ if isinstance(self.alpha, dict) else self.alpha


@dataclasses.dataclass(frozen=True)
class Schedules:
    """Where the numbers of a run come from.

    Attributes:
      learning_rate: a schedule over updates.
      alpha, activation_alpha: over steps, as `Training` has them.
      accumulate: steps in an update.
      momentum, weight_decay: of the optimizer.
      paths: of the parameters that are quantized.
    """

    learning_rate: optax.Schedule
    alpha: AlphaSchedule
    activation_alpha: optax.Schedule | None
    accumulate: int
    momentum: float
    weight_decay: float
    paths: tuple[str, ...]

    def block(self, first: int) -> StepNumbers:
        """The numbers of `BLOCK` steps from one on, on the host."""
        steps = jnp.arange(first, first + BLOCK)
        of_activations = self.activation_alpha
        return StepNumbers(
            first=np.array(first, np.int32),
            learning_rate=_over(self.learning_rate, steps // self.accumulate),
            momentum=np.array(self.momentum, np.float32),
            weight_decay=np.array(self.weight_decay, np.float32),
            alpha=_over(self._alpha, steps),
            activation_alpha=None if of_activations is None else _over(of_activations, steps),
        )

    def _alpha(self, step: Any) -> Any:
        alpha = self.alpha(step)
        return {path: alpha(path) for path in self.paths} if callable(alpha) else alpha


def _over(schedule: Any, steps: Array) -> Any:
    """float32 numbers of a schedule at all steps; not compiled, as its numbers are its own."""
    found = jax.vmap(schedule)(steps)
    return jax.tree.map(lambda x: np.asarray(x, np.float32), found)
