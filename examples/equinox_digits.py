"""Equinox: a module that is a tree itself, left as it is.

    python -m examples.equinox_digits        (about ten seconds)

Its layers keep output channels first, [outputs, inputs, height, width], so a quantizer wants
`axis=0`; kernels are called `weight`. `eqx.partition` sets the arrays apart from functions and
settings, and `eqx.combine` brings them together around the blended ones.
"""

from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import tyro

import ab_jax as ab
from ab_jax.export.dictionaries import from_dictionaries, to_dictionaries
from ab_jax.export.packed import read_packed, write_packed
from examples import handwritten_digits as digits


class CNN(eqx.Module):
    stem: eqx.nn.Conv2d
    conv: eqx.nn.Conv2d
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, 3)
        self.stem = eqx.nn.Conv2d(1, 16, 3, padding=1, key=keys[0])
        self.conv = eqx.nn.Conv2d(16, 32, 3, stride=2, padding=1, key=keys[1])
        self.head = eqx.nn.Linear(32 * 4 * 4, 10, key=keys[2])

    def __call__(self, x: jax.Array) -> jax.Array:  # of one image, channels first
        x = jax.nn.relu(self.conv(jax.nn.relu(self.stem(x))))
        return self.head(x.ravel())


RULES = ab.Rules(
    [
        (r"(stem|head)/weight", ab.Uniform(bits=8, axis=0)),
        (r".*/weight", ab.Ternary(axis=0)),
        (r".*", None),
    ]
)


def run(
    float_steps: int = 200, steps: int = 300, seed: int = 0, out: Path = Path("runs/guides")
) -> tuple[Any, Any, float]:
    """Train, export and read back; returns parameters, codes and the codes' test accuracy."""
    train, test = digits.load()
    params, static = eqx.partition(CNN(jax.random.key(seed)), eqx.is_inexact_array)
    print(ab.describe(params, RULES))
    optimizer = optax.adam(3e-3)
    state = optimizer.init(params)
    # In float first; the ramp ends before training does, for the biases to settle.
    alpha = ab.cubic_ramp(start=float_steps, stop=float_steps + steps * 4 // 5)

    @jax.jit
    def train_step(
        params: Any, state: Any, step: jax.Array, images: jax.Array, labels: jax.Array
    ) -> tuple[Any, Any]:
        def loss_fn(params: Any) -> jax.Array:
            model = eqx.combine(ab.blend(params, RULES, alpha(step)), static)
            logits = jax.vmap(model)(images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, state = optimizer.update(jax.grad(loss_fn)(params), state)
        return optax.apply_updates(params, updates), state

    for step, (images, labels) in enumerate(digits.batches(train, float_steps + steps, seed)):
        params, state = train_step(params, state, step, images.transpose(0, 3, 1, 2), labels)

    # The codes are made once, and what is exported is what is read on test images.
    codes = ab.quantize(params, RULES)
    out.mkdir(parents=True, exist_ok=True)
    write_packed(out / "equinox.safetensors", {"params": to_dictionaries(codes)}, rules=RULES)
    variables = read_packed(out / "equinox.safetensors").variables
    network = from_dictionaries(variables["params"], like=codes)
    deployed = jax.jit(lambda images: jax.vmap(eqx.combine(ab.dequantize(network), static))(images))
    answers = deployed(test[0].transpose(0, 3, 1, 2)).argmax(-1)
    accuracy = float((answers == test[1]).mean())
    program = jax.export.export(deployed)(jax.ShapeDtypeStruct((1, 1, 8, 8), jnp.float32))
    (out / "equinox.stablehlo").write_bytes(program.serialize())
    print(f"Test accuracy of the codes: {100 * accuracy:.1f} %. Written to {out}/equinox.*")
    return params, codes, accuracy


if __name__ == "__main__":
    tyro.cli(run, description=__doc__, use_underscores=True)
