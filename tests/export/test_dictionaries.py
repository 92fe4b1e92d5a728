"""Trees of several frameworks as nested dictionaries and back."""

from collections import OrderedDict
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import ab_jax as ab
from ab_jax.export.dictionaries import from_dictionaries, to_dictionaries
from ab_jax.export.packed import read_packed, write_packed


class Layer(NamedTuple):
    kernel: jax.Array
    bias: jax.Array | None


class Projections(eqx.Module):
    query: jax.Array
    key: jax.Array
    value: jax.Array


@pytest.fixture
def tree(rng) -> dict:
    """Lists, a named tuple, None, and slashes within a key, as Haiku has them."""

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    layers = [Layer(normal(3, 4), normal(4)), Layer(normal(4, 2), None)]
    return {"layers": layers, "net/~/linear": {"w": normal(2, 2)}}


RULES = ab.Rules([(".*(kernel|w)", ab.Ternary()), (".*", None)])


def test_parts_of_paths_are_keys(tree):
    nested = to_dictionaries(tree)
    assert nested["layers"]["0"]["kernel"] is tree["layers"][0].kernel
    assert nested["net"]["~"]["linear"]["w"] is tree["net/~/linear"]["w"]
    assert set(nested["layers"]["1"]) == {"kernel"}  # None leaves no trace


def test_codes_come_back_from_a_file_bit_for_bit(tree, tmp_path):
    codes = ab.quantize(tree, RULES)
    write_packed(tmp_path / "net", {"params": to_dictionaries(codes)})
    variables = read_packed(tmp_path / "net").variables
    found = from_dictionaries(variables["params"], like=codes)
    assert jax.tree.structure(found) == jax.tree.structure(codes)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(codes), strict=True):
        assert (one.dtype, one.tobytes()) == (other.dtype, other.tobytes())
    # The shapes of the weights do as well, as a reader has them who has not trained.
    shapes = jax.eval_shape(lambda: tree)
    again = from_dictionaries(variables["params"], like=shapes)
    assert isinstance(again["layers"][0].kernel, ab.Quantized)


@pytest.mark.parametrize("make", ["equinox", "nnx"])
def test_modules(make, key):
    if make == "equinox":
        model = eqx.filter(eqx.nn.MLP(3, 2, 4, 1, key=key), eqx.is_array)
        path = ("layers", "1", "weight")
    else:
        model = nnx.state(nnx.List([nnx.Linear(3, 4, rngs=nnx.Rngs(0)) for _ in range(2)]))
        path = ("1", "kernel")
    leaf = to_dictionaries(model)
    for part in path:
        leaf = leaf[part]
    assert isinstance(leaf, jax.Array)
    back = from_dictionaries(to_dictionaries(model), like=model)
    assert jax.tree.structure(back) == jax.tree.structure(model)
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(one, other)


class Attention(nnx.Module):
    def __init__(self, rng):
        for name in ("query", "key", "value"):
            setattr(self, name, nnx.Param(jnp.asarray(rng.normal(size=(4, 4)), jnp.float32)))


@pytest.mark.parametrize("framework", ["dictionaries", "equinox", "haiku", "nnx"])
def test_parameters_called_value_come_back_from_a_file(framework, rng, tmp_path):
    state = nnx.state(Attention(rng))
    trees = {
        "dictionaries": {"attn": nnx.to_pure_dict(state)},
        "equinox": Projections(**nnx.to_pure_dict(state)),
        "haiku": {"attn/~/value": {"value": jnp.ones((4, 4)), "w": jnp.ones((4, 4))}},
        "nnx": state,
    }
    codes = ab.quantize(trees[framework], ab.Rules([(".*", ab.Ternary())]))
    write_packed(tmp_path / "net", {"params": to_dictionaries(codes)})
    variables = read_packed(tmp_path / "net").variables
    found = from_dictionaries(variables["params"], like=codes)
    assert jax.tree.structure(found) == jax.tree.structure(codes)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(codes), strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


SHARDED = [
    ab.LeastSquaresBinary(bits=2),
    ab.Uniform(bits=4, symmetric=False, scale="absmax", group_size=2),
    ab.Uniform(bits=4, scale="absmax", group_size=4),  # two groups, for four devices
    ab.Ternary(axis=None),
]


@pytest.mark.parametrize("quantizer", SHARDED, ids=repr)
def test_what_is_read_lies_where_the_tree_does(quantizer, rng, devices, tmp_path):
    mesh = jax.sharding.Mesh(np.reshape(devices, (4, 2)), ("data", "model"))

    def put(shape, *spec):
        where = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.device_put(jnp.asarray(rng.normal(size=shape), jnp.float32), where)

    params = {
        "kernel": put((8, 6), "data", "model"),
        "rows": put((8, 6), ("data", "model")),
        "bias": put((6,), "model"),
        "mean": jnp.ones(6),
    }
    codes = ab.quantize(params, ab.Rules([("kernel|rows", quantizer), (".*", None)]))
    write_packed(tmp_path / "net", to_dictionaries(codes))
    read = read_packed(tmp_path / "net").variables
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(read)} == {1}

    for like in (codes, jax.tree.map(abstract, codes)):
        for one, other in zip(
            jax.tree.leaves(from_dictionaries(read, like=like)), jax.tree.leaves(codes), strict=True
        ):
            assert one.sharding.is_equivalent_to(other.sharding, one.ndim)
            np.testing.assert_array_equal(one, other, strict=True)

    of_weights = from_dictionaries(read, like=params)
    for name in ("kernel", "rows"):
        found, wanted = of_weights[name], codes[name]
        assert found.codes.sharding == params[name].sharding
        np.testing.assert_array_equal(found.dequantize(), wanted.dequantize())
        (rows,) = {shard.data.shape[0] for shard in found.scale.addressable_shards}
        (columns,) = {shard.data.shape[1] for shard in found.scale.addressable_shards}
        count, channels = wanted.scale.shape[:2]
        parts, others = (4, 2) if name == "kernel" else (8, 1)
        assert rows == (count // parts if count % parts == 0 else count)
        assert columns == (channels // others if channels % others == 0 else channels)
    # And the values alone, where the tree has weights or codes.
    values = from_dictionaries(ab.dequantize(read), like=codes)
    assert values["kernel"].sharding == params["kernel"].sharding
    assert values["bias"].sharding == params["bias"].sharding
    assert len(values["mean"].sharding.device_set) == 1


def abstract(x):
    """An array's shape, dtype and sharding."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def test_paths_that_clash_are_refused():
    ones = np.ones(2)
    with pytest.raises(ValueError, match="'a/b' is that of two leaves"):
        to_dictionaries({"a": {"b": ones}, "a/b": ones})
    with pytest.raises(ValueError, match="a/b lies within another leaf"):
        to_dictionaries({"a": ones, "a/b": ones})
    with pytest.raises(ValueError, match="'x' is that of two leaves"):
        to_dictionaries(OrderedDict([("x/y", ones), ("x", ones)]))
    twice, once = {"a/b": ones, "a": {"b": ones}}, {"a": {"b": ones}}
    for dictionaries, like in ((twice, once), (once, twice)):
        with pytest.raises(ValueError, match="'a/b' is that of two leaves"):
            from_dictionaries(dictionaries, like=like)
    with pytest.raises(ValueError, match="or of none"):
        to_dictionaries(ones)


def test_dictionaries_of_another_tree_are_refused(tree):
    nested = to_dictionaries(tree)
    with pytest.raises(ValueError, match="have no layers/1/bias"):
        from_dictionaries(nested, like={**tree, "layers": [tree["layers"][0]] * 2})
    with pytest.raises(ValueError, match="have net/~/linear/w, which the tree has not"):
        from_dictionaries(nested, like={"layers": tree["layers"]})
    wrong = {**tree, "net/~/linear": {"w": np.ones((3, 2))}}
    with pytest.raises(ValueError, match=r"linear/w has the shape \(2, 2\) in the dictionaries"):
        from_dictionaries(nested, like=wrong)
