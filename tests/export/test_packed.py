"""Packed files: what is written is read bit for bit, by the safetensors library too, or refused."""

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from flax import nnx
from safetensors.numpy import load_file

import ab_jax as ab
from ab_jax.export.dictionaries import to_dictionaries
from ab_jax.export.packed import read_packed, write_packed
from ab_jax.export.packed.bits import Packing
from ab_jax.export.packed.container import PackedError
from ab_jax.linen import RANGES
from ab_jax.models.binarynet import BinaryNet
from ab_jax.models.mobilenet import MobileNet
from ab_jax.models.resnet import resnet50
from ab_jax.quantizers import Quantized
from tests.export.forging import forged, forged_text, opened

QUANTIZERS: list[ab.Quantizer] = [
    ab.Binary(),
    ab.Ternary(group_size=3),
    ab.Ternary(scale="absmean", axis=None),
    ab.Ternary(group_size=6, group_axis=(0, 1)),
    ab.Uniform(bits=4, scale="absmax", axis=(0, -1)),
    ab.Uniform(bits=3, scale="absmax", symmetric=False, axis=None),
    ab.LeastSquaresBinary(bits=3, group_size=3),
]
WIDTHS = [(1, False), *((bits, affine) for bits in range(2, 9) for affine in (False, True))]


def assert_same_bits(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_what_quantizers_make_comes_back_bit_for_bit(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    params = {
        f"layer{i}": {
            "kernel": jnp.asarray(rng.normal(size=(3, 6, 5)), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=5), jnp.bfloat16),
        }
        for i in range(len(QUANTIZERS))
    }
    rules = ab.Rules([(f"layer{i}/kernel", q) for i, q in enumerate(QUANTIZERS)] + [(".*", None)])
    variables = {
        "params": ab.quantize(params, rules),
        "batch_stats": {"norm": {"mean": jnp.asarray(rng.normal(size=7), jnp.float32)}},
        RANGES: {"stem": {"kernel": jnp.float32(rng.uniform(1, 2))}},
        "counters": {"steps": jnp.int32(rng.integers(1000)), "flags": jnp.arange(3, dtype="uint8")},
    }
    described = {"config": {"width": 0.5, "names": ["é", None, True]}}
    size = write_packed(tmp_path / "net", variables, rules=rules, network=described)
    assert size == (tmp_path / "net").stat().st_size
    found = read_packed(tmp_path / "net")
    assert_same_bits(found.variables, variables)
    # The values are those of alpha = 1.
    assert_same_bits(ab.dequantize(found.variables)["params"], ab.blend(params, rules, 1.0))
    assert found.network == described
    assert found.rules == tuple((p, q if q is None else repr(q)) for p, q in rules.rules)
    assert "Uniform(bits=4, axis=(0, -1), group_size=None," in str(found.rules)


@pytest.mark.parametrize("shape", [(3, 6, 5), (4, 6, 7)], ids=str)
def test_describe_counts_the_bytes_of_the_file(
    tmp_path: Path, rng: np.random.Generator, shape: tuple[int, ...]
) -> None:
    """Each parameter's, for every quantizer, width and dtype: from the offsets in the header."""
    quantizers = [
        *QUANTIZERS[:3],
        *(ab.Uniform(bits=bits, scale="absmax") for bits in range(2, 9)),
        *(ab.Uniform(bits=bits, scale="absmax", symmetric=False) for bits in (2, 3, 8)),
        ab.Uniform(bits=2, scale="absmax", group_size=6 * shape[0], group_axis=(0, 1)),
        *(ab.LeastSquaresBinary(bits=bits) for bits in (1, 2)),
    ]
    params = {f"w{i}": rng.normal(size=shape).astype(np.float32) for i in range(len(quantizers))}
    params |= {"half": params["w1"].astype(jnp.bfloat16), "bias": params["w0"][0, 0]}
    rules = ab.Rules(
        [(f"w{i}", q) for i, q in enumerate(quantizers)]
        + [("half", ab.Ternary(scale="absmean")), ("bias", None)]
    )
    write_packed(tmp_path / "net", ab.quantize(params, rules))
    header, _, body = opened((tmp_path / "net").read_bytes())
    written: dict[str, int] = dict.fromkeys(params, 0)
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        written[name.partition("/")[0]] += end - begin
    described = ab.describe(params, rules)
    assert {row.path: row.bytes_after for row in described.rows} == written
    assert described.bytes_after == len(body)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_codes_of_every_width_come_back_bit_for_bit(
    tmp_path: Path, rng: np.random.Generator, dtype: str
) -> None:
    leaves = {}
    for bits, affine in WIDTHS:
        lowest, highest = Packing(bits, affine).levels
        codes, zero_point = rng.integers(lowest, highest + 1, (2, 4, 6)).astype(np.int8)
        leaves[f"bits{bits}{affine}"] = Quantized(
            codes=jnp.asarray(np.where(codes, codes, 1) if bits == 1 else codes),
            scale=jnp.asarray(rng.uniform(0, 1, (2, 6)), jnp.float32),
            zero_point=jnp.asarray(zero_point[:2]) if affine else None,
            bits=bits,
            dtype=dtype,
        )
    write_packed(tmp_path / "net", {"params": leaves})
    assert_same_bits(read_packed(tmp_path / "net").variables, {"params": leaves})


def test_codes_of_signs_are_those_of_their_width(tmp_path: Path, rng: np.random.Generator) -> None:
    for bits in (2, 5, 7):
        codes = 2 * rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, 7)) + 1
        leaf = ab.BinaryCoded(
            codes=jnp.asarray(codes, jnp.int8),
            scale=jnp.asarray(rng.uniform(0, 1, (3, 1, bits)), jnp.float32),
            zero_point=None,
            bits=bits,
            dtype="bfloat16",
        )
        write_packed(tmp_path / "net", {"params": {"w": leaf}})
        assert_same_bits(read_packed(tmp_path / "net").variables, {"params": {"w": leaf}})
        stored = load_file(tmp_path / "net")
        # As files always had it: the bits in front.
        np.testing.assert_array_equal(
            stored["params/w/scale"], np.moveaxis(leaf.scale, -1, 0), strict=True
        )
        assert stored["params/w/codes"].size == -(-21 * bits // 8)
        stream = int.from_bytes(stored["params/w/codes"].tobytes(), "little")
        digits = [(stream >> bits * i) % 2**bits for i in range(21)]
        np.testing.assert_array_equal(2 * np.reshape(digits, (3, 7)) - 2**bits + 1, codes)
        wrong = dataclasses.replace(leaf, codes=leaf.codes.at[1, 2].set(0))
        with pytest.raises(ValueError, match=r"params/w cannot be packed: .* not all odd"):
            write_packed(tmp_path / "net", {"params": {"w": wrong}})
        wrong = dataclasses.replace(leaf, scale=leaf.scale[..., 1:])
        with pytest.raises(ValueError, match=r"has not one for each of its bits"):
            write_packed(tmp_path / "net", {"params": {"w": wrong}})


def test_float64_weights_need_the_mode_of_jax(tmp_path: Path, rng: np.random.Generator) -> None:
    with jax.enable_x64(True):
        params = {"kernel": jnp.asarray(rng.normal(size=(4, 4)))}
        variables = {
            "params": ab.quantize(params, ab.Rules([(".*", ab.Uniform(bits=5, scale="absmax"))]))
        }
        write_packed(tmp_path / "net", variables)
        found = read_packed(tmp_path / "net").variables
        assert found["params"]["kernel"].scale.dtype == jnp.float64
        assert_same_bits(found, variables)
    with pytest.raises(PackedError, match=r"its scale is float64.* Set jax_enable_x64"):
        read_packed(tmp_path / "net")


def test_any_safetensors_reader_can_decode_it(tmp_path: Path, rng: np.random.Generator) -> None:
    """With NumPy and the description of the format alone."""
    params = {"a": jnp.asarray(rng.normal(size=(5, 7)), jnp.float32), "b": jnp.arange(3.0)}
    rules = ab.Rules([("a", ab.Uniform(bits=3, symmetric=False, scale="absmax")), ("b", None)])
    write_packed(tmp_path / "net", {"params": ab.quantize(params, rules)})
    arrays = load_file(tmp_path / "net")
    assert sorted(arrays) == [f"params/{x}" for x in ("a/codes", "a/scale", "a/zero_point", "b")]
    with safetensors.safe_open(tmp_path / "net", "np") as file:
        about = json.loads(file.metadata()["ab_jax"])
    assert (about["format"], about["version"]) == ("ab_jax.packed", 1)
    leaf = {"kind": "uniform", "bits": 3, "shape": [5, 7], "dtype": "float32"}
    assert about["quantized"] == {"params/a": leaf}
    stream = int.from_bytes(arrays["params/a/codes"].tobytes(), "little")
    codes = np.array([(stream >> 3 * i) % 8 - 4 for i in range(35)], np.float32).reshape(5, 7)
    zero_point, scale = (arrays[f"params/a/{part}"] for part in ("zero_point", "scale"))
    values = (codes - zero_point.astype(np.float32)) * scale
    np.testing.assert_array_equal(values, ab.blend(params, rules, 1.0)["a"])
    np.testing.assert_array_equal(arrays["params/b"], params["b"])


@pytest.mark.parametrize(
    ("model", "size", "bits", "cost"),
    [
        (BinaryNet(), 32, 1, 1),
        (BinaryNet(), 32, 2, 1.6),
        pytest.param(MobileNet(), 32, 4, 4, marks=pytest.mark.long),
        pytest.param(resnet50(), 32, 3, 3, marks=pytest.mark.long),
    ],
    ids=["binarynet-1", "binarynet-ternary", "mobilenet-4", "resnet50-3"],
)
def test_quantized_leaves_take_what_their_bits_come_to(
    tmp_path: Path, rng: np.random.Generator, model: Any, size: int, bits: int, cost: float
) -> None:
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    kernels = {
        f"kernel{i}": Quantized(
            # Not fitted, which would take longer than to write them.
            codes=(2 * rng.integers(0, 2, leaf.shape, np.int8) - 1).astype(np.int8),  # type: ignore
            scale=np.ones((1,) * (leaf.ndim - 1) + leaf.shape[-1:], np.float32),  # type: ignore
            zero_point=None,
            bits=bits,
            dtype="float32",
        )
        for i, leaf in enumerate(jax.tree.leaves(shapes["params"]))
        if leaf.ndim > 1
    }
    written = write_packed(tmp_path / "net", kernels)
    arrays = load_file(tmp_path / "net")
    codes = sum(array.nbytes for name, array in arrays.items() if name.endswith("/codes"))
    scales = sum(4 * leaf.scale.size for leaf in kernels.values())
    ideal = sum(leaf.codes.size for leaf in kernels.values()) * cost / 8
    assert ideal <= codes <= 1.0001 * ideal
    assert sum(array.nbytes for array in arrays.values()) <= 1.02 * (ideal + scales)
    assert written <= 1.03 * (ideal + scales)


# What is written


def test_the_same_network_gives_the_same_bytes_and_replaces_a_file_whole(
    tmp_path: Path, variables: dict[str, Any]
) -> None:
    files = [tmp_path / "one", tmp_path / "two"]
    files[1].write_bytes(b"old")
    for file, tree in zip(files, (variables, dict(reversed(variables.items()))), strict=True):
        write_packed(file, tree, network={"a": 1, "b": 2})
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == files
    with pytest.raises(OSError, match="cannot be written"):
        write_packed(tmp_path / "one" / "below", variables)


def test_what_flax_puts_around_parameters_is_taken_off_as_said(tmp_path: Path) -> None:
    initial = nn.with_logical_partitioning(nn.initializers.normal(), ("in", "out"))
    params = nn.Dense(3, kernel_init=initial).init(jax.random.key(0), jnp.ones((1, 4)))["params"]
    quantized = ab.quantize(params, ab.Rules([("kernel", ab.Ternary()), ("bias", None)]))
    write_packed(tmp_path / "unboxed", {"params": nn.unbox(quantized)})
    write_packed(tmp_path / "nested", to_dictionaries({"params": quantized}))
    assert (tmp_path / "unboxed").read_bytes() == (tmp_path / "nested").read_bytes()
    found = read_packed(tmp_path / "unboxed").variables
    assert_same_bits(found, {"params": nn.unbox(quantized)})


def replaced(variables: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"params": {"a": dataclasses.replace(variables["params"]["a"], **fields)}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: {"params": {"a/b": jnp.ones(2)}}, r"The key 'a/b' in params/ cannot be part"),
        (lambda v: {"params": {0: jnp.ones(2)}}, "The key 0 in params/"),
        (
            lambda v: {"params": [jnp.ones(2)]},
            "params is a list, not an array.*by to_dictionaries of ab_jax.export.dictionaries",
        ),
        (lambda v: {"apply": len}, "apply is a builtin_function_or_method, not .* Leave it out"),
        (
            lambda v: {"params": {"a": nn.LogicallyPartitioned(v["params"]["a"], ("in", "out"))}},
            r"params/a is a LogicallyPartitioned.* Unbox .* flax\.linen\.unbox\(variables\)",
        ),
        (
            lambda v: {"params": nnx.State({"a": nnx.Param(v["params"]["a"])})},
            "params/a is a Param.* by to_dictionaries of ab_jax.export.dictionaries",
        ),
        (lambda v: {"params": {"a": jnp.ones((2, 0))}}, r"params/a is float32 of shape \(2, 0\)"),
        (lambda v: {"a": np.ones(2, bool)}, "a is bool"),
        (
            lambda v: {"rngs": {"key": jax.random.key(0)}},
            r"rngs/key cannot be packed: .*PRNGKey.*Use jax.random.key_data",
        ),
        (
            lambda v: replaced(v, dtype="float16", scale=jnp.full((1, 3), 1e30)),
            "params/a cannot be packed: its scale is too large for values in float16",
        ),
        (lambda v: replaced(v, codes=v["params"]["a"].codes * 8), "params/a cannot be packed: uni"),
        (lambda v: replaced(v, bits=9), "params/a cannot be packed: codes have 1 to 8 bits"),
        (lambda v: replaced(v, scale=jnp.full((1, 3), jnp.nan)), "negative or not finite"),
        (lambda v: replaced(v, scale=jnp.ones((1, 2))), "does not divide"),
        (lambda v: replaced(v, dtype="int8"), "its dtype is 'int8'"),
    ],
)
def test_what_cannot_be_written_is_named(
    tmp_path: Path, variables: dict[str, Any], change: Callable[..., Any], message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        write_packed(tmp_path / "net", change(variables))
    assert not list(tmp_path.iterdir())


def test_traced_arrays_are_named(tmp_path: Path, variables: dict[str, Any]) -> None:
    for tree in ({"stats": {"mean": jnp.ones(3)}}, {"mean": variables["params"]["a"]}):
        with pytest.raises(ValueError, match=r"mean cannot be packed: .*traced") as error:
            jax.jit(lambda tree: write_packed(tmp_path / "net", tree))(tree)
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_no_weight_that_is_not_finite_is_written(tmp_path: Path, number: float) -> None:
    """Whatever its scale: fitted, fixed or trained."""
    w = np.ones((4, 3), np.float32)
    w[1, 2] = number
    params, trained = {"net": {"w": w}}, {"net/w": jnp.ones((1, 3))}
    absmax = functools.partial(ab.Uniform, bits=4, scale="absmax")
    quantizers = [ab.Binary(), ab.Binary(fixed_scale=1.0), absmax(), absmax(symmetric=False)]
    for quantizer in quantizers:
        rules = ab.Rules([("net/w", quantizer)])
        made = [ab.quantize(params, rules)]
        if quantizer in (ab.Binary(), absmax()):
            made.append(ab.quantize(params, rules, scales=trained))
        for codes in made:
            assert np.isfinite(codes["net"]["w"].scale[..., :2]).all()  # of the other channels
            with pytest.raises(ValueError, match=r"net/w cannot be packed: .* not finite"):
                write_packed(tmp_path / "net", codes)


def test_a_description_must_be_json(tmp_path: Path, variables: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_packed(tmp_path / "net", variables, network={"rate": float("nan")})
    with pytest.raises(ValueError, match="make a header of"):
        write_packed(tmp_path / "net", variables, network={"text": "a" * 2**22})


# What is refused


@pytest.fixture
def variables(rng: np.random.Generator) -> dict[str, Any]:
    params = {name: jnp.asarray(rng.normal(size=(5, 3)), jnp.float32) for name in "abcd"}
    absmax = functools.partial(ab.Uniform, scale="absmax")
    quantizers = [absmax(bits=3), absmax(bits=2), absmax(bits=4, symmetric=False), None]
    rules = ab.Rules([*zip("abcd", quantizers, strict=True)])
    return {"params": ab.quantize(params, rules)}


@pytest.fixture
def refused(tmp_path: Path, variables: dict[str, Any]) -> Callable[..., None]:
    """Forges a file as told, and checks that reading it names the file and the culprit."""
    path = tmp_path / "net"
    write_packed(path, variables, network={"name": "x"})

    def check(forge: Callable[..., Any], message: str) -> None:
        header, about, body = opened(path.read_bytes())
        made = forge(header, about, body)
        bad = path.with_name("bad")
        bad.write_bytes(made if isinstance(made, bytes) else forged(header, about, made or body))
        with pytest.raises(PackedError, match=message) as error:
            read_packed(bad)
        assert str(error.value).startswith(f"{bad} cannot be read as a packed network: ")
        assert len(str(error.value).splitlines()) == 1

    check.whole = path.read_bytes()  # type: ignore[attr-defined]
    return check


def test_the_forger_forges_well(tmp_path: Path, variables: dict[str, Any]) -> None:
    """Or else every refusal below might be that of a wrong digest."""
    write_packed(tmp_path / "net", variables)
    (tmp_path / "same").write_bytes(forged(*opened((tmp_path / "net").read_bytes())))
    assert_same_bits(read_packed(tmp_path / "same").variables, variables)


def change(**fields: Any) -> Callable[..., None]:
    """Changes fields of the text."""
    return lambda header, about, body: about.update(fields)


def change_leaf(name: str, **fields: Any) -> Callable[..., None]:
    return lambda header, about, body: about["quantized"][f"params/{name}"].update(fields)


def change_array(name: str, **fields: Any) -> Callable[..., None]:
    return lambda header, about, body: header[f"params/{name}"].update(fields)


def change_bytes(name: str, value: bytes) -> Callable[..., bytes]:
    """Overwrites the first bytes of an array."""

    def forge(header: Any, about: Any, body: bytes) -> bytes:
        begin = header[f"params/{name}"]["data_offsets"][0]
        return body[:begin] + value + body[begin + len(value) :]

    return lambda header, about, body: forged(header, about, forge(header, about, body))


def renamed(old: str, new: str) -> Callable[..., None]:
    return lambda header, about, body: header.update({new: header.pop(old)})


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (change(format="other"), "its format is 'other', not 'ab_jax.packed'"),
        (change(version=2), "of version 2; this code reads version 1"),
        (change(version=True), "of version True"),
        (change(more=1), "its description has the keys"),
        (change(network=[]), "'network' is no JSON object"),
        (change(quantized=[]), "'quantized' is no JSON object"),
        (change(rules=[["a", 1]]), "'rules' are no pairs"),
        (change(sha256=7), "it has no sha256"),
        (change_leaf("a", bits=4), r"'params/a': 15 uniform codes of 4 bits take 8 bytes"),
        (change_leaf("a", bits=9), "'params/a': codes have 1 to 8 bits, not 9"),
        (change_leaf("a", bits=3.0), "'params/a': its bits are 3.0"),
        (change_leaf("b", kind="uniform"), "'params/b': .* 2 bits without zero points are ternary"),
        (change_leaf("a", dtype="int8"), "'params/a': its dtype is 'int8'"),
        (change_leaf("a", dtype=["float32"]), "'params/a': its dtype is"),
        (change_leaf("a", dtype="float64"), "'params/a': its scale is float32, not float64"),
        (change_leaf("a", shape=[3, 5]), r"'params/a': a scale of shape \(1, 3\) does not divide"),
        (change_leaf("a", shape=[15]), r"'params/a': a scale of shape \(1, 3\) does not"),
        (change_leaf("a", shape=[2**31, 3]), "'params/a': its shape is"),
        (change_leaf("a", shape=[2**30, 3]), "'params/a': 3221225472 uniform codes .* take"),
        (change_leaf("a", shape=[-5, 3]), "'params/a': its shape is"),
        (change_leaf("a", shape=[0, 3]), "'params/a': its shape is"),
        (change_leaf("a", more=1), "'params/a': it is not described by kind, bits, shape"),
        (renamed("params/a/codes", "params/a/kodes"), "'params/a': there is no array of its codes"),
        (renamed("params/a/scale", "params/x"), "'params/a': there is no array of its scale"),
        (renamed("params/d", "params/a"), "'params/a' is both a quantized leaf and an array"),
        (renamed("params/d", "params/a/d"), "'params/a/d' lies within another leaf"),
        (renamed("params/d", "params"), "lies within another leaf"),
        (renamed("params/d", "params//d"), "'params//d' is no path"),
        (renamed("params/d", "a/" * 70 + "d"), "is no path of a leaf"),
        (renamed("params/d", "params/\ud800"), "its header is no JSON"),
        (change_bytes("a/codes", b"\0"), "'params/a': uniform codes of 3 bits are -3 to 3, not -4"),
        (change_bytes("b/codes", b"\xff"), "'params/b': a byte of ternary codes is 255, above 242"),
        (change_bytes("a/scale", b"\0\0\x80\xff"), "'params/a': its scale holds"),
        (change_bytes("c/zero_point", b"\x08"), "'params/c': a zero point lies outside -8 to 7"),
        (change_array("d", dtype="F64"), "'params/d' is F64 of shape .*, but lies at"),
        (change_array("d", dtype="C64"), "'params/d' is of dtype 'C64'"),
        (change_array("d", dtype="I32", shape=[3, 5, 2]), "'params/d' is I32 of shape"),
        (change_array("a/scale", dtype="I32"), "'params/a': its scale is int32, not float32"),
        (change_array("d", shape=[2**40, 2**40]), "'params/d' is of shape"),
        (change_array("d", shape=[2**20] * 3 + [0], data_offsets=[0, 0]), "'params/d' is of shape"),
        (change_array("d", shape=[1] * 33), "'params/d' is of shape"),
        (change_array("d", data_offsets=[1, 61]), "begins at byte"),
        (change_array("d", data_offsets=[0.0, 60.0]), "the place of 'params/d'"),
        (change_array("d", more=1), "the header's entry for 'params/d' is none of an array"),
        (lambda h, a, b: forged(h, a, b + b"x"), "its arrays have .* bytes, and the file has"),
        (lambda h, a, b: forged(h, a, b[:-1]), "its arrays have .* bytes, and the file has"),
        (lambda h, a, b: forged(h, "[]", b), "its text 'ab_jax' is no JSON object"),
        (lambda h, a, b: forged(h, '{"sha256": 1e999}', b), "its text 'ab_jax' is no JSON"),
        (lambda h, a, b: forged(h, '{"sha256": NaN}', b), "its text 'ab_jax' has NaN"),
        (lambda h, a, b: forged(h, '{"a": 1, "a": 2}', b), "its text 'ab_jax' has 'a' twice"),
        (lambda h, a, b: forged(h, "[" * 100_000, b), "its text 'ab_jax' is no JSON"),
        (lambda h, a, b: forged_text('{"a":' * 100_000, a, b), "its header is no JSON"),
        (lambda h, a, b: forged_text(" {}", a, b), "its header does not begin with {"),
        (lambda h, a, b: forged_text("{}", a, b), "its metadata are not one text, 'ab_jax'"),
        (lambda h, a, b: forged_text("{" + " " * 2**22 + "}", a, b), "4194306 bytes, more"),
        (lambda h, a, b: b"", "the length of its header is wrong"),
        (lambda h, a, b: (2**63).to_bytes(8, "little") + b"{}", "the length of its header is"),
    ],
)
def test_a_malformed_file_is_refused_by_name(
    refused: Callable[..., None], forge: Callable[..., Any], message: str
) -> None:
    refused(forge, message)


def test_arrays_that_stand_twice_are_refused(refused: Callable[..., None]) -> None:
    """The safetensors library takes the last of them."""

    def forge(header: dict[str, Any], about: dict[str, Any], body: bytes) -> bytes:
        text = json.dumps({"__metadata__": {"ab_jax": json.dumps(about)}, **header})
        twice = f'{text[:-1]}, "params/d": {json.dumps(header["params/d"])}}}'
        data = forged_text(twice, about, body)
        assert len(safetensors.deserialize(data)) == len(header)
        return data

    refused(forge, "its header has 'params/d' twice")


# 60,000 names of the shape that a header has, and nothing else in them.
MANY = ", ".join(f'"{i}": 0' for i in range(60_000))


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (lambda h, a, b: forged_text(f'{{{MANY}, "59999": 1}}', None, b), "has '59999' twice"),
        (lambda h, a, b: forged_text(f'{{{MANY}, "0": 1}}', None, b), "has '0' twice"),
        (lambda h, a, b: forged(h, f'{{"rules": {{{MANY}, "7": 1}}}}', b), "has '7' twice"),
        (lambda h, a, b: forged_text(f"{{{MANY}}}", None, b), "its metadata are not one text"),
        (lambda h, a, b: forged(h, f"{{{MANY}}}", b), "it has no sha256"),
        (lambda h, a, b: forged({**h, **json.loads(f"{{{MANY}}}")}, a, b), "is none of an array"),
        (lambda h, a, b: a.update(quantized=json.loads(f"{{{MANY}}}")), "leaf '0': it is not"),
        (lambda h, a, b: forged(h, '{"a":' * 500_000, b), "its text 'ab_jax' is no JSON"),
        (lambda h, a, b: forged(h, f'{{"a": [{"[]," * 600_000}[]]}}', b), "it has no sha256"),
        (lambda h, a, b: h["params/d"].update(shape=[1] * 600_000), "'params/d' is of shape"),
    ],
)
def test_a_forged_header_of_any_size_is_refused_at_once(
    refused: Callable[..., None], forge: Callable[..., Any], message: str
) -> None:
    """In the processor's time: a tenth of this where it grows with the header's size alone."""
    start = time.process_time()
    refused(forge, message)
    assert time.process_time() - start < 5


# NUL, a control of the terminal's, two directions of writing, the end of a line, no width at all.
UNSEEN = ("\0", "\x1b[2J", "\u202e", "\u2066", "\u2028", "\u200b")


@pytest.mark.parametrize("unseen", UNSEEN, ids=ascii)
def test_keys_that_cannot_be_seen_are_refused_and_not_written(
    tmp_path: Path, variables: dict[str, Any], refused: Callable[..., None], unseen: str
) -> None:
    name = f"d{unseen}x"
    refused(renamed("params/d", f"params/{name}"), "its header has 'params/d.*cannot be seen")
    refused(change(network={"a": [{name: 1}]}), "its text 'ab_jax' has 'd.*cannot be seen")
    with pytest.raises(ValueError, match=r"'params/d.* cannot be seen.*Rename it"):
        write_packed(tmp_path / "out", {"params": {name: jnp.ones(2)}})
    with pytest.raises(ValueError, match=r"description .*'d.* cannot be seen"):
        write_packed(tmp_path / "out", variables, network={"a": [{name: 1}]})
    assert not (tmp_path / "out").exists()
    # What can be seen is a name in any language, and a text may hold what it likes.
    seen = {"params": {"größe_重み": jnp.ones(2)}}
    write_packed(tmp_path / "out", seen, network={"größe": unseen})
    found = read_packed(tmp_path / "out")
    assert_same_bits(found.variables, seen)
    assert found.network == {"größe": unseen}


def test_a_single_flipped_bit_anywhere_is_found(
    tmp_path: Path, refused: Any, rng: np.random.Generator
) -> None:
    data = refused.whole
    for position in rng.choice(8 * len(data), 300, replace=False):
        changed = bytearray(data)
        changed[position // 8] ^= 1 << position % 8
        (tmp_path / "bad").write_bytes(changed)
        with pytest.raises(PackedError):
            read_packed(tmp_path / "bad")
    changed = bytearray(data)
    changed[-1] ^= 1
    (tmp_path / "bad").write_bytes(changed)
    with pytest.raises(PackedError, match="it is not as it was written: its sha256 differs"):
        read_packed(tmp_path / "bad")


def test_a_missing_file_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_packed(tmp_path / "nothing")
