"""Flax Linen: a convolutional network in a TrainState, left as it is.

    python -m examples.linen_digits          (about ten seconds)

The call of `ab.blend` inside the loss is the whole integration. Batch statistics go their usual
way, through `mutable`; they see the blended network and are exported with its codes.
"""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import tyro
from flax.training import train_state

import ab_jax as ab
from ab_jax.export.packed import read_packed, write_packed
from examples import handwritten_digits as digits


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(nn.Conv(16, (3, 3), name="stem")(x))
        x = nn.Conv(32, (3, 3), strides=2, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(10, name="head")(x.reshape(len(x), -1))


RULES = ab.Rules(
    [
        (r"(stem|head)/kernel", ab.Uniform(bits=8)),
        (r".*/kernel", ab.Ternary()),
        (r".*", None),
    ]
)


class TrainState(train_state.TrainState):
    batch_stats: Any


def run(
    float_steps: int = 200, steps: int = 300, seed: int = 0, out: Path = Path("runs/guides")
) -> tuple[Any, Any, float]:
    """Train, export and read back; returns parameters, codes and the codes' test accuracy."""
    train, test = digits.load()
    model = CNN()
    variables = model.init(jax.random.key(seed), jnp.zeros((1, 8, 8, 1)))
    print(ab.describe(variables["params"], RULES))
    state = TrainState.create(apply_fn=model.apply, tx=optax.adam(3e-3), **variables)
    # In float first; the ramp ends before training does, for the biases to settle.
    alpha = ab.cubic_ramp(start=float_steps, stop=float_steps + steps * 4 // 5)

    @jax.jit
    def train_step(state: TrainState, images: jax.Array, labels: jax.Array) -> TrainState:
        def loss_fn(params: Any) -> tuple[jax.Array, Any]:
            blended = ab.blend(params, RULES, alpha(state.step))
            variables = {"params": blended, "batch_stats": state.batch_stats}
            logits, new = state.apply_fn(variables, images, train=True, mutable=["batch_stats"])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss, new["batch_stats"]

        grads, batch_stats = jax.grad(loss_fn, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, batch_stats=batch_stats)

    for images, labels in digits.batches(train, float_steps + steps, seed):
        state = train_step(state, images, labels)

    # The codes are made once, and what is exported is what is read on test images.
    codes = ab.quantize(state.params, RULES)
    out.mkdir(parents=True, exist_ok=True)
    write_packed(
        out / "linen.safetensors", {"params": codes, "batch_stats": state.batch_stats}, rules=RULES
    )
    network = read_packed(out / "linen.safetensors").variables
    deployed = jax.jit(lambda images: model.apply(ab.dequantize(network), images))
    accuracy = float((deployed(test[0]).argmax(-1) == test[1]).mean())
    program = jax.export.export(deployed)(jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32))
    (out / "linen.stablehlo").write_bytes(program.serialize())
    print(f"Test accuracy of the codes: {100 * accuracy:.1f} %. Written to {out}/linen.*")
    return state.params, codes, accuracy


if __name__ == "__main__":
    tyro.cli(run, description=__doc__, use_underscores=True)
