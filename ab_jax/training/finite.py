"""Numbers that are not finite: looked for at next to no cost, reported with all that helps."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ab_jax.training.state import TrainState


class NonFiniteLossError(FloatingPointError):
    """The loss, a gradient or a weight became infinite or not a number."""


def finite_leaves(tree: Any) -> Array:
    """Whether each leaf is finite, as far as the sum of its squares is: bool [leaves].

    In a step that is one more reading of the gradients, which it reads several times anyway.
    """
    return jnp.stack([jnp.isfinite(jnp.vdot(leaf, leaf)) for leaf in jax.tree.leaves(tree)])


@dataclasses.dataclass(frozen=True)
class FiniteCheck:
    """Stops a run over numbers that are not finite.

    Attributes:
      learning_rate: a schedule over steps, for the message.
      last_checkpoint: the directory of the newest whole checkpoint, for the message.
    """

    learning_rate: Callable[[int], float]
    last_checkpoint: Callable[[], Path | None]

    def steps(self, metrics: Sequence[Mapping[str, Any]], first: int, params: Any) -> None:
        """Check what consecutive steps returned.

        Args:
          metrics: of each step: `loss`, `alpha`, and `finite` of its gradients' leaves.
          first: the first of the steps.
          params: a tree of the structure of what is trained.

        Raises:
          NonFiniteLossError: names the step, alpha, the learning rate, the first parameter whose
            gradient is not finite, and the checkpoint to go back to.
        """
        for step, of_step in enumerate(metrics, start=first):
            loss, finite = float(of_step["loss"]), np.asarray(of_step["finite"])
            if np.isfinite(loss) and np.all(finite):
                continue
            if np.all(finite):
                gradients = "all gradients are finite"
            else:
                gradients = f"the gradient of {_paths(params)[np.argmin(finite)]} is not finite"
            self._stop(f"The loss is {loss} and {gradients}", step, float(of_step["alpha"]))

    def network(self, state: TrainState, alpha: float) -> None:
        """Check weights and model state: a step's loss says nothing yet of what its update made.

        Raises:
          NonFiniteLossError: names the first parameter, and the rest as `steps` does.
        """
        network = {"params": state.params, **state.model_state}
        if state.scales is not None:
            network["scales"] = state.scales
        finite = np.asarray(_finite_everywhere(network))  # where they lie: they need not travel
        if not np.all(finite):
            found = f"{_paths(network)[np.argmin(finite)]} is not finite after its update"
            self._stop(found, int(state.step) - 1, alpha)

    def _stop(self, found: str, step: int, alpha: float) -> NoReturn:
        path = self.last_checkpoint()
        last = "none yet" if path is None else f"step {path.name} ({path})"
        raise NonFiniteLossError(
            f"{found} at step {step}, at alpha {alpha:.4f} and learning rate "
            f"{self.learning_rate(step):.6g}. Last checkpoint: {last}. Lower the learning rate or "
            f"clip gradients: under another --name, or from that checkpoint on by --allow_changed."
        )


@jax.jit
def _finite_everywhere(tree: Any) -> Array:
    """Whether every number of each leaf is finite: bool [leaves]."""
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)])


def _paths(tree: Any) -> list[str]:
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree.leaves_with_path(tree)
    ]
