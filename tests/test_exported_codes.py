"""Functions that take codes as arguments, exported by `jax.export` and run by another process."""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ab_jax as ab

ROOT = Path(__file__).parents[1]
RULES = ab.Rules(
    [
        ("binary", ab.Binary()),
        ("ternary", ab.Ternary(group_size=3)),
        ("affine", ab.Uniform(bits=3, symmetric=False, scale="absmax")),
        ("bits", ab.LeastSquaresBinary(bits=2)),
        ("rest", None),
    ]
)

# Another process, which has the file, the codes and the library, but not the function.
ELSEWHERE = """
import pickle
import sys
import jax
import ab_jax
program, arguments, results = sys.argv[1:]
exported = jax.export.deserialize(bytearray(open(program, "rb").read()))
with open(arguments, "rb") as file:
    found = exported.call(*pickle.load(file))
with open(results, "wb") as file:
    pickle.dump(found, file)
"""


@pytest.fixture
def params(rng: np.random.Generator) -> dict[str, jax.Array]:
    return {name: jnp.asarray(rng.normal(size=(6, 4)), jnp.float32) for name, _ in RULES.rules}


def called_elsewhere(function: Any, arguments: tuple[Any, ...], tmp_path: Path) -> Any:
    """What an exported function returns in a fresh process."""
    paths = [str(tmp_path / name) for name in ("program", "arguments", "results")]
    exported = jax.export.export(jax.jit(function))(*arguments)
    Path(paths[0]).write_bytes(exported.serialize())
    Path(paths[1]).write_bytes(pickle.dumps(arguments))
    subprocess.run([sys.executable, "-c", ELSEWHERE, *paths], check=True, cwd=ROOT)
    return pickle.loads(Path(paths[2]).read_bytes())


def assert_same_bits(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


def test_codes_are_arguments_and_results_of_exported_programs(params, rng, tmp_path):
    codes = ab.quantize(params, RULES)
    x = jnp.asarray(rng.normal(size=(2, 6)), jnp.float32)

    def function(codes, x):
        values = ab.dequantize(codes)
        levels = {name: codes[name].levels() for name in codes if name != "rest"}
        return {name: x @ w for name, w in values.items()}, values, levels, codes

    found = called_elsewhere(function, (codes, x), tmp_path)
    assert_same_bits(found, jax.jit(function)(codes, x))
    # The values are in the codes that were handed over, not in the program.
    np.testing.assert_array_equal(found[1]["affine"], codes["affine"].dequantize())
    other = ab.quantize(jax.tree.map(lambda w: w + 1, params), RULES)
    exported = jax.export.export(jax.jit(function))(codes, x)
    again = jax.export.deserialize(exported.serialize())
    assert_same_bits(again.call(other, x), jax.jit(function)(other, x))
    with pytest.raises(ValueError, match="metadata"):  # of another width
        again.call({**codes, "affine": ab.Ternary().quantize(params["affine"])}, x)


def test_fits_are_arguments_and_results_too(params, tmp_path):
    def function(params, fits):
        return ab.blend(params, RULES, 0.5, fits=fits), ab.fit(params, RULES)

    arguments = params, ab.fit(params, RULES)
    found = called_elsewhere(function, arguments, tmp_path)
    assert_same_bits(found, jax.jit(function)(*arguments))


class Halves(ab.Binary):
    """A quantizer of one's own, with nothing of its own."""


def test_fits_of_other_quantizers_are_refused_by_exported_programs(rng):
    w = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)

    def program(quantizer):
        rules = ab.Rules([("w", quantizer)])
        fits = ab.fit({"w": w}, rules)
        function = jax.jit(lambda w, fits: ab.blend({"w": w}, rules, 1.0, fits=fits)["w"])
        return jax.export.export(function)(w, fits).serialize(), function, fits

    text, function, fits = program(Halves(axis=(0, 1), fixed_scale=0.5))
    again = jax.export.deserialize(text)
    np.testing.assert_array_equal(again.call(w, fits), function(w, fits))
    with pytest.raises(ValueError, match="metadata"):
        again.call(w, ab.fit({"w": w}, ab.Rules([("w", ab.Binary(axis=(0, 1)))])))
    unknown = bytes(text).replace(b"Halves", b"Thirds")
    with pytest.raises(ValueError, match=r"fits of .*Thirds, a quantizer that is not loaded"):
        jax.export.deserialize(bytearray(unknown))


def test_codes_of_an_ensemble_are_arguments_too(rng, tmp_path):
    w = jnp.asarray(rng.normal(size=(2, 6, 4)), jnp.float32)
    codes = jax.vmap(ab.LeastSquaresBinary(bits=2).quantize)(w)
    found = called_elsewhere(jax.vmap(lambda codes: codes.dequantize()), (codes,), tmp_path)
    np.testing.assert_array_equal(found, codes.dequantize(), strict=True)
