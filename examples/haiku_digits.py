"""Haiku: a transformed function and its dictionary of parameters, left as they are.

    python -m examples.haiku_digits          (about ten seconds)

A kernel is called `w`, and a path is the module's name, which holds slashes of its own, and the
parameter's: `cnn/~/stem/w`, where `~` stands for modules made in a constructor. Channels are last,
as the quantizers expect. Haiku is in maintenance mode, and its authors recommend Flax for what is
new; a model of old need not be moved to be quantized.
"""

from pathlib import Path
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import optax
import tyro

import ab_jax as ab
from ab_jax.export.dictionaries import from_dictionaries, to_dictionaries
from ab_jax.export.packed import read_packed, write_packed
from examples import handwritten_digits as digits


class CNN(hk.Module):
    def __init__(self) -> None:
        super().__init__(name="cnn")
        self.stem = hk.Conv2D(16, 3, name="stem")
        self.conv = hk.Conv2D(32, 3, stride=2, name="conv")
        self.head = hk.Linear(10, name="head")

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(self.conv(jax.nn.relu(self.stem(x))))
        return self.head(x.reshape(len(x), -1))


RULES = ab.Rules(
    [
        (r".*/(stem|head)/w", ab.Uniform(bits=8)),
        (r".*/w", ab.Ternary()),
        (r".*", None),
    ]
)


def run(
    float_steps: int = 200, steps: int = 300, seed: int = 0, out: Path = Path("runs/guides")
) -> tuple[Any, Any, float]:
    """Train, export and read back; returns parameters, codes and the codes' test accuracy."""
    train, test = digits.load()
    model: Any = hk.without_apply_rng(hk.transform(lambda images: CNN()(images)))
    params = model.init(jax.random.key(seed), jnp.zeros((1, 8, 8, 1)))
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
            logits = model.apply(ab.blend(params, RULES, alpha(step)), images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, state = optimizer.update(jax.grad(loss_fn)(params), state)
        return optax.apply_updates(params, updates), state

    for step, (images, labels) in enumerate(digits.batches(train, float_steps + steps, seed)):
        params, state = train_step(params, state, step, images, labels)

    # The codes are made once, and what is exported is what is read on test images.
    codes = ab.quantize(params, RULES)
    out.mkdir(parents=True, exist_ok=True)
    # Keys of a packed file hold no slash; `to_dictionaries` nests the parts of a module's name.
    write_packed(out / "haiku.safetensors", {"params": to_dictionaries(codes)}, rules=RULES)
    variables = read_packed(out / "haiku.safetensors").variables
    network = from_dictionaries(variables["params"], like=codes)
    deployed = jax.jit(lambda images: model.apply(ab.dequantize(network), images))
    accuracy = float((deployed(test[0]).argmax(-1) == test[1]).mean())
    program = jax.export.export(deployed)(jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32))
    (out / "haiku.stablehlo").write_bytes(program.serialize())
    print(f"Test accuracy of the codes: {100 * accuracy:.1f} %. Written to {out}/haiku.*")
    return params, codes, accuracy


if __name__ == "__main__":
    tyro.cli(run, description=__doc__, use_underscores=True)
