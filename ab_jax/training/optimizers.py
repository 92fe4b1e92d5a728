"""Optimizers by name, and what is wrapped around them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from ab_jax.training.state import Trained

# Adding an optimizer is one line: a function of the learning-rate schedule, the momentum, the
# weight decay and the mask of what decays.
Factory = Callable[..., optax.GradientTransformation]
OPTIMIZERS: Mapping[str, Factory] = {
    "sgd": lambda rate, momentum, decay, mask: optax.chain(
        optax.add_decayed_weights(decay, mask), optax.sgd(rate, momentum)
    ),
    "adamw": lambda rate, momentum, decay, mask: optax.adamw(
        rate, b1=momentum, weight_decay=decay, mask=mask
    ),
}


def warmup_cosine(
    peak: float, warmup_steps: int, total_steps: int, final: float = 0.0
) -> optax.Schedule:
    """Learning rate: up to `peak` in `warmup_steps` in a line, then down along a cosine.

    Args:
      peak: the highest rate.
      warmup_steps, total_steps: how long the line is, and both together.
      final: the rate at the end, in parts of the peak; 1: it stays there.

    Raises:
      ValueError: a peak that is not positive, a warm-up that leaves no step, or an end outside
        [0, 1].
    """
    if peak <= 0:
        raise ValueError(f"learning_rate={peak}: the learning rate must be positive.")
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"A warm-up of {warmup_steps} steps does not fit into {total_steps} steps of training. "
            f"Train longer or warm up less."
        )
    if not 0 <= final <= 1:
        raise ValueError(f"final_rate={final} must lie in [0, 1]: it is in parts of the peak.")
    # Without warm-up the first step is already at the peak.
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup_steps else peak,
        peak_value=peak,
        warmup_steps=warmup_steps,
        decay_steps=total_steps,
        end_value=final * peak,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """An optax optimizer with weight decay on kernels only, none on their scales.

    Attributes:
      name: one of `OPTIMIZERS`.
      momentum: of SGD; the first moment's decay of AdamW.
      weight_decay: added to the gradient by SGD, decoupled in AdamW; on leaves named `kernel`.
      clip_norm: the largest global norm of the gradient; None: not clipped.
      accumulate: batches whose gradients are averaged for an update.
      relative: whether updates are relative to the weights that training starts from (see
        `relative_updates`); the norm that is clipped is then that of these gradients.

    Raises:
      ValueError: an unknown name or a number out of range.
    """

    name: str
    momentum: float = 0.9
    weight_decay: float = 0.0
    clip_norm: float | None = None
    accumulate: int = 1
    relative: bool = False

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            known = ", ".join(sorted(OPTIMIZERS))
            raise ValueError(f"Unknown optimizer {self.name!r}. Known: {known}.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum} must lie in [0, 1).")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay={self.weight_decay} must not be negative.")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm={self.clip_norm} must be positive, or None not to clip.")
        if self.accumulate < 1:
            raise ValueError(f"accumulate={self.accumulate} must be at least 1 batch.")

    def with_numbers(
        self, learning_rate: optax.Schedule, momentum: ArrayLike, weight_decay: ArrayLike
    ) -> optax.GradientTransformation:
        """The optimizer with these numbers in place of its own, which may be traced.

        Args:
          learning_rate: a schedule over updates: with `accumulate` there is one every so many
            steps.
          momentum, weight_decay: as the attributes.
        """
        optimizer = OPTIMIZERS[self.name](learning_rate, momentum, weight_decay, _kernels)
        if self.clip_norm is not None:
            optimizer = optax.chain(optax.clip_by_global_norm(self.clip_norm), optimizer)
        if self.accumulate > 1:
            optimizer = optax.MultiSteps(optimizer, self.accumulate).gradient_transformation()
        return relative_updates(optimizer) if self.relative else optimizer


def make_optimizer(
    name: str, learning_rate: optax.Schedule, **settings: Any
) -> optax.GradientTransformation:
    """An optimizer whose numbers are constants.

    Args:
      name, settings: as the attributes of `OptimizerSettings`.
      learning_rate: a schedule over updates.

    Raises:
      ValueError: as `OptimizerSettings`.
    """
    s = OptimizerSettings(name=name, **settings)
    return s.with_numbers(learning_rate, s.momentum, s.weight_decay)


class RelativeUpdatesState(NamedTuple):
    """Of `relative_updates`: what is divided by (r), and the state of the optimizer within."""

    sizes: Any
    inner_state: Any


def relative_updates(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer in the coordinates w / r: one learning rate for channels of any size.

    The gradient in these coordinates is r times that of w, and an update of w is r times one there.
    r is of the parameters that `init` is given, and part of the state:

        leaves named `kernel`        1e-8 + the root mean square of each output channel (last axis)
        scales (`Trained.scales`)    the scales
        any other leaf               1

    The optimizer is shown w / r too. So weight decay means what it means without this: SGD adds
    decay * w / r to the gradient in these coordinates, AdamW takes rate * decay * w / r off, and
    of w itself decays rate * decay * w, whatever r is. Clipping sees the gradients times r.

    (Our choice: layers and channels of trained networks differ by orders of magnitude, and a step
    of few bits is as large as the channel's scale.)

    Args:
      optimizer: any optax optimizer; one that reads parameters for more than decay reads w / r.
    """

    def init(params: optax.Params) -> RelativeUpdatesState:
        sizes = _sizes(params)
        return RelativeUpdatesState(sizes, optimizer.init(_divided(params, sizes)))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, RelativeUpdatesState]:
        if params is None:
            raise ValueError("relative_updates needs the parameters: update(grads, state, params).")
        sizes = state.sizes
        scaled = jax.tree.map(jnp.multiply, updates, sizes)
        scaled, inner = optimizer.update(scaled, state.inner_state, _divided(params, sizes))
        return jax.tree.map(jnp.multiply, scaled, sizes), RelativeUpdatesState(sizes, inner)

    return optax.GradientTransformation(init, update)


def _sizes(params: Any) -> Any:
    """What `relative_updates` divides by: arrays that broadcast against the leaves."""
    if isinstance(params, Trained):
        # An array of its own for each: the memory of the state is taken over by that of the next.
        return Trained(_sizes(params.params), jax.tree.map(jnp.abs, params.scales))

    def size(w: Any, is_kernel: bool) -> Any:
        if not is_kernel:
            return jnp.ones((), w.dtype)
        inside = tuple(range(w.ndim - 1))
        return jnp.sqrt(jnp.mean(jnp.square(w), inside, keepdims=True)) + 1e-8

    return jax.tree.map(size, params, _kernels(params))


def _divided(params: Any, sizes: Any) -> Any:
    return jax.tree.map(jnp.divide, params, sizes)


def _kernels(params: optax.Params) -> optax.Params:
    if isinstance(params, Trained):
        return Trained(_kernels(params.params), dict.fromkeys(params.scales, False))
    return jax.tree.map_with_path(
        lambda path, _: jax.tree_util.keystr(path[-1:], simple=True) == "kernel", params
    )
