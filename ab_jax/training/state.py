"""The state of a training run: all that a step changes, and all that a checkpoint holds."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("step", "params", "model_state", "opt_state", "key"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What training changes.

    Attributes:
      step: int32 scalar, the number of steps (batches) done; alpha is a function of it.
      params: the full-precision (latent) parameters.
      model_state: the model's other collections, such as `batch_stats`.
      opt_state: the optimizer's state.
      key: the key data (uint32) that augmentation derives its random numbers from.
    """

    step: Array
    params: Any
    model_state: Any
    opt_state: Any
    key: Array


def create_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    seed: int,
) -> TrainState:
    """A fresh state; the same seed gives the same weights.

    Args:
      model: its `__call__` takes images and `train`.
      optimizer: an optax optimizer.
      image_shape: [height, width, channels].
      seed: of the initial weights and the augmentation.
    """
    weights_key, augment_key = jax.random.split(jax.random.key(seed))
    images = jnp.zeros((1, *image_shape), jnp.float32)
    variables = jax.jit(functools.partial(model.init, train=False))(weights_key, images)
    params = variables.pop("params")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=variables,
        opt_state=optimizer.init(params),
        key=jax.random.key_data(augment_key),
    )
