"""A small decoder-only transformer in Flax NNX, as anybody would write it, and rules for it.

Nothing in the model knows of quantization. Its attention kernels have three axes: those of queries,
keys and values are [features, heads, head size], where an output channel is a pair of head and
feature, so that `axis=(-2, -1)` gives each its scale; that back to the features is [heads, head
size, features], whose channels are the last axis, as everywhere else in Flax.
"""

import jax
import jax.numpy as jnp
from flax import nnx

import ab_jax as ab

VOCABULARY = 256  # bytes

RULES = ab.Rules(
    [
        (r"blocks/\d+/attention/(query|key|value)/kernel", ab.Ternary(axis=(-2, -1))),
        (r"blocks/\d+/(attention/out|up|down)/kernel", ab.Ternary()),
        # A scale for each byte's vector, which serves the lookup and the output alike.
        (r"embed/embedding", ab.Uniform(bits=8, axis=0)),
        (r".*", None),  # positions and norms
    ]
)


class Block(nnx.Module):
    """Attention and a layer of hidden units, each behind a norm and beside a shortcut."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            heads, width, use_bias=False, decode=False, rngs=rngs
        )
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class Decoder(nnx.Module):
    """From int32 bytes [batch, length] to logits [batch, length, 256] of each byte's next one.

    Args:
      width: of the residual stream; `heads` divides it.
      heads, layers: as many in each block, and blocks.
      context: the longest input, in bytes; each position has a vector of its own.
    """

    def __init__(self, *, width: int, heads: int, layers: int, context: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, width, rngs=rngs)
        self.position = nnx.Embed(context, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(layers)])
        self.norm = nnx.RMSNorm(width, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens) + self.position(jnp.arange(tokens.shape[1]))[None]
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.embed.attend(self.norm(x))  # the embedding's own weights
