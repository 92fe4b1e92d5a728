"""A decoder whose training step is compiled and timed; it need not learn anything.

Its blocks are those of `experiments.decoder`. The vocabulary is larger, and the output layer has
weights of its own, as in the decoders that people train.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

import ab_jax as ab
from experiments.decoder.transformer import Block


class UntiedDecoder(nnx.Module):
    """From int32 tokens [batch, length] to logits [batch, length, vocabulary].

    Args:
      vocabulary: how many tokens there are.
      width, heads, layers: of the blocks.
      context: the longest input.
    """

    def __init__(
        self, *, vocabulary: int, width: int, heads: int, layers: int, context: int, rngs: nnx.Rngs
    ):
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.position = nnx.Embed(context, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(layers)])
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, tokens: Array) -> Array:
        x = self.embed(tokens) + self.position(jnp.arange(tokens.shape[1]))[None]
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


def kernel_rules(quantizer: Callable[..., ab.Quantizer]) -> ab.Rules:
    """All kernels of the blocks; `quantizer` takes an axis as keyword."""
    return ab.Rules(
        [
            (r"blocks/\d+/attention/(query|key|value)/kernel", quantizer(axis=(-2, -1))),
            (r"blocks/\d+/(attention/out|up|down)/kernel", quantizer()),
            (r".*", None),
        ]
    )


def adam_step(
    model: nnx.Module, see: Callable[[nnx.Module, ArrayLike, Any], nnx.Module]
) -> tuple[Callable[..., Any], Any]:
    """A step of Adam on the mean cross-entropy of the next token, to be compiled, and its state.

    Args:
      see: `(model, alpha, given) -> model`, the module that the loss sees; `given` is whatever the
        step is given.

    Returns:
      `(state, tokens, alpha, given) -> (state, loss)`, and the first state.
    """
    structure, params = nnx.split(model, nnx.Param)
    optimizer = optax.adam(1e-3)

    def loss(params: Any, tokens: Array, alpha: ArrayLike, given: Any) -> Array:
        logits = see(nnx.merge(structure, params), alpha, given)(tokens)
        return jnp.mean(
            optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        )

    def step(state: Any, tokens: Array, alpha: ArrayLike, given: Any) -> tuple[Any, Array]:
        params, moments = state
        value, gradient = jax.value_and_grad(loss)(params, tokens, alpha, given)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    return step, (params, jax.jit(optimizer.init)(params))
