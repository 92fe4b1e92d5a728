"""Exporting finished runs: what is loaded again computes the logits that the run was read by."""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
import qwix
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

import ab_jax as ab
from ab_jax.activations import ActivationQuantizer, relu6
from ab_jax.data import load
from ab_jax.data.load import facts
from ab_jax.export.packed import read_packed, write_packed
from ab_jax.export.qwix import InputCodes, read_qwix, serve, to_qwix
from ab_jax.linen import RANGES, WithQuantizedInputs, module_of, plain_convolutions
from ab_jax.models.binarynet import BinaryNet
from ab_jax.models.mobilenet import MobileNet
from ab_jax.training.checkpoint import Checkpoints
from ab_jax.training.records import RunDirectory
from ab_jax.training.state import TrainState
from experiments import export, mobilenet_v1_imagenet, resnet20_cifar10
from experiments.exported.finished_networks import load_packed, read_run, rebuilt
from experiments.settings.config import Config, recorded
from experiments.settings.levels import activation_rules, weight_rules
from experiments.settings.networks import NETWORKS
from tests.fast_compilation import FAST_COMPILATION

ROOT = Path(__file__).parents[2]


STEP = 4


class Run(NamedTuple):
    path: Path
    config: Any
    variables: dict[str, Any]


def same_bits(a: Any, b: Any) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


@functools.partial(jax.jit, static_argnums=0)
def apply(model: Any, variables: Any, images: Any) -> jax.Array:
    """Logits; of equal models by one and the same program."""
    return model.apply(variables, images, train=False)


def finished(path: Path, experiment: str, config: Any, variables: dict[str, Any], data: Any) -> Run:
    """The directory of a run that ended with this network, without the training."""
    state = {name: tree for name, tree in variables.items() if name != "params"}
    with RunDirectory(path, experiment=experiment, config=recorded(config), data=data) as run:
        with Checkpoints(path / "checkpoints") as checkpoints:
            step, key = jnp.int32(STEP), jnp.zeros(2, jnp.uint32)
            checkpoints.save(TrainState(step, variables["params"], state, {}, key))
        run.complete({"steps": STEP})
    return Run(path, config, variables)


def random_variables(model: Any, image_shape: tuple[int, ...], seed: int) -> dict[str, Any]:
    """Of both signs where there are two, positive elsewhere: variances and ranges are."""
    rng = np.random.default_rng(seed)
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    positive = jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.5, 2, x.shape), x.dtype), shapes)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)
    return {**positive, "params": params["params"]}


@pytest.fixture(scope="module")
def binarynet_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """BinaryNet for digits, with ternary weights in all but name."""
    config = Config(dataset="digits", width=1 / 32, weights="int2", weight_scale="absmax")
    seed = request.config.getoption("seed")
    variables = random_variables(BinaryNet(num_classes=10, width=1 / 32), (8, 8, 1), seed)
    data = facts(load("digits"))
    path = tmp_path_factory.mktemp("runs") / "digits"
    return finished(path, "experiments.binarynet_cifar10", config, variables, data)


def test_a_binarynet_comes_back_bit_for_bit(
    binarynet_run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rng: np.random.Generator,
) -> None:
    out = tmp_path / "net.safetensors"
    written = export.run(export.Config(run=binarynet_run.path, out=out))
    model, variables = load_packed(out)

    # By hand: the weights, quantized.
    rules = ab.Rules([(r"(.*/)?kernel", ab.Uniform(bits=2, scale="absmax")), (r".*", None)])
    params = ab.dequantize(ab.quantize(binarynet_run.variables["params"], rules))
    expected = {**binarynet_run.variables, "params": params}
    assert all(jax.tree.leaves(jax.tree.map(same_bits, variables, expected)))
    by_hand = BinaryNet(num_classes=10, width=1 / 32, dtype="float32")
    assert model == by_hand
    images = load("digits").test.images[:50].astype(np.float32) / 128 - 1
    logits = apply(model, variables, images)
    assert same_bits(logits, apply(by_hand, expected, images))
    # Not in every logit: a column of the head may have no code but zero.
    assert np.ptp(logits, axis=0).max() > 0, "the images count"

    # What is said of it.
    record = json.loads((binarynet_run.path / "record.json").read_text())
    network = read_packed(out).network
    assert network["experiment"] == "experiments.binarynet_cifar10"
    assert network["config"] == record["config"]
    assert (network["classes"], network["image_shape"]) == (10, [8, 8, 1])
    assert network["data"] == record["data"]
    assert network["data"]["class_names"] == list("0123456789")
    assert len(network["data"]["mean"]) == len(network["data"]["std"]) == 1
    assert network["step"] == record["summary"]["steps"] == STEP
    floats = 4 * sum(x.size for x in jax.tree.leaves(variables))
    assert written == out.stat().st_size
    line = f"{written:,} bytes, {written / floats:.4f} times the {floats:,} bytes of the network"
    assert capsys.readouterr().out == f"{out}: {line} in float32\n"


@pytest.fixture(scope="module")
def mobilenet_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    config = dataclasses.replace(
        mobilenet_v1_imagenet.DEFAULTS,
        width=1 / 16,
        weights="int4",
        act_bits=4,
        weight_scale="absmax",
        weight_granularity="tensor",
    )
    rules = activation_rules(config)
    assert rules is not None
    plain = MobileNet(num_classes=5, width=1 / 16, stem=32)
    model = WithQuantizedInputs(plain, rules)
    data = {"name": "colours", "image_shape": [8, 8, 3], "mean": [0.5, 0.4, 0.3], "classes": 5}
    path = tmp_path_factory.mktemp("runs") / "mobilenet"
    variables = random_variables(model, (8, 8, 3), request.config.getoption("seed"))
    return finished(path, "experiments.mobilenet_v1_imagenet", config, variables, data)


@pytest.mark.long
def test_a_mobilenet_comes_back_with_its_ranges(
    mobilenet_run: Run, tmp_path: Path, rng: np.random.Generator
) -> None:
    path, config, variables = mobilenet_run
    export.run(export.Config(run=path, out=tmp_path / "net"))
    model, found = load_packed(tmp_path / "net")
    values = ab.blend(variables["params"], weight_rules(config), 1.0)
    expected = {**variables, "params": values}
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert all(jax.tree.leaves(jax.tree.map(same_bits, found, expected)))
    assert len(jax.tree.leaves(found[RANGES])) == 28

    images = rng.normal(size=(4, 8, 8, 3)).astype(np.float32)
    activations = activation_rules(config)
    assert activations is not None
    plain = MobileNet(num_classes=5, width=1 / 16, stem=32, activation=relu6, dtype="float32")
    by_hand = WithQuantizedInputs(plain, activations)
    assert model == by_hand
    logits = apply(model, found, images)
    assert same_bits(logits, apply(by_hand, expected, images))
    # The ranges count.
    wider = {**found, RANGES: jax.tree.map(lambda x: 2 * x, found[RANGES])}
    assert not np.array_equal(logits, apply(model, wider, images))

    described = read_packed(tmp_path / "net").network
    assert [pattern for pattern, _ in described["activation_rules"]] == ["stem", "head", ".*"]
    assert "bits=4" in described["activation_rules"][2][1]


@pytest.mark.long
def test_a_file_of_older_code_is_read_with_its_ranges(
    mobilenet_run: Run, tmp_path: Path, rng: np.random.Generator
) -> None:
    """They had the names of layers, and no fixed ranges among them."""
    network = read_run(mobilenet_run.path)
    ranges = dict(network.variables[RANGES])
    old = {f"{name}_input": ranges.pop(name)["kernel"] for name in ("stem", "head")}
    for block, layers in ranges.items():
        old[block] = {f"{layer}_input": found["kernel"] for layer, found in layers.items()}
    packed = dataclasses.replace(network, variables={**network.variables, RANGES: old})
    export.packed(packed, tmp_path / "old")
    export.packed(network, tmp_path / "new")
    (model, one), (_, other) = (load_packed(tmp_path / name) for name in ("old", "new"))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    images = rng.normal(size=(2, 8, 8, 3)).astype(np.float32)
    assert np.all(np.isfinite(apply(model, one, images)))


@pytest.mark.parametrize(
    "name", ["binarynet_run", pytest.param("mobilenet_run", marks=pytest.mark.long)]
)
def test_a_program_gives_the_logits_of_the_packed_network(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, rng: np.random.Generator
) -> None:
    path = request.getfixturevalue(name).path
    for kind in ("packed", "stablehlo"):
        export.run(export.Config(run=path, out=tmp_path / kind, format=kind))
    program = jax.export.deserialize(bytearray((tmp_path / "stablehlo").read_bytes()))
    images = rng.normal(size=(3, *read_run(path).image_shape)).astype(np.float32)
    logits = np.asarray(program.call(images))
    expected = np.asarray(apply(*load_packed(tmp_path / "packed"), images))
    # Another order of sums, and so, seldom, an activation in its next step.
    apart = np.abs(logits - expected) / np.ptp(expected)
    assert np.median(apart) < 1e-4
    assert np.max(apart) < 0.2


def test_qwix_gets_codes_and_ranges(mobilenet_run: Run, tmp_path: Path) -> None:
    path, _, variables = mobilenet_run
    network = read_run(path)
    export.FORMATS["qwix"](network, tmp_path / "net")
    found = read_qwix(tmp_path / "net")
    assert found.network == network.description
    handed = to_qwix(network.variables)
    assert jax.tree.structure(found.variables) == jax.tree.structure(handed)
    assert all(jax.tree.leaves(jax.tree.map(same_bits, found.variables, handed)))
    assert isinstance(found.variables["params"]["block3"]["pointwise"]["kernel"], qwix.QArray)

    assert len(found.inputs) == 28
    ranges = variables[RANGES]
    for layer, bits, signed, limit in (
        ("stem", 8, True, ranges["stem"]["kernel"]),
        ("block3/pointwise", 4, False, ranges["block3"]["pointwise"]["kernel"]),
        ("head", 8, False, ranges["head"]["kernel"]),
    ):
        assert found.inputs[layer] == InputCodes(bits=bits, signed=signed, limit=float(limit))
    # Each of them is of a layer that Qwix serves.
    model = plain_convolutions(rebuilt(found.network)[0])
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    _, served = serve(model, found.variables, images, inputs=found.inputs, train=False)
    expected = ActivationQuantizer(bits=4, signed=False).scale(
        ranges["block3"]["pointwise"]["kernel"]
    )
    scale = served["params"]["block3"]["pointwise"]["conv_general_dilated0_lhs_scale"].array
    assert same_bits(scale.reshape(()), expected)


def test_qwix_computes_the_logits_of_a_run(
    binarynet_run: Run, tmp_path: Path, rng: np.random.Generator
) -> None:
    written = export.run(export.Config(run=binarynet_run.path, out=tmp_path / "net", format="qwix"))
    assert written == sum(x.stat().st_size for x in (tmp_path / "net").rglob("*") if x.is_file())
    network, found = read_run(binarynet_run.path), read_qwix(tmp_path / "net")
    assert found.inputs == {}
    images = rng.normal(size=(5, 8, 8, 1)).astype(np.float32)
    served, variables = serve(rebuilt(found.network)[0], found.variables, images, train=False)
    expected = np.asarray(apply(network.model, ab.dequantize(network.variables), images))
    logits = np.asarray(apply(served, variables, images))
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5 * np.ptp(expected))


@pytest.mark.parametrize(
    ("name", "given", "fix"),
    [
        ("net.onnx", "packed", "--format=onnx"),
        ("net.tflite", "onnx", "--format=litert"),
        ("net.safetensors", "stablehlo", "--format=packed"),
    ],
)
def test_a_name_of_another_format_is_refused_before_a_file_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, given: str, fix: str
) -> None:
    out = tmp_path / name
    out.write_text("a network")
    message = error_of(monkeypatch, str(tmp_path / "run"), f"--out={out}", f"--format={given}")
    assert f"--out={out} is named as a file of another format than --format={given}" in message
    assert fix in message
    assert out.read_text() == "a network"


def test_qwix_that_is_not_installed_is_named(
    binarynet_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("ab_jax.export.qwix")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "qwix", None)
    words = (str(binarynet_run.path), f"--out={tmp_path / 'net'}", "--format=qwix")
    assert "needs qwix, which is not installed: pip install '.[qwix]'" in error_of(
        monkeypatch, *words
    )


def test_a_litert_file_gives_the_logits_of_the_packed_network(
    mobilenet_run: Run, tmp_path: Path, rng: np.random.Generator
) -> None:
    path = mobilenet_run.path
    written = export.run(export.Config(run=path, out=tmp_path / "net", format="litert"))
    data = (tmp_path / "net").read_bytes()
    assert written == len(data)
    network = read_run(path)
    images = rng.normal(size=(3, *network.image_shape)).astype(np.float32)
    interpreter = Interpreter(model_content=data, num_threads=1)
    logits = interpreter.get_signature_runner("serving_default")(images=images)["logits"]
    expected = np.asarray(apply(network.model, ab.dequantize(network.variables), images))
    # A code that tips moves the rest a little.
    assert np.max(np.abs(logits - expected) / np.ptp(expected)) < 0.3
    # What is known of the network is inside.
    assert json.dumps(network.description["data"], sort_keys=True).encode() in data


def test_every_file_knows_its_quantization_and_what_wrote_it(
    mobilenet_run: Run, tmp_path: Path
) -> None:
    network = read_run(mobilenet_run.path)
    for form in ("packed", "qwix", "litert", "onnx"):
        export.FORMATS[form](network, tmp_path / form)
    in_onnx = onnx.load(tmp_path / "onnx").metadata_props
    in_litert = schema.ModelT.InitFromPackedBuf((tmp_path / "litert").read_bytes(), 0)
    (entry,) = [entry for entry in in_litert.metadata if entry.name == b"ab_jax"]
    about = [
        read_packed(tmp_path / "packed").network,
        read_qwix(tmp_path / "qwix").network,
        json.loads(bytes(in_litert.buffers[entry.buffer].data)),
        json.loads({prop.key: prop.value for prop in in_onnx}["network"]),
    ]
    bits = read_qwix(tmp_path / "qwix").inputs
    for found in about:
        weights = found["quantization"]["weights"]
        kernels = {name for name in weights if re.fullmatch(r"(.*/)?kernel", name)}
        assert kernels == weights.keys()
        assert len(kernels) == 28
        assert (weights["stem/kernel"], weights["block3/pointwise/kernel"]) == (8, 4)
        assert found["quantization"]["inputs"] == {path: x.bits for path, x in bits.items()}
        assert found["source"] == {"ab_jax": ab.__version__, "jax": jax.__version__}
        assert found["image_shape"] == [8, 8, 3]
        assert found["config"] == network.description["config"]


# Rebuilding


def test_every_network_is_rebuilt_from_its_flags() -> None:
    of_cifar = {"binarynet": Config(), "resnet20": resnet20_cifar10.DEFAULTS}
    for name in NETWORKS:
        defaults = of_cifar.get(name, mobilenet_v1_imagenet.DEFAULTS)
        config = dataclasses.replace(defaults, network=name)
        description = {"experiment": "any", "config": recorded(config), "classes": 7}
        model, rules, inputs = rebuilt({**description, "image_shape": [64, 64, 3]})
        assert isinstance(model, WithQuantizedInputs) == (inputs is not None)
        model = module_of(model)
        assert model.num_classes == 7
        assert rules == weight_rules(config)
        assert (inputs is None) == (name in of_cifar)
        # ResNet-20 is one network, whatever its images.
        stem = 32 if name == "resnet20" else 64
        assert getattr(model, "stem", stem) == stem
        assert model.axis_name is None


def test_an_older_record_needs_the_image_size_alone(mobilenet_run: Run, tmp_path: Path) -> None:
    path, config, variables = mobilenet_run
    # As 0.1 wrote them, and without two flags that came later.
    flags = {"width": 1 / 16, "weight_bits": 4, "act_bits": 4, "weight_scales": "tensor_absmax"}
    flags |= {k: v for k, v in recorded(config).items() if k in ("method", "seed", "image_size")}
    name = "experiments.mobilenet_v1_imagenet"
    old = finished(tmp_path / "old", name, config, variables, {}).path
    record = json.loads((old / "record.json").read_text())
    del record["data"]
    (old / "record.json").write_text(json.dumps({**record, "config": flags}))
    with pytest.raises(ValueError, match=r"does not tell the size of its images\. Give --image"):
        read_run(old)
    assert read_run(old, 8).description["image_shape"] == [8, 8, 3]
    assert read_run(old, 8).description["classes"] == 5
    assert read_run(old, 8).model == read_run(path).model
    with pytest.raises(ValueError, match=r"--image_size=32, but the images of .* have 8 pixels"):
        read_run(path, 32)


# Refusals, in a line


@pytest.fixture
def copied(binarynet_run: Run, tmp_path: Path) -> Path:
    target = tmp_path / "run"
    target.mkdir()
    (target / "record.json").write_bytes((binarynet_run.path / "record.json").read_bytes())
    (target / "checkpoints").symlink_to(binarynet_run.path / "checkpoints")
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: {}, "record.json is no record of a run"),
        (lambda r: [], "record.json is no record of a run"),
        (lambda r: with_flags(r, network="os:path"), "The network is 'os:path', none of"),
        (
            lambda r: {**r, "config": {"method": "ab"}, "experiment": "os"},
            "The network is None, none of",
        ),
        (
            lambda r: {**r, "summary": {"steps": 9}},
            "of step 4, but its record is of step 9",
        ),
        (lambda r: with_flags(r, gamma=1), "There is no flag --gamma any more"),
        (lambda r: with_flags(r, dtype="x"), "--dtype='x': should be 'float32' or 'bfloat16'"),
        (lambda r: with_flags(r, width="1"), "--width='1': should be a valid number"),
        (lambda r: with_flags(r, weights="int9"), "--weights=int9 is not known"),
        (
            lambda r: with_flags(r, width=1 / 16),
            "conv0_norm/mean is float32[4], and float32[8] in the",
        ),
    ],
)
def test_a_run_that_cannot_be_exported_is_refused_by_name(
    copied: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[..., Any],
    message: str,
) -> None:
    record = json.loads((copied / "record.json").read_text())
    (copied / "record.json").write_text(json.dumps(change(record)))
    assert message in error_of(monkeypatch, str(copied), f"--out={tmp_path / 'net'}")
    assert not (tmp_path / "net").exists()


def with_flags(record: dict[str, Any], **flags: Any) -> dict[str, Any]:
    return {**record, "config": {**record["config"], **flags}}


def error_of(monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["export", *words])
    with pytest.raises(SystemExit) as exit_:
        export.main()
    message = str(exit_.value.code)
    assert message.startswith("error: ")
    assert len(message.splitlines()) == 1
    return message


def test_the_command_line_exports_or_says_in_a_line_why_not(
    binarynet_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = f"--out={tmp_path / 'net'}"
    assert "There is no run in nowhere. Correct the path." in error_of(monkeypatch, "nowhere", out)
    (tmp_path / "begun").mkdir()
    assert "record.json: the run is not complete" in error_of(
        monkeypatch, str(tmp_path / "begun"), out
    )
    unknown = error_of(monkeypatch, str(binarynet_run.path), out, "--format=zip")
    assert "--format=zip is not known. Choose one of packed" in unknown
    below_a_file = f"--out={binarynet_run.path / 'record.json' / 'net'}"
    assert "cannot be written" in error_of(monkeypatch, str(binarynet_run.path), below_a_file)
    done = subprocess.run(
        [sys.executable, "-m", "experiments.export", str(binarynet_run.path), out],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": FAST_COMPILATION},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert " bytes of the network in float32" in done.stdout
    assert read_packed(tmp_path / "net").network["step"] == STEP


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"config": {"network": "antigravity"}}, "The network is 'antigravity'"),
        ({"config": {}, "experiment": "antigravity"}, "The network is None"),
        ({"config": None}, "The flags are None"),
        ({"classes": 11}, "batch_stats/head_norm/mean is float32[10]"),
        ({"classes": 2**40}, "make no network"),
        ({"classes": True}, "make no network"),
        ({"image_shape": [8, 8]}, "make no network"),
        ({"image_shape": [9, 9, 1]}, "BinaryNet takes square images"),
        ({"image_shape": [16, 16, 1]}, "params/dense0/kernel is float32"),
    ],
)
def test_a_file_of_another_network_is_refused(
    binarynet_run: Run, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    network = read_run(binarynet_run.path)
    changed = dataclasses.replace(network, description={**network.description, **fields})
    write_packed(tmp_path / "net", changed.variables, network=changed.description)
    with pytest.raises(ValueError, match="holds none of the experiments' networks: ") as error:
        load_packed(tmp_path / "net")
    assert str(error.value).startswith(str(tmp_path / "net"))
    assert message in str(error.value)


def test_giant_flags_are_refused_at_once(binarynet_run: Run, tmp_path: Path) -> None:
    network = read_run(binarynet_run.path)
    for width in (1e9, 1e300, -1.0):
        flags = {**network.description["config"], "width": width}
        described = {**network.description, "config": flags}
        write_packed(tmp_path / "net", network.variables, network=described)
        with pytest.raises(ValueError, match="holds none of the experiments' networks"):
            load_packed(tmp_path / "net")
