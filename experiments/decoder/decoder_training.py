"""Training and reading of a model of bytes: a short loop around NNX's own optimizer.

The loop of `ab_jax.training` is for images: it asks for a Linen module, augmentation, labels and
batch statistics, none of which there is here. This is what a team's own loop looks like that takes
the methods in by one line.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import ab_jax as ab
from ab_jax import nnx as ab_nnx
from experiments.decoder.help_text import draw, windows

Step = Callable[[nnx.Module, "nnx.Optimizer[nnx.Module]", jax.Array], jax.Array]


def make_optimizer(
    model: nnx.Module, learning_rate: float, steps: int, warmup: float
) -> "nnx.Optimizer[nnx.Module]":
    """Adam with clipped gradients; the rate rises for the part `warmup`, then falls by a cosine."""
    rate = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, warmup_steps=max(1, round(warmup * steps)), decay_steps=steps
    )
    # The usual choice for transformers; no weight decay, which would move weights at alpha 1
    # (unless by ab.decay_with_gradient).
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))
    return nnx.Optimizer(model, adam, wrt=nnx.Param)


def make_step(
    rules: ab.Rules, estimator: ab.Estimator | ab.ScaledEstimator, alpha: optax.Schedule
) -> Step:
    """A compiled step on int32 [batch, length]; returns the loss of the blended model, in nats."""

    @nnx.jit
    def step(
        model: nnx.Module, optimizer: "nnx.Optimizer[nnx.Module]", tokens: jax.Array
    ) -> jax.Array:
        def loss_fn(model: nnx.Module) -> jax.Array:
            now = alpha(optimizer.step[...])
            return losses(ab_nnx.blended(model, rules, now, estimator=estimator), tokens).mean()

        loss, gradient = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, gradient)
        return loss

    return step


def losses(model: nnx.Module, tokens: jax.Array) -> jax.Array:
    """float32 [batch, length - 1]: of each byte but the first, given those before it, in nats."""
    logits = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])


def train(
    model: nnx.Module,
    optimizer: "nnx.Optimizer[nnx.Module]",
    step: Step,
    part: np.ndarray,
    *,
    steps: int,
    batch_size: int,
    context: int,
    seed: int,
    every: int,
    look: Callable[[int, float], None],
) -> None:
    """Take so many steps, each on stretches drawn from `part` by the seed.

    Args:
      model, optimizer: changed in place.
      look: called every so many steps, and at the end, with the number of steps taken and the mean
        training loss since the last time, in nats.

    Raises:
      ValueError: the loss is not finite; names the step.
    """
    rng = np.random.default_rng(seed)
    since: list[jax.Array] = []
    for number in range(1, steps + 1):
        tokens = jnp.asarray(draw(part, batch_size, context + 1, rng))
        since.append(step(model, optimizer, tokens))
        if number % every == 0 or number == steps:
            loss = float(np.mean(jax.device_get(since)))
            if not math.isfinite(loss):
                raise ValueError(
                    f"The loss was not finite within {len(since)} steps up to step {number}. Take "
                    f"a smaller --learning_rate."
                )
            since = []
            look(number, loss)


def bits_per_byte(model: nnx.Module, part: np.ndarray, *, batch_size: int, context: int) -> float:
    """The mean over all bytes of a part but the first, each given at most `context` before it."""
    total = 0.0
    for tokens, weights in zip(*windows(part, batch_size, context), strict=True):
        total += float(_weighted(model, jnp.asarray(tokens), jnp.asarray(weights)))
    return total / (len(part) - 1) / math.log(2)


@nnx.jit
def _weighted(model: nnx.Module, tokens: jax.Array, weights: jax.Array) -> jax.Array:
    return (losses(model, tokens) * weights).sum()
