"""What LiteRT makes of a function's file: its interpreter in another process, beside JAX in this."""

import functools
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

# One process for all files of a run, with the interpreter alone. The plain kernels show all tensors;
# those that run unless one asks for others are XNNPACK's.
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


def answers(
    data: bytes, names: tuple[list[str], list[str]], *inputs: Any, kernels: str = "fast"
) -> list[np.ndarray]:
    """The leaves of what a file gives for these inputs, whose names and the outputs' are `names`."""
    leaves = jax.tree.leaves(inputs)
    found = answers_by_name(data, dict(zip(names[0], leaves, strict=True)), kernels)
    return [found[f"{kernels}/{name}"] for name in names[1]]
