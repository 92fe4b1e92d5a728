"""Weight decay that follows the gradient: a weight that gets no gradient does not decay either.

AdamW takes its decay off the weights beside the gradient, whatever that is. The blend scales the
gradient by `1 - alpha` and leaves the decay alone: it weighs more and more against the gradient
while alpha rises, and at alpha 1, where no gradient is left, it goes on shrinking the weights. The
codes stay, since all weights of a block shrink alike; their scales do not.

    optimizer = decay_with_gradient(optax.adamw(1e-3, weight_decay=0.1), rules, alpha)

is AdamW with the decay of each quantized parameter scaled as its gradient is. (Our choice; nothing
is known of the paper's optimizer.)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from ab_jax.blend import AlphaSchedule, check_alpha
from ab_jax.rules import Rules, assigned, check_fits


class DecayWithGradientState(NamedTuple):
    """Of `decay_with_gradient`: how many updates it has made (int32), and the state within."""

    count: Array  # type: ignore[assignment]  # tuples have a method of that name
    inner_state: Any


def one_minus(alpha: ArrayLike) -> ArrayLike:
    """`1 - alpha`: by what factor AB's gradient reaches a weight."""
    return 1 - alpha


def decay_with_gradient(
    optimizer: optax.GradientTransformation,
    rules: Rules,
    alpha: AlphaSchedule,
    *,
    factor: Callable[[ArrayLike], ArrayLike] = one_minus,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer, its weight decay scaled by the factor of the gradient.

    It is shown each parameter that a rule quantizes times the factor, and decays by as much less.
    While alpha is 0 it is the optimizer itself, bit for bit; at alpha 1 no decay is left. What
    momentum remembers of earlier gradients still moves the weights for some steps.

    Args:
      optimizer: one that reads the parameters for its decay alone, as `optax.adamw`, `optax.lion`
        and `optax.add_decayed_weights` do, with masks and schedules of theirs. One that reads them
        for more (`optax.lamb`, `optax.adafactor`) would go wrong: there, chain
        `decay_with_gradient(optax.add_decayed_weights(...), ...)` in the place of its own decay.
      rules: as for `ab_jax.blend`; their paths are those of the tree that the optimizer updates.
      alpha: a schedule, as for `ab_jax.blend`: of the updates made, and it may give a function of
        the path. Give the loss the same one at the same count: within `optax.MultiSteps` it counts
        optimizer steps.
      factor: by what the gradient is scaled at an alpha; the default is AB's. That of a method
        whose gradient is not scaled is 1: it needs none of this.

    Raises:
      TypeError: an alpha that is no schedule; an `optax.MultiSteps`. ValueError: from `init` and
        `update`, rules that do not fit the parameters, or an alpha outside [0, 1]; from `update`
        also no parameters.
    """
    if not callable(alpha):
        raise TypeError(
            f"decay_with_gradient takes alpha as a schedule, not {alpha!r}. Give the ramp itself, "
            f"or optax.constant_schedule({alpha!r})."
        )
    if isinstance(optimizer, optax.MultiSteps):
        raise TypeError(
            "decay_with_gradient counts the updates of the optimizer that it wraps, but MultiSteps "
            "is called once a micro-batch. Wrap the other way round: "
            "optax.MultiSteps(decay_with_gradient(optimizer, ...), every_k_schedule=...)."
        )
    inner = optax.with_extra_args_support(optimizer)

    def scaled(params: Any, count: Array) -> Any:
        leaves, chosen, structure = assigned(params, rules)
        of_step = alpha(count)
        seen = []
        for (path, leaf), index in zip(leaves, chosen, strict=True):
            pattern, quantizer = rules.rules[index]
            if quantizer is not None:
                check_fits(path, leaf, pattern, quantizer)
                own = of_step(path) if callable(of_step) else of_step
                check_alpha(own, f" for {path}" if callable(of_step) else "")
                # The parameter and not what comes of it: its decay is computed as ever.
                leaf = leaf * jnp.asarray(factor(own), leaf.dtype)
            seen.append(leaf)
        return jax.tree.unflatten(structure, seen)

    def init(params: Any) -> DecayWithGradientState:
        count = jnp.zeros((), jnp.int32)
        jax.eval_shape(scaled, params, count)  # rules that do not fit are refused here already
        return DecayWithGradientState(count, inner.init(params))

    def update(
        updates: Any, state: DecayWithGradientState, params: Any = None, **extra: Any
    ) -> tuple[Any, DecayWithGradientState]:
        if params is None:
            raise ValueError(
                "decay_with_gradient decays parameters: call update(gradients, state, params)."
            )
        seen = scaled(params, state.count)
        updates, inner_state = inner.update(updates, state.inner_state, seen, **extra)
        return updates, DecayWithGradientState(optax.safe_increment(state.count), inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
