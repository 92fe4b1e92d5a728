"""The state of a training run: all that a step changes, and all that a checkpoint holds."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ab_jax.blend import fit, initial_scales
from ab_jax.carried_fits import Fit
from ab_jax.linen import Model
from ab_jax.rules import Rules


class Trained(NamedTuple):
    """What an optimizer updates where scales are trained too."""

    params: Any
    scales: Any


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("step", "params", "model_state", "opt_state", "key", "scales", "fits"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What training changes.

    Attributes:
      step: int32 scalar, the number of steps (batches) done; alpha is a function of it.
      params: the full-precision (latent) parameters.
      model_state: the model's other collections, such as `batch_stats`.
      opt_state: the optimizer's state, of `trained`.
      key: the key data (uint32) that augmentation derives its random numbers from.
      scales: by path the scales of quantized parameters, where they are trained (see
        `ab_jax.learned_scales`); None: they are not.
      fits: what was last fitted of the parameters (`ab_jax.fit`), where that serves several steps;
        None: each step fits for itself.
    """

    step: Array
    params: Any
    model_state: Any
    opt_state: Any
    key: Array
    scales: dict[str, Array] | None = None
    fits: dict[str, Fit] | None = None

    @property
    def trained(self) -> Any:
        """What the optimizer updates: the parameters, or `Trained`, these and their scales."""
        return self.params if self.scales is None else Trained(self.params, self.scales)

    def with_trained(self, trained: Any) -> "TrainState":
        """The same state with other values of `trained`."""
        if self.scales is None:
            return dataclasses.replace(self, params=trained)
        return dataclasses.replace(self, params=trained.params, scales=trained.scales)


def create_state(
    model: Model,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    seed: int,
    *,
    scale_rules: Rules | None = None,
    fit_rules: Rules | None = None,
) -> TrainState:
    """A fresh state; the same seed gives the same weights.

    Args:
      model: its `__call__` takes images and `train`.
      optimizer: an optax optimizer.
      image_shape: [height, width, channels].
      seed: of the initial weights and the augmentation.
      scale_rules: of the weights whose scales are trained too; None: no scales are.
      fit_rules: of the weights whose fits serve several steps; None: there are none.

    Raises:
      ValueError, TypeError: such rules that do not fit, as `ab_jax.initial_scales`.
    """
    weights_key, augment_key = jax.random.split(jax.random.key(seed))
    images = jnp.zeros((1, *image_shape), jnp.float32)
    variables = jax.jit(functools.partial(model.init, train=False))(weights_key, images)
    params = variables.pop("params")
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=variables,
        opt_state=None,
        key=jax.random.key_data(augment_key),
        scales=None if scale_rules is None else initial_scales(params, scale_rules),
        fits=None if fit_rules is None else fit(params, fit_rules),
    )
    return dataclasses.replace(state, opt_state=optimizer.init(state.trained))
