"""What LiteRT makes of a function's file: its interpreter runs in another process than JAX."""

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ai_edge_litert import schema_py_generated as schema

# One process for all files of a run, with the interpreter alone. The plain kernels show all
# tensors; those that run unless one asks for others are XNNPACK's.
ELSEWHERE = """
import sys
import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType

KINDS = {"fast": "AUTO", "plain": "BUILTIN_WITHOUT_DEFAULT_DELEGATES"}


def answers(file, inputs, kernels):
    outputs = {}
    for kind in kernels:
        interpreter = Interpreter(
            file,
            num_threads=1,
            experimental_op_resolver_type=OpResolverType[KINDS[kind]],
            experimental_preserve_all_tensors=kind == "plain",
        )
        found = interpreter.get_signature_runner("serving_default")(**inputs)
        outputs |= {f"{kind}/{name}": array for name, array in found.items()}
        for tensor in interpreter.get_tensor_details() if kind == "plain" else ():
            if tensor["name"].startswith("codes/") and tensor["dtype"] == np.int8:
                codes = interpreter.get_tensor(tensor["index"])
                outputs[tensor["name"]] = codes.astype(int) - tensor["quantization"][1]
    return outputs


for line in sys.stdin:
    folder, *kernels = line.split()
    loaded = {name.partition(".")[0] for name in sys.modules}
    assert not loaded & {"ab_jax", "jax", "flax", "tensorflow"}, loaded
    try:
        given = np.load(folder + "/inputs.npz")
        names = open(folder + "/names.txt").read().splitlines()
        inputs = {name: given[f"arr_{i}"] for i, name in enumerate(names)}
        outputs = answers(folder + "/net.tflite", inputs, kernels)
        with open(folder + "/outputs.txt", "w") as file:
            file.writelines(name + "\\n" for name in outputs)
        np.savez(folder + "/outputs.npz", *outputs.values())
        print("done", flush=True)
    except Exception as error:
        print(" ".join(repr(error).split()), flush=True)
"""


@functools.cache
def _elsewhere() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", ELSEWHERE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def answers_by_name(
    data: bytes, inputs: dict[str, Any], kernels: str = "fast plain"
) -> dict[str, np.ndarray]:
    """What a file gives: `fast/NAME` and `plain/NAME` of its outputs, and `codes/NAME`.

    Args:
      data: of the file.
      inputs: by name.
      kernels: `fast`, XNNPACK's, `plain`, or both; codes are known of the plain ones.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "net.tflite").write_bytes(data)
        Path(folder, "names.txt").write_text("\n".join(inputs), encoding="utf-8")
        np.savez(Path(folder, "inputs.npz"), *map(np.asarray, inputs.values()))
        process = _elsewhere()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{folder} {kernels}\n")
        process.stdin.flush()
        told = process.stdout.readline().strip()
        if told != "done":
            _elsewhere.cache_clear()
            process.kill()
            process.communicate()
            raise AssertionError(f"LiteRT: {told or f'ended with {process.returncode}'}")
        names = Path(folder, "outputs.txt").read_text(encoding="utf-8").splitlines()
        with np.load(Path(folder, "outputs.npz")) as found:
            return {name: found[f"arr_{i}"] for i, name in enumerate(names)}


class File:
    """A file read by the schema alone."""

    def __init__(self, data: bytes) -> None:
        assert data[4:8] == b"TFL3"
        self.model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(data, 0))
        self.graph = self.model.subgraphs[0]  # the others are bodies of loops
        self.all_tensors = [t for graph in self.model.subgraphs[::-1] for t in graph.tensors]
        self.tensors = {tensor.name.decode(): tensor for tensor in self.all_tensors}

    def constant(self, name: str) -> np.ndarray:
        """Of any stored width."""
        tensor = self.tensors[name]
        data = np.asarray(self.model.buffers[tensor.buffer].data)
        kinds = {schema.TensorType.INT8: np.int8, schema.TensorType.INT32: np.int32}
        kinds[schema.TensorType.FLOAT32] = np.float32
        bits = {schema.TensorType.INT4: 4, schema.TensorType.INT2: 2}.get(tensor.type)
        if bits is None:
            return data.view(kinds[tensor.type]).reshape(tensor.shape)
        values = np.unpackbits(data, bitorder="little").reshape(-1, bits) @ (1 << np.arange(bits))
        values = np.where(values >= 2 ** (bits - 1), values - 2**bits, values)
        return values[: np.prod(tensor.shape)].astype(np.int8).reshape(tensor.shape)

    def scale(self, name: str) -> np.ndarray:
        return np.asarray(self.tensors[name].quantization.scale)

    def metadata(self) -> dict[str, Any]:
        """The JSON of the entries, by their names."""
        return {
            entry.name.decode(): json.loads(bytes(self.model.buffers[entry.buffer].data))
            for entry in self.model.metadata
        }

    def signature(self) -> tuple[list[str], list[str]]:
        """Names of inputs and of outputs, in the order of the file."""
        (given,) = self.model.signatureDefs
        names = ([x.name.decode() for x in part] for part in (given.inputs, given.outputs))
        inputs, outputs = names
        return inputs, outputs

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


def answers(data: bytes, *inputs: Any, kernels: str = "fast") -> list[np.ndarray]:
    """The leaves of what a file gives for these inputs."""
    into, out = File(data).signature()
    given = dict(zip(into, jax.tree.leaves(inputs), strict=True))
    found = answers_by_name(data, given, kernels)
    return [found[f"{kernels}/{name}"] for name in out]
