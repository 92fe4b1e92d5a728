"""Flax NNX: a module that holds its own parameters, left as it is.

    python -m examples.nnx_digits            (about ten seconds)

`ab_nnx.blended(model, ...)` stands where `model` would: it is the module around blended parameters,
and shares all else with the model, so that batch statistics reach it. By hand it would be

    structure, params, rest = nnx.split(model, nnx.Param, ...)
    blended = nnx.merge(structure, ab.blend(params, RULES, alpha(step)), rest)

An NNX path ends in `/value`, which rules need not say; it is dropped.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro
from flax import nnx

import ab_jax as ab
from ab_jax import nnx as ab_nnx
from ab_jax.export.dictionaries import from_dictionaries, to_dictionaries
from ab_jax.export.packed import read_packed, write_packed
from examples import handwritten_digits as digits


class CNN(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.stem = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.conv = nnx.Conv(16, 32, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
        self.head = nnx.Linear(4 * 4 * 32, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.conv(nnx.relu(self.stem(x)))))
        return self.head(x.reshape(len(x), -1))


RULES = ab.Rules(
    [
        (r"(stem|head)/kernel", ab.Uniform(bits=8)),
        (r".*/kernel", ab.Ternary()),
        (r".*", None),
    ]
)


def run(
    float_steps: int = 200, steps: int = 300, seed: int = 0, out: Path = Path("runs/guides")
) -> tuple[Any, Any, float]:
    """Train, export and read back; returns parameters, codes and the codes' test accuracy."""
    train, test = digits.load()
    model = CNN(nnx.Rngs(seed))
    print(ab.describe(nnx.state(model, nnx.Param), RULES))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    # In float first; the ramp ends before training does, for the biases to settle.
    alpha = ab.cubic_ramp(start=float_steps, stop=float_steps + steps * 4 // 5)

    @nnx.jit
    def train_step(
        model: CNN, optimizer: nnx.Optimizer[CNN], images: jax.Array, labels: jax.Array
    ) -> None:
        def loss_fn(model: CNN) -> jax.Array:
            logits = ab_nnx.blended(model, RULES, alpha(optimizer.step[...]))(images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        optimizer.update(model, nnx.grad(loss_fn)(model))

    for images, labels in digits.batches(train, float_steps + steps, seed):
        train_step(model, optimizer, images, labels)

    # The codes are made once, and what is exported is what is read on test images.
    codes = ab_nnx.quantize(model, RULES)
    statistics = nnx.state(model, nnx.BatchStat)
    variables = {"params": to_dictionaries(codes), "batch_stats": to_dictionaries(statistics)}
    out.mkdir(parents=True, exist_ok=True)
    write_packed(out / "nnx.safetensors", variables, rules=RULES)
    variables = read_packed(out / "nnx.safetensors").variables
    params = from_dictionaries(variables["params"], like=codes)
    nnx.update(model, from_dictionaries(variables["batch_stats"], like=statistics))
    model.eval()
    deployed = jax.jit(lambda images: ab_nnx.with_params(model, params)(images))
    accuracy = float((deployed(test[0]).argmax(-1) == test[1]).mean())
    program = jax.export.export(deployed)(jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32))
    (out / "nnx.stablehlo").write_bytes(program.serialize())
    print(f"Test accuracy of the codes: {100 * accuracy:.1f} %. Written to {out}/nnx.*")
    return nnx.state(model, nnx.Param), codes, accuracy


if __name__ == "__main__":
    tyro.cli(run, description=__doc__, use_underscores=True)
