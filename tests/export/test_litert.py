"""Networks as LiteRT files: our integers inside, and our numbers from the interpreter."""

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from ab_jax.activations import ActivationQuantizer
from ab_jax.export.graph.fold import fold_batch_norm
from ab_jax.export.graph.known_networks import describe
from ab_jax.export.graph.operations import (
    Affine,
    Clip,
    Convolution,
    Dense,
    Flatten,
    Graph,
    MaxPool,
    Node,
    Operation,
    Quantize,
    apply,
    evaluate,
)
from ab_jax.export.litert import METADATA, to_litert
from ab_jax.quantizers import Quantized
from tests.export.small_networks import CASES, make
from tests.fast_compilation import compiled

#: Of each network the layers that are integer operators if their codes fit into int8. In float are
#: those whose output no `Quantize` takes alone, and those whose input is none.
IN_INTEGERS = {
    "binarynet": r"conv[024]|dense[01]",
    "binarynet, sign": r"none",
    "mobilenet": r"(?!block12/pointwise|head).*",
    "resnet v1": r".*/conv[01]",
    "resnet v1, keras": r".*/conv[01]",
    "resnet v2": r".*/conv[01]",
    "resnet v2, keras": r".*/conv[01]",
    "resnet, basic": r".*/conv0",
}
BATCH = 8
UNSIGNED = ActivationQuantizer(bits=8, signed=False)

# Another process, with the interpreter alone. The plain kernels show all tensors; those that run
# unless one asks for others are XNNPACK's.
ELSEWHERE = """
import sys
import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType

images = np.load(sys.argv[2])
outputs = {}
for kind in ("AUTO", "BUILTIN_WITHOUT_DEFAULT_DELEGATES"):
    plain = kind != "AUTO"
    interpreter = Interpreter(
        sys.argv[1],
        num_threads=1,
        experimental_op_resolver_type=OpResolverType[kind],
        experimental_preserve_all_tensors=plain,
    )
    one = interpreter.get_signature_runner("serving_default")(images=images[:1])["logits"]
    (given,) = interpreter.get_input_details()
    interpreter.resize_tensor_input(given["index"], images.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(given["index"], images)
    interpreter.invoke()
    (logits,) = interpreter.get_output_details()
    name = "plain" if plain else "fast"
    outputs |= {f"{name}/one": one, f"{name}/all": interpreter.get_tensor(logits["index"])}
    for tensor in interpreter.get_tensor_details() if plain else ():
        if tensor["dtype"] == np.int8 and len(tensor["shape_signature"]) and (
            tensor["shape_signature"][0] == -1
        ):
            codes = interpreter.get_tensor(tensor["index"])
            outputs["codes/" + tensor["name"]] = codes.astype(int) - tensor["quantization"][1]
np.savez(sys.argv[3], **outputs)
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"ab_jax", "jax", "flax", "tensorflow"}, loaded
"""


def run(data: bytes, images: np.ndarray, folder: Path) -> dict[str, np.ndarray]:
    """What LiteRT makes of images: logits of one and of all, by fast and plain kernels; codes."""
    (folder / "net.tflite").write_bytes(data)
    np.save(folder / "images.npy", images)
    paths = [str(folder / name) for name in ("net.tflite", "images.npy", "outputs.npz")]
    subprocess.run([sys.executable, "-c", ELSEWHERE, *paths], check=True, capture_output=True)
    return dict(np.load(folder / "outputs.npz"))


class File:
    """A file read by the schema alone."""

    def __init__(self, data: bytes) -> None:
        assert data[4:8] == b"TFL3"
        self.model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(data, 0))
        (self.graph,) = self.model.subgraphs
        self.tensors = {tensor.name.decode(): tensor for tensor in self.graph.tensors}

    def constant(self, name: str) -> np.ndarray:
        """Of any stored width."""
        tensor = self.tensors[name]
        data = np.asarray(self.model.buffers[tensor.buffer].data)
        kinds = {schema.TensorType.INT8: np.int8, schema.TensorType.INT32: np.int32}
        bits = {schema.TensorType.INT4: 4, schema.TensorType.INT2: 2}.get(tensor.type)
        if bits is None:
            return data.view(kinds[tensor.type]).reshape(tensor.shape)
        values = np.unpackbits(data, bitorder="little").reshape(-1, bits) @ (1 << np.arange(bits))
        values = np.where(values >= 2 ** (bits - 1), values - 2**bits, values)
        return values[: np.prod(tensor.shape)].astype(np.int8).reshape(tensor.shape)

    def scale(self, name: str) -> np.ndarray:
        return np.asarray(self.tensors[name].quantization.scale)

    def operators(self) -> list[tuple[str, list[str]]]:
        """Names, each with the names of the tensors it takes and gives."""
        names = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}
        codes = [names[code.builtinCode] for code in self.model.operatorCodes]
        return [
            (
                codes[operator.opcodeIndex],
                [
                    self.graph.tensors[i].name.decode()
                    for i in (*operator.inputs, *operator.outputs)
                ],
            )
            for operator in self.graph.operators
        ]


def layers_of(graph: Graph) -> list[tuple[str, Convolution | Dense]]:
    return [
        (node.name, node.operation)
        for node in graph.nodes
        if isinstance(node.operation, Convolution | Dense)
    ]


def largest_of(kernel: Any) -> int:
    """How far codes are from their zero points."""
    zeros = 0 if kernel.zero_point is None else np.asarray(kernel.zero_point).astype(int)
    return int(np.abs(np.asarray(kernel.codes) - zeros).max())


def check_integers(graph: Graph, file: File) -> set[str]:
    """Compare codes, scales, zero points and biases with the folded graph's.

    Returns the layers in integers.
    """
    whole = set()
    for name, layer in layers_of(graph):
        kernel = layer.kernel
        assert isinstance(kernel, Quantized)
        codes, found = np.asarray(kernel.codes).astype(int), file.constant(f"{name}/kernel")
        if found.ndim == 4 and found.shape[0] == 1 and codes.shape[2] == 1:
            found = found[0, :, :, None]
        else:
            found = np.moveaxis(found, 0, -1)
        quantization = file.tensors[f"{name}/kernel"].quantization
        scale, zeros = np.asarray(quantization.scale), np.asarray(quantization.zeroPoint)
        assert file.tensors[f"{name}/kernel"].shape[quantization.quantizedDimension] in (
            codes.shape[-1],
            1,
        )
        ours = np.asarray(kernel.scale).reshape(-1)
        if file.tensors[f"{name}/bias"].type == schema.TensorType.INT32:
            whole.add(name)
            times = np.broadcast_to(ours, scale.shape) / scale
            assert set(np.log2(times)) <= set(range(8)), "powers of two"
            if kernel.zero_point is not None:
                codes = codes - np.asarray(kernel.zero_point)
            codes = codes * times.astype(int)
            assert not zeros.any()
            unit = file.scale(f"{name}/bias").astype(np.float64)
            apart = file.constant(f"{name}/bias") * unit - np.asarray(layer.bias)
            assert (np.abs(apart) <= 0.5001 * unit + 1e-6 * np.abs(np.asarray(layer.bias))).all()
        else:
            np.testing.assert_array_equal(scale, ours)
            if kernel.zero_point is not None:
                np.testing.assert_array_equal(zeros, np.asarray(kernel.zero_point).reshape(-1))
        np.testing.assert_array_equal(found, codes)
    return whole


def tolerances(file: File) -> dict[str, Any]:
    """By how many codes a rounding may miss, for each `Quantize`: nothing but borders may tip.

    A standalone one divides in float32. An integer layer has its bias rounded to a unit of its
    sums, off by half of one, and the plain kernels round a sum twice, the first time to no more
    than a unit.
    """
    allowed: dict[str, Any] = {}
    for code, (*inputs, output) in file.operators():
        if code == "QUANTIZE":
            allowed[output] = 1e-3
        elif file.tensors[output].type == schema.TensorType.INT8 and len(inputs) == 3:
            x, kernel, _ = inputs
            unit = file.scale(x) * file.scale(kernel) / file.scale(output)
            allowed[output] = 1.5 * unit + 1e-3
    return allowed


def forced(graph: Graph, images: Any, codes: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Logits where each `Quantize` gives these codes, and what it was to round, in codes."""
    values, unrounded = [images], {}
    for node in graph.nodes:
        given = apply(node.operation, [values[i] for i in node.inputs])
        if isinstance(node.operation, Quantize):
            of = node.operation
            scale = of.quantizer.scale(of.limit)
            unrounded[node.name] = jnp.clip(values[node.inputs[0]] / scale, *of.quantizer.levels)
            given = codes[node.name] * scale
        values.append(given)
    return values[-1], unrounded


@pytest.mark.parametrize("name", CASES)
def test_litert_computes_what_the_network_does(
    rng: np.random.Generator, tmp_path: Path, name: str
) -> None:
    model, variables, shape = make(name, rng)
    graph = describe(model, variables, shape)
    data = to_litert(graph)
    graph = fold_batch_norm(graph)
    file = File(data)
    whole = {
        name_of
        for name_of, layer in layers_of(graph)
        if re.fullmatch(IN_INTEGERS[name], name_of) and largest_of(layer.kernel) <= 127
    }
    assert check_integers(graph, file) == whole

    images = rng.normal(size=(BATCH, *shape)).astype(np.float32)
    outputs = run(data, images, tmp_path)
    codes = {n.removeprefix("codes/"): x for n, x in outputs.items() if n.startswith("codes/")}
    codes = {node.name: codes[node.name] for node in graph.nodes if node.name in codes}
    quantizes = [node.name for node in graph.nodes if isinstance(node.operation, Quantize)]
    assert sorted(codes) == sorted(quantizes)
    (expected, unrounded), free = compiled(
        lambda x, c: (forced(graph, x, c), evaluate(graph, x)),
        images,
        {name: jnp.asarray(x, jnp.float32) for name, x in codes.items()},
    )
    # Every code is the nearest one, or on the border.
    allowed = tolerances(file)
    for quantize, found in codes.items():
        assert (np.abs(found - unrounded[quantize]) <= 0.5 + allowed[quantize]).all(), quantize
    largest = np.abs(expected).max()
    np.testing.assert_allclose(outputs["plain/all"], expected, rtol=0, atol=1e-5 * largest)
    # Elsewhere a code that tips moves the logits a little; without codes there is none to tip.
    bound = 0.25 if quantizes else 1e-5
    for kernels in ("plain", "fast"):
        logits = outputs[f"{kernels}/all"]
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, free, rtol=0, atol=bound * largest)
        np.testing.assert_allclose(
            outputs[f"{kernels}/one"], logits[:1], rtol=0, atol=1e-5 * largest
        )


# One layer, whose codes are the logits


def quantized(
    rng: np.random.Generator, shape: Sequence[int], bits: int = 8, affine: bool = False
) -> Quantized:
    most = 2 ** (bits - 1) - 1
    scales = (1,) * (len(shape) - 1) + (shape[-1],)
    fan_in = np.prod(shape[:-1])
    return Quantized(
        codes=jnp.asarray(rng.integers(-most - affine, most + 1, shape), jnp.int8),
        scale=jnp.asarray(rng.uniform(1, 2, scales) / (most * np.sqrt(fan_in)), jnp.float32),
        zero_point=jnp.asarray(rng.integers(-3, 4, scales), jnp.int8) if affine else None,
        bits=bits,
        dtype="float32",
    )


def one_layer(layer: Convolution | Dense, shape: Sequence[int], given: Sequence[int]) -> Graph:
    """From images in signed codes to codes of what the layer gives, clipped at 6."""
    operations = {
        "x": Quantize(ActivationQuantizer(bits=8, signed=True), 2.5),
        "layer": layer,
        "clip": Clip(6.0),
        "y": Quantize(UNSIGNED, 7.0),
    }
    shapes = [tuple(shape), *[tuple(given)] * 3]
    nodes = [
        Node(name, operation, (i,), of)
        for i, ((name, operation), of) in enumerate(zip(operations.items(), shapes, strict=True))
    ]
    return Graph(tuple(nodes), tuple(shape))  # type: ignore[arg-type]


SAME = ((1, 1), (1, 1))
BIAS = jnp.linspace(-0.5, 4, 6)
KINDS: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...], Any]] = {
    "convolution": ((3, 3, 4, 6), (7, 5, 4), (7, 5, 6), {"padding": SAME, "strides": (1, 1)}),
    "padded": ((3, 3, 4, 6), (8, 6, 4), (4, 3, 6), {"padding": SAME, "strides": (2, 2)}),
    "grouped": ((3, 3, 2, 6), (5, 5, 4), (3, 3, 6), {"padding": ((0, 0), (0, 0)), "groups": 2}),
    "depthwise": ((3, 3, 1, 6), (5, 5, 3), (5, 5, 6), {"padding": SAME, "groups": 3}),
    "dense": ((12, 6), (12,), (6,), None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_integer_layers_round_to_the_nearest_code(
    rng: np.random.Generator, tmp_path: Path, kind: str
) -> None:
    weights, shape, given, fields = KINDS[kind]
    kernel = quantized(rng, weights)
    if fields is None:
        layer: Any = Dense(kernel, BIAS)
    else:
        layer = Convolution(kernel, BIAS, **{"strides": (1, 1), **fields})
    # No gamma, one so small that its bias has no unit in int32, and one that cannot be folded so.
    gamma = jnp.asarray([1, 0, 1e-20, -1, 1e-3, 2], jnp.float32)
    folded = fold_batch_norm(
        Graph(
            (
                Node("x", layer, (0,), tuple(given)),
                Node("norm", Affine(gamma, BIAS), (1,), tuple(given)),
            ),
            tuple(shape),  # type: ignore[arg-type]
        )
    )
    (node,) = folded.nodes
    assert isinstance(node.operation, Convolution | Dense)
    graph = one_layer(node.operation, shape, given)
    data = to_litert(graph)
    file = File(data)
    assert file.tensors["layer/bias"].type == schema.TensorType.INT32
    assert [code for code, _ in file.operators()].count("PAD") == (kind == "padded")

    images = rng.normal(size=(BATCH, *shape)).astype(np.float32)
    images.reshape(-1)[:2] = -3, 3  # beyond the limit
    outputs = run(data, images, tmp_path)
    codes = np.clip(np.rint(images.astype(np.float64) * 127 / 2.5), -127, 127)
    np.testing.assert_array_equal(outputs["codes/x"], codes)
    of_x = dataclasses.replace(node.operation, bias=None)
    sums = np.asarray(compiled(lambda x: apply(of_x, [x]), jnp.asarray(codes * 2.5 / 127, "f")))
    wanted = np.clip(sums.astype(np.float64) + np.asarray(node.operation.bias), 0, 6) * 255 / 7
    unit = file.scale("x") * file.scale("layer/kernel") / file.scale("y")
    for kernels, of_unit in (("plain", 1.5), ("fast", 0.5)):
        found = outputs[f"{kernels}/all"] * 255 / 7
        assert (np.abs(found - np.rint(found)) < 1e-3).all()
        assert (np.abs(found - wanted) <= 0.5 + of_unit * unit + 1e-3).all()
    assert found.max() == pytest.approx(np.rint(6 * 255 / 7), abs=1e-3)


def test_narrow_codes_are_stored_in_their_width(rng: np.random.Generator, tmp_path: Path) -> None:
    """Of float operators, which a layer without codes before it is; the numbers are the same."""
    shape, images = (12,), rng.normal(size=(BATCH, 12)).astype(np.float32)
    for bits, kind in ((2, schema.TensorType.INT2), (3, schema.TensorType.INT4)):
        kernel = quantized(rng, (12, 5), bits, affine=True)
        graph = Graph((Node("head", Dense(kernel, None), (0,), (5,)),), shape)  # type: ignore[arg-type]
        assert File(to_litert(graph)).tensors["head/kernel"].type == schema.TensorType.INT8
        data = to_litert(graph, narrowest=2)
        assert File(data).tensors["head/kernel"].type == kind
        np.testing.assert_array_equal(File(data).constant("head/kernel").T, kernel.codes)
        outputs = run(data, images, tmp_path)
        expected = images.astype(np.float64) @ np.asarray(kernel.dequantize(), np.float64)
        for kernels in ("plain", "fast"):
            np.testing.assert_allclose(outputs[f"{kernels}/all"], expected, atol=1e-5)


def test_what_has_no_codes_is_written_in_float(rng: np.random.Generator, tmp_path: Path) -> None:
    """Weights as they are, an end of clipping that LiteRT does not know, and odd padding."""

    def normal(*shape: int) -> Any:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    shapes: list[tuple[int, ...]] = [(6, 7, 2), (6, 7, 3), (6, 7, 3), (6, 7, 3), (4, 7, 3)]
    operations: list[Operation] = [
        Convolution(normal(3, 3, 2, 3), None, (1, 1), SAME),
        Clip(0.7),
        Affine(normal(3), normal(3)),
        MaxPool((3, 1), (2, 1), ((2, 1), (0, 0))),
        Flatten(),
        Dense(normal(84, 4), normal(4)),
    ]
    nodes = [
        Node(f"node{i}", operation, (i,), shape)
        for i, (operation, shape) in enumerate(
            zip(operations, [*shapes[1:], (84,), (4,)], strict=True)
        )
    ]
    graph = Graph(tuple(nodes), (6, 7, 2))
    images = rng.normal(size=(BATCH, 6, 7, 2)).astype(np.float32)
    outputs = run(to_litert(graph), images, tmp_path)
    expected = compiled(lambda x: evaluate(graph, x), images)
    for kernels in ("plain", "fast"):
        np.testing.assert_allclose(outputs[f"{kernels}/all"], expected, rtol=0, atol=1e-4)


def test_what_is_known_of_a_network_travels_with_it(rng: np.random.Generator) -> None:
    graph = Graph((Node("head", Dense(quantized(rng, (3, 2)), None), (0,), (2,)),), (3,))  # type: ignore[arg-type]
    about = {"data": {"class_names": ["Käse", "dog"], "mean": [0.5]}}
    model = File(to_litert(graph, description=about)).model
    (entry,) = model.metadata
    assert entry.name.decode() == METADATA
    assert json.loads(bytes(model.buffers[entry.buffer].data)) == about
    assert not File(to_litert(graph)).model.metadata


def test_what_cannot_be_written_is_refused(rng: np.random.Generator) -> None:
    kernel = quantized(rng, (4, 2))
    grouped = dataclasses.replace(kernel, scale=jnp.ones((2, 2)))
    graph = Graph((Node("head", Dense(grouped, None), (0,), (2,)),), (4,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"head has scales of shape \[2, 2\].*without group_size"):
        to_litert(graph)
    with pytest.raises(ValueError, match="narrowest=3: codes are stored at 2, 4 or 8 bits"):
        to_litert(graph, narrowest=3)


def test_constants_lie_at_multiples_of_16_bytes(rng: np.random.Generator) -> None:
    graph = one_layer(Dense(quantized(rng, (5, 6)), BIAS), (5,), (6,))
    data = to_litert(graph)
    for name in ("layer/kernel", "layer/bias"):
        found = File(data).constant(name)
        assert data.find(found.tobytes()) % 16 == 0
