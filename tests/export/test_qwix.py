"""Our codes as Qwix's arrays: the same integers, scales and values, in memory and on disk."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import qwix

import ab_jax as ab
from ab_jax.activations import ActivationQuantizer
from ab_jax.export.qwix import InputCodes, input_codes, read_qwix, to_qwix, write_qwix
from ab_jax.linen import RANGES, ActivationRules

QUANTIZERS: list[ab.Quantizer] = [
    ab.Binary(),
    ab.Ternary(group_size=3),
    ab.Uniform(bits=8, scale="absmax", axis=None),
    ab.Uniform(bits=4, scale="absmax", axis=(0, -1)),
    ab.Uniform(bits=3, scale="absmax", symmetric=False),
    ab.Uniform(bits=4, scale="absmax", symmetric=False, group_size=2),
]
INPUTS = {
    "layer0": InputCodes(bits=8, signed=True, limit=0.1 + 0.2),
    "block/layer1": InputCodes(bits=4, signed=False, limit=6.0),
}

# Another process, which has Orbax and Qwix but none of our code.
ELSEWHERE = """
import json, sys
import jax, numpy as np, orbax.checkpoint as ocp, qwix
checkpointer = ocp.StandardCheckpointer()
about = checkpointer.metadata(sys.argv[1]).custom_metadata
tree = checkpointer.restore(sys.argv[1])
arrays = {name: qwix.QArray(**layer["kernel"]) for name, layer in tree["params"].items()}
np.savez(sys.argv[2], **{name: qwix.dequantize(array) for name, array in arrays.items()})
json.dump(about, open(sys.argv[3], "w"))
assert "ab_jax" not in sys.modules
"""


@pytest.fixture
def quantized(rng: np.random.Generator) -> dict[str, Any]:
    """A layer of each quantizer."""
    params = {
        f"layer{i}": {"kernel": jnp.asarray(rng.normal(size=(4, 6, 5)), jnp.float32)}
        for i in range(len(QUANTIZERS))
    }
    rules = ab.Rules([(f"layer{i}/kernel", q) for i, q in enumerate(QUANTIZERS)])
    return ab.quantize(params, rules)


def assert_same_bits(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


@pytest.mark.parametrize("int4", [False, True])
def test_codes_scales_and_values_are_ours(quantized: dict[str, Any], int4: bool) -> None:
    bias = jnp.arange(5.0)
    found = to_qwix({"params": quantized, "bias": bias}, int4=int4)
    assert found["bias"] is bias
    for name, quantizer in zip(quantized, QUANTIZERS, strict=True):
        ours, array = quantized[name]["kernel"], found["params"][name]["kernel"]
        assert isinstance(array, qwix.QArray)
        assert array.qtype == array.qvalue.dtype == ("int4" if int4 and ours.bits <= 4 else "int8")
        np.testing.assert_array_equal(np.asarray(array.qvalue, np.int8), ours.codes)
        assert_same_bits(array.scale, ours.scale)
        assert (array.zero_point is None) == getattr(quantizer, "symmetric", True)
        if array.zero_point is not None:
            np.testing.assert_array_equal(np.asarray(array.zero_point, np.int8), ours.zero_point)
        assert_same_bits(qwix.dequantize(array), ours.dequantize())


def test_a_tree_without_codes_is_refused(quantized: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"no quantized leaf.*ab_jax\.quantize"):
        to_qwix(ab.dequantize(quantized))


def test_a_leaf_with_a_scale_for_each_bit_is_refused_by_name(rng: np.random.Generator) -> None:
    leaf = ab.LeastSquaresBinary(bits=2).quantize(rng.normal(size=(4, 3)))
    with pytest.raises(ValueError, match=r"^a/kernel has a scale for each of its 2 bits"):
        to_qwix({"a": {"kernel": leaf}})


def test_another_process_gets_the_same_values_by_orbax_and_qwix(
    quantized: dict[str, Any], tmp_path: Path
) -> None:
    network = {"config": {"width": 0.5, "names": ["é", None, True]}}
    size = write_qwix(
        tmp_path / "net", {"params": to_qwix(quantized)}, inputs=INPUTS, network=network
    )
    files = [file for file in (tmp_path / "net").rglob("*") if file.is_file()]
    assert size == sum(len(file.read_bytes()) for file in files)
    paths = [str(tmp_path / name) for name in ("net", "values.npz", "about.json")]
    subprocess.run([sys.executable, "-c", ELSEWHERE, *paths], check=True, cwd=tmp_path)
    values = np.load(tmp_path / "values.npz")
    assert sorted(values) == sorted(quantized)
    for name, layer in quantized.items():
        assert_same_bits(values[name], layer["kernel"].dequantize())
    about = json.loads((tmp_path / "about.json").read_text())
    assert (about["format"], about["version"], about["network"]) == ("ab_jax.qwix", 1, network)
    first = {"bits": 8, "signed": True, "limit": 0.1 + 0.2}
    second = {"bits": 4, "signed": False, "limit": 6.0}
    assert about["inputs"] == {"layer0": first, "block/layer1": second}


@pytest.mark.parametrize("int4", [False, True])
def test_what_is_written_is_read(quantized: dict[str, Any], tmp_path: Path, int4: bool) -> None:
    path = tmp_path / "below" / "net"
    write_qwix(path, {"other": {"x": jnp.arange(3)}})
    assert read_qwix(path).inputs == read_qwix(path).network == {}
    tree = {
        "params": {**to_qwix(quantized, int4=int4), "norm": {"scale": jnp.ones(3)}},
        RANGES: {"layer0": {"kernel": jnp.float32(0.7)}},
    }
    write_qwix(path, tree, inputs=INPUTS, network={"classes": 3})
    found = read_qwix(path)
    assert_same_bits(found.variables, tree)
    assert (found.inputs, found.network) == (INPUTS, {"classes": 3})


def test_boxes_of_flax_are_not_written(tmp_path: Path) -> None:
    """They would come back as one more level of dictionaries."""
    tree = {"params": {"kernel": nn.LogicallyPartitioned(jnp.ones((2, 3)), ("in", "out"))}}
    with pytest.raises(ValueError, match=r"params/kernel is a Logically.*flax\.linen\.unbox"):
        write_qwix(tmp_path / "network", tree)
    assert not (tmp_path / "network").exists()


def test_only_a_checkpoint_is_replaced(quantized: dict[str, Any], tmp_path: Path) -> None:
    tree = {"params": to_qwix(quantized)}
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a").write_text("dear")
    for there in ("letters", "letters/a"):
        with pytest.raises(ValueError, match=f"{there} is there already and is no checkpoint"):
            write_qwix(tmp_path / there, tree)
    with pytest.raises(OSError, match="letters/a/net cannot be written"):
        write_qwix(tmp_path / "letters" / "a" / "net", tree)
    assert (tmp_path / "letters" / "a").read_text() == "dear"


def test_what_is_no_network_of_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"There is no checkpoint in {tmp_path}/net"):
        read_qwix(tmp_path / "net")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "net", {"x": jnp.arange(3)})
    with pytest.raises(ValueError, match=r"net is no network .*: its format is None"):
        read_qwix(tmp_path / "net")


def test_inputs_have_the_ranges_of_the_variables() -> None:
    rules = ActivationRules(
        [
            ("stem", ActivationQuantizer(bits=8, signed=True)),
            ("block/fixed", ActivationQuantizer(bits=4, limit=6.0, signed=False)),
            (".*/float", None),
            (".*", ActivationQuantizer(bits=3, signed=False)),
        ]
    )
    ranges = {
        # By address; then as until version 0.2, beside the layers or within them.
        "stem": {"kernel": jnp.float32(1.5)},
        "block": {"conv_input": jnp.float32(2.5), "never_input": jnp.float32(0)},
        "head": {"input": jnp.float32(0.25)},
    }
    layers = ["stem", "block/fixed", "block/float", "block/conv", "block/never", "head"]
    assert input_codes({RANGES: ranges}, rules, layers) == {
        "stem": InputCodes(bits=8, signed=True, limit=1.5),
        "block/fixed": InputCodes(bits=4, signed=False, limit=6.0),
        "block/conv": InputCodes(bits=3, signed=False, limit=2.5),
        "head": InputCodes(bits=3, signed=False, limit=0.25),
    }
    with pytest.raises(ValueError, match=r"no range for the input of block/lost\. Call the model"):
        input_codes({RANGES: ranges}, rules, ["block/lost"])


def test_a_stack_of_layers_has_a_range_a_layer(tmp_path: Path, quantized: dict[str, Any]) -> None:
    rules = ActivationRules([(".*", ActivationQuantizer(bits=8, signed=False))])
    ranges = {"stack": {"kernel": jnp.asarray([1.5, 0.25, 2.0])}, "never": {"kernel": jnp.zeros(3)}}
    inputs = input_codes({RANGES: ranges}, rules, ["stack", "never"])
    assert inputs == {"stack": InputCodes(bits=8, signed=False, limit=(1.5, 0.25, 2.0))}
    write_qwix(tmp_path / "net", {"params": to_qwix(quantized)}, inputs=inputs)
    assert read_qwix(tmp_path / "net").inputs == inputs


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (np.nan, "range of the input of a/b is nan. Measure it again"),
        (np.inf, "range of the input of a/b is inf. Measure it again"),
        ([1.0, np.inf], r"range of the input of a/b is \[ 1\. inf\]"),
        ([1.0, 0.0], r"Of the layers of a/b some have a range and some have none: \[1.0, 0.0\]"),
        (np.ones((2, 3)), r"input of a/b has ranges of shape \(2, 3\).*StableHLO"),
    ],
)
def test_ranges_that_cannot_be_exported_are_named(found: Any, message: str) -> None:
    rules = ActivationRules([(".*", ActivationQuantizer(bits=8, signed=False))])
    with pytest.raises(ValueError, match=message):
        input_codes({RANGES: {"a": {"b": {"kernel": jnp.asarray(found)}}}}, rules, ["a/b"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"limit": 0.0}, "limit must be positive"),
        ({"limit": (1.0, 0.0)}, "limit must be positive"),
        ({"limit": ()}, "limit must be positive"),
        ({"bits": 9}, "bits must be 2 to 8"),
    ],
)
def test_codes_that_there_are_not_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InputCodes(**{"bits": 8, "signed": True, "limit": 1.0, **change})


def test_arrays_far_larger_than_their_files_are_not_read(tmp_path: Path) -> None:
    """Zeros, which take next to nothing on disk."""
    write_qwix(tmp_path / "net", {"params": {"a": jnp.zeros(2**28, jnp.int8)}})
    with pytest.raises(ValueError, match=r"net claims arrays of 268435456 bytes, and its files"):
        read_qwix(tmp_path / "net")


def test_a_checkpoint_that_does_not_tell_its_arrays_is_refused(
    tmp_path: Path, quantized: dict[str, Any]
) -> None:
    path = tmp_path / "net"
    write_qwix(path, {"params": to_qwix(quantized)}, inputs=INPUTS)
    mark = path / "_CHECKPOINT_METADATA"
    whole = json.loads(mark.read_text())
    for part in ("inputs", "network"):
        about = json.loads(json.dumps(whole))
        about["custom_metadata"][part] = 5
        mark.write_text(json.dumps(about))
        with pytest.raises(ValueError, match="net is a damaged checkpoint"):
            read_qwix(path)
    mark.write_text(json.dumps(whole))
    (path / "_METADATA").write_text("{")
    with pytest.raises(ValueError, match="net is a damaged checkpoint"):
        read_qwix(path)
