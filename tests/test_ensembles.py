"""Codes of several networks in one tree: made by `jax.vmap`, read by it, by a scan, or whole.

What is expected is computed member by member.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ab_jax as ab
from ab_jax.export.packed import read_packed, write_packed
from ab_jax.fitting import codes_at, fit

SHAPE = (6, 4)
QUANTIZERS: list[tuple[ab.Quantizer, int]] = [
    (ab.Binary(), 2),
    (ab.Ternary(group_size=3), 2),
    (ab.Uniform(bits=2, axis=None, scale="absmax"), 2),
    (ab.Uniform(bits=3, symmetric=False, group_size=2, scale="absmax"), 2),
    # As many members as there are bits, and another number.
    (ab.LeastSquaresBinary(bits=2), 2),
    (ab.LeastSquaresBinary(bits=2), 3),
    (ab.LeastSquaresBinary(bits=2, group_size=3), 2),
]
each_quantizer = pytest.mark.parametrize(
    ("quantizer", "members"), QUANTIZERS, ids=[f"{q}, {count}" for q, count in QUANTIZERS]
)


def normal(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def assert_same(found, wanted) -> None:
    """To the last bits: other programs may round a scale otherwise."""
    np.testing.assert_allclose(found, jnp.stack(wanted), rtol=1e-5, atol=1e-6)


@each_quantizer
def test_codes_of_an_ensemble_are_those_of_its_members(quantizer, members, rng):
    w = normal(rng, members, *SHAPE)
    params = {"kernel": w, "bias": jnp.ones((members, 4))}
    rules = ab.Rules([("kernel", quantizer), ("bias", None)])
    stacked = jax.vmap(lambda params: ab.quantize(params, rules))(params)
    assert_same(
        ab.dequantize(stacked)["kernel"], [quantizer.quantize(one).dequantize() for one in w]
    )


@each_quantizer
def test_stacked_codes_are_read_whole_and_one_by_one(quantizer, members, rng):
    w = normal(rng, members, *SHAPE)
    alone = [quantizer.quantize(one) for one in w]
    codes = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    values = [one.dequantize() for one in alone]
    assert_same(codes.dequantize(), values)
    assert_same(jax.vmap(lambda one: one.dequantize())(codes), values)
    assert_same(jax.lax.scan(lambda carry, one: (carry, one.dequantize()), 0, codes)[1], values)

    levels = [one.levels() for one in alone]
    assert_same(jnp.moveaxis(codes.levels(), 1, 0), levels)
    assert_same(jax.vmap(lambda one: one.levels())(codes), levels)
    # Beside weights that are on no level, of which rounding might take either side.
    other = normal(rng, members, *SHAPE)
    for side in (0, 1):
        beside = [one.beside(x)[side] for one, x in zip(alone, other, strict=True)]
        assert_same(codes.beside(other)[side], beside)
    units = [jnp.broadcast_to(one.unit(), SHAPE) for one in alone]
    assert_same(jnp.broadcast_to(codes.unit(), w.shape), units)


@each_quantizer
def test_a_stack_with_scales_of_its_layers_is_scanned(quantizer, members, rng):
    """Quantized as a whole, with the layers' axis among the quantizer's."""
    w = normal(rng, members, *SHAPE)
    axis = 0 if quantizer.axis is None else (0, quantizer.axis)
    stack = dataclasses.replace(quantizer, axis=axis).quantize(w)
    values = [quantizer.quantize(x).dequantize() for x in w]
    assert_same(stack.dequantize(), values)
    assert_same(jax.lax.scan(lambda carry, one: (carry, one.dequantize()), 0, stack)[1], values)


@each_quantizer
def test_what_was_fitted_of_an_ensemble_serves_its_members(quantizer, members, rng):
    w, later = normal(rng, 2, members, *SHAPE)
    fits = jax.vmap(lambda w: fit(w, quantizer))(w)
    alone = [codes_at(x, fit(y, quantizer), quantizer) for x, y in zip(later, w, strict=True)]
    found = jax.lax.scan(
        lambda carry, one: (carry, codes_at(*one, quantizer).dequantize()), 0, (later, fits)
    )[1]
    assert_same(found, [one.dequantize() for one in alone])
    # And the other way round: fitted as a stack, used one by one.
    axis = 0 if quantizer.axis is None else (0, quantizer.axis)
    whole = dataclasses.replace(quantizer, axis=axis)
    assert_same(codes_at(later, fits, whole).dequantize(), [one.dequantize() for one in alone])


def test_fits_of_an_ensemble_are_carried_and_blended_member_by_member(rng):
    w, later = ({"kernel": one} for one in normal(rng, 2, 3, *SHAPE))
    rules = ab.Rules([("kernel", ab.Uniform(bits=3, symmetric=False, scale="absmax"))])

    def blended(params, fits):
        return ab.blend(params, rules, 1.0, fits=fits)["kernel"]

    fits = jax.vmap(lambda params: ab.fit(params, rules))(w)
    members = [jax.tree.map(lambda x, i=i: x[i], (later, fits)) for i in range(3)]
    alone = [blended(*member) for member in members]
    assert_same(jax.vmap(blended)(later, fits), alone)
    assert_same(jax.lax.scan(lambda carry, one: (carry, blended(*one)), 0, (later, fits))[1], alone)
    with pytest.raises(ValueError, match=r"shape \(6, 4\), not \(3, 6, 4\)"):
        blended(later, fits)
    with pytest.raises(ValueError, match=r"other shapes or dtypes.*jax\.vmap"):
        blended(members[0][0], fits)


def test_an_ensemble_is_packed(tmp_path, rng):
    codes = jax.vmap(ab.LeastSquaresBinary(bits=2).quantize)(normal(rng, 2, *SHAPE))
    write_packed(tmp_path / "net.safetensors", {"kernel": codes})
    again = read_packed(tmp_path / "net.safetensors").variables["kernel"]
    np.testing.assert_array_equal(again.scale, codes.scale, strict=True)
    np.testing.assert_array_equal(again.dequantize(), codes.dequantize(), strict=True)


@pytest.mark.parametrize(
    "read",
    [
        lambda codes: codes.dequantize(),
        lambda codes: codes.levels(),
        lambda codes: codes.beside(jnp.zeros(codes.codes.shape)),
        lambda codes: codes.unit(),
    ],
    ids=["dequantize", "levels", "beside", "unit"],
)
def test_scales_without_the_bits_behind_are_refused(read, rng):
    quantizer = ab.LeastSquaresBinary(bits=2)
    behind = jax.vmap(quantizer.quantize, out_axes=-1)(normal(rng, 3, *SHAPE))
    with pytest.raises(ValueError, match=r"\(1, 4, 2, 3\).*not that of the bits.*out_axes=0"):
        read(behind)
    codes = quantizer.quantize(normal(rng, *SHAPE))
    with pytest.raises(ValueError, match=r"\(1, 4\).*not that of the bits"):
        read(dataclasses.replace(codes, scale=codes.scale[..., 0]))
    in_front = dataclasses.replace(codes, scale=jnp.moveaxis(codes.scale, -1, 0))
    with pytest.raises(ValueError, match=r"\(2, 1, 4\).*before 0\.2"):
        read(in_front)


def test_a_quantizer_of_ones_own_with_the_bits_in_front_is_told(rng):
    class InFront(ab.LeastSquaresBinary):
        def code_blocks(self, w, fitted):
            codes, scale, zero_point = super().code_blocks(w, fitted)
            return codes, jnp.moveaxis(scale, -1, 0), zero_point

    with pytest.raises(ValueError, match=r"shape \(2, 1, 4\).*is the last: \(1, 4, 2\)"):
        InFront(bits=2).quantize(normal(rng, *SHAPE))
