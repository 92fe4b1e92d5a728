"""What docs/training_details.md shows is run after the README's model, and does what it says."""

import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ab_jax as ab

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/training_details.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def shown():
    """The names of the page, after README's first block: its model, rules and loss, untrained."""
    names = {}
    for block in [blocks(README)[0], *blocks(PAGE)]:
        exec(block, names)
    return names


@pytest.fixture
def batch(shown, rng):
    chosen = rng.integers(0, 1_500, 64)
    return jax.tree.map(lambda x: x[chosen], shown["train"])


def test_every_heading_has_a_block_that_is_run(shown):
    assert len(blocks(PAGE)) == len(re.findall(r"^## ", PAGE, re.MULTILINE)) == 5
    assert {"accumulate", "decayed", "train_both", "loss_in_bfloat16", "filtered_loss"} <= {*shown}


def test_micro_batches_of_an_update_see_one_alpha(shown, batch):
    """Eight micro-batches are two steps of plain Adam on whole batches, at steps 900 and 901."""
    params, state = shown["params"], shown["accumulated"].init(shown["params"])
    state = state._replace(gradient_step=jnp.asarray(900))
    optimizer = optax.adam(1e-2)
    wanted, own = params, optimizer.init(params)
    for step in (900, 901):
        for part in range(4):
            micro = jax.tree.map(lambda x, part=part: x[part * 16 : part * 16 + 16], batch)
            params, state = shown["accumulate"](params, state, micro)
        updates, own = optimizer.update(
            jax.grad(shown["loss_fn"])(wanted, batch, jnp.asarray(step)), own
        )
        wanted = optax.apply_updates(wanted, updates)
    assert int(state.gradient_step) == 902
    # Adam divides by a gradient's size: of one that is nearly 0, among 5,508, rounding may decide.
    off = jax.tree.map(lambda a, b: np.sum(np.abs(a - b) > 2e-5), params, wanted)
    assert sum(jax.tree.leaves(off)) <= 2
    moved = np.abs(np.asarray(params["stem"]["kernel"] - shown["params"]["stem"]["kernel"]))
    assert moved.max() > 1e-2


@pytest.mark.parametrize("step", [0, 1_800])
def test_the_decay_that_is_shown_ends_with_the_ramp(shown, batch, step):
    params = shown["params"]
    state = shown["adamw"].init(params)._replace(count=jnp.asarray(step))
    found, _ = shown["decayed"](params, state, batch)
    plain = optax.adamw(1e-3, weight_decay=0.1)
    gradients = jax.jit(jax.grad(shown["loss_fn"]))(params, batch, jnp.asarray(step))
    updates, _ = jax.jit(plain.update)(gradients, plain.init(params), params)
    wanted = optax.apply_updates(params, updates)
    for name in ("stem", "hidden", "head"):
        kernel, own = (np.asarray(p[name]["kernel"]) for p in (found, wanted))
        if step == 0:
            np.testing.assert_allclose(kernel, own, atol=1e-6)
        else:
            np.testing.assert_array_equal(kernel, params[name]["kernel"])
            assert (own != kernel).any()
        np.testing.assert_allclose(found[name]["bias"], wanted[name]["bias"], atol=1e-6)


def test_scales_and_weights_are_both_trained(shown):
    layer, rules, scales = shown["layer"], shown["lsq_rules"], shown["scales"]
    fresh = nnx.Linear(16, 4, rngs=nnx.Rngs(0))
    first = ab.initial_scales(nnx.state(fresh, nnx.Param), rules)
    np.testing.assert_allclose(scales["kernel"], first["kernel"], atol=1.01e-3)
    assert (np.asarray(scales["kernel"]) != np.asarray(first["kernel"])).all()
    assert (np.asarray(layer.kernel[...]) != np.asarray(fresh.kernel[...])).any()
    assert int(shown["weights"].step[...]) == 1
    found = shown["codes"]["kernel"].get_value()
    np.testing.assert_array_equal(found.scale, scales["kernel"])
    steps = np.asarray(layer.kernel[...]) / np.asarray(scales["kernel"])
    # One that lies half way between two codes may be either.
    assert (np.asarray(found.codes) != np.clip(np.round(steps), -7, 7)).sum() <= 1


def test_products_are_in_bfloat16_and_gradients_in_float32(shown, batch):
    params, loss = shown["params"], shown["loss_in_bfloat16"]
    gradients = jax.grad(loss)(params, batch, 900)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {np.dtype("float32")}
    text = str(jax.make_jaxpr(loss)(params, batch, 900))
    products = re.findall(r"(\w+)\[[\d,]*\] = dot_general", text)
    assert products
    assert set(products) == {"bf16"}
    values = ab.dequantize(ab.quantize(params, shown["rules"]))
    cast = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (values, batch["image"]))
    logits = shown["model"].apply({"params": cast[0]}, cast[1]).astype(jnp.float32)
    wanted = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    np.testing.assert_allclose(loss(params, batch, 1_800), wanted, rtol=1e-6)
    # An update of 0.1 % is kept by float32 and lost by bfloat16.
    w, update = jnp.float32(1.0), jnp.float32(1e-3)
    assert w + update > w
    assert (w.astype("bfloat16") + update.astype("bfloat16")) == w.astype("bfloat16")


def test_an_int_compiles_anew_under_filter_jit_and_an_array_does_not(shown, batch):
    traced = []

    def counted(params, batch, step):
        traced.append(step)
        return shown["loss_fn"](params, batch, step)

    for jit, steps, traces in (
        (eqx.filter_jit, range(3), 3),
        (eqx.filter_jit, map(jnp.asarray, range(3)), 1),
        (jax.jit, range(3), 1),
    ):
        traced.clear()
        function = jit(counted)
        for step in steps:
            function(shown["params"], batch, step)
        assert len(traced) == traces
