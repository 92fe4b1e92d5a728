r"""A finished run's network as the file that is deployed: its codes at alpha 1, and all they need.

    python -m experiments.export runs/small/ab --out=net.safetensors

The weights are quantized by the run's own rules, as its evaluation does it, and the batch
statistics are the running ones. Formats:

packed: codes at their true width, scales and the rest in safetensors (`ab_jax.export.packed`);
`experiments.exported.finished_networks.load_packed` makes a model of it again.

stablehlo: a program from normalized images to logits, codes inside (`ab_jax.export.stablehlo`);
`jax.export.deserialize(data).call(images)` runs it, on CPUs, GPUs and TPUs, without this library.

qwix: an Orbax checkpoint (a directory) of Qwix's arrays, with the ranges of quantized inputs
(`ab_jax.export.qwix`), whose `serve` computes with it by Qwix's kernels.

onnx: a file for ONNX Runtime, with 8-bit codes in the form of its integer kernels
(`ab_jax.export.onnx`), from uint8 images where the record tells their mean and std, else from
normalized ones; `experiments.classify` runs it without JAX. Codes of at most 4 bits are stored in 4
bits or less (onnx_int4 is another name for it). onnx_integer_bias: the same with biases rounded to
integers, as the fastest kernels have them: sooner done, and some images get another class.

litert: a .tflite file for LiteRT, the runtime of phones and small machines, with 8-bit codes in its
integer operators (`ab_jax.export.litert`), from normalized images to logits.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

import ab_jax as ab
from ab_jax.data.augment import normalize
from ab_jax.export.inference import inference
from ab_jax.export.packed import write_packed
from ab_jax.export.stablehlo import to_stablehlo
from ab_jax.files import write_whole
from ab_jax.linen import layer_paths, module_of, plain_convolutions
from experiments.exported.finished_networks import TrainedNetwork, read_run
from experiments.settings.choices import choose
from experiments.settings.command_line import end_with_a_line
from experiments.settings.config import FlagError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to export, and where to."""

    run: tyro.conf.Positional[Path]  # directory of the finished run, such as runs/NAME
    out: Path  # the file (of qwix: the checkpoint) to write; one that is there is replaced
    # packed, stablehlo, qwix, onnx, onnx_int4, onnx_integer_bias or litert
    format: str = "packed"
    image_size: int | None = None  # pixels, of runs whose record does not tell (older code)
    network: str | None = None  # of a run of somebody else's network: its --network once more


def packed(network: TrainedNetwork, path: Path) -> int:
    """Write the packed file; returns its bytes."""
    return write_packed(path, network.variables, rules=network.rules, network=network.description)


def stablehlo(network: TrainedNetwork, path: Path) -> int:
    """Write the program; returns its bytes."""
    # Convolutions made for CPUs are for a given number of images, too.
    apply = functools.partial(plain_convolutions(network.model).apply, train=False)
    data = to_stablehlo(apply, network.variables, network.image_shape)
    write_whole(path, data)
    return len(data)


def qwix(network: TrainedNetwork, path: Path) -> int:
    """Write the checkpoint; returns its bytes."""
    try:
        from ab_jax.export.qwix import input_codes, to_qwix, write_qwix
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--format=qwix needs {error.name}, which is not installed: pip install '.[qwix]'"
        ) from error
    inputs = {}
    if network.activation_rules is not None:
        images = jax.ShapeDtypeStruct((1, *network.image_shape), jnp.float32)
        layers = layer_paths(module_of(network.model), images, train=False)
        inputs = input_codes(network.variables, network.activation_rules, layers)
    variables = to_qwix(network.variables)
    return write_qwix(path, variables, inputs=inputs, network=network.description)


def onnx(
    network: TrainedNetwork,
    path: Path,
    *,
    integer_biases: bool = False,
    normalized: bool = False,
) -> int:
    """Write the ONNX file, of images that are `normalized` already or not; returns its bytes."""
    try:
        from ab_jax.export.onnx import function_to_onnx
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--format=onnx needs {error.name}, which is not installed: pip install '.[onnx]'"
        ) from error
    data = network.description.get("data") or {}
    from_pixels = not normalized and "mean" in data and "std" in data
    net = inference(network.model, network.variables)

    def logits(params: Any, images: jax.Array) -> Any:
        if from_pixels:
            images = normalize(images, data["mean"], data["std"])
        return net.function(params, images)

    dtype = jnp.uint8 if from_pixels else jnp.float32
    model = function_to_onnx(
        logits,
        net.params,
        jax.ShapeDtypeStruct((1, *network.image_shape), dtype),
        rules=net.rules,
        ranges=net.ranges,
        input_names=["images"],
        output_names=["logits"],
        mean=data["mean"] if from_pixels else None,
        std=data["std"] if from_pixels else None,
        class_names=data.get("class_names"),
        description=network.description,
        integer_biases=integer_biases,
    )
    written = model.SerializeToString(deterministic=True)
    write_whole(path, written)
    return len(written)


def litert(network: TrainedNetwork, path: Path) -> int:
    """Write the .tflite file; returns its bytes."""
    try:
        from ab_jax.export.litert import function_to_litert
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--format=litert needs {error.name}, which is not installed: pip install '.[litert]'"
        ) from error
    net = inference(network.model, network.variables)
    data = function_to_litert(
        net.function,
        net.params,
        jax.ShapeDtypeStruct((1, *network.image_shape), jnp.float32),
        rules=net.rules,
        ranges=net.ranges,
        input_names=["images"],
        output_names=["logits"],
        description=network.description,
    )
    write_whole(path, data)
    return len(data)


#: What writes each format: a function of the network and the path that returns the bytes written.
FORMATS: dict[str, Callable[[TrainedNetwork, Path], int]] = {
    "packed": packed,
    "stablehlo": stablehlo,
    "qwix": qwix,
    "onnx": onnx,
    "onnx_int4": onnx,
    "onnx_integer_bias": functools.partial(onnx, integer_biases=True),
    "litert": litert,
}


#: What the end of a file's name says of its format.
SUFFIXES = {
    ".safetensors": ("packed",),
    ".stablehlo": ("stablehlo",),
    ".onnx": ("onnx", "onnx_int4", "onnx_integer_bias"),
    ".tflite": ("litert",),
}


def run(config: Config) -> int:
    """Export as the flags say, say what came out, and return the bytes written."""
    write = choose("format", config.format, FORMATS)
    named = SUFFIXES.get(config.out.suffix, (config.format,))
    if config.format not in named:
        raise FlagError(
            f"--out={config.out} is named as a file of another format than "
            f"--format={config.format}: give --format={named[0]}, or another name."
        )
    network = read_run(config.run, config.image_size, config.network)
    written = write(network, config.out)
    in_float = float32_bytes(network.variables)
    print(
        f"{config.out}: {written:,} bytes, {written / in_float:.4f} times the {in_float:,} bytes "
        f"of the network in float32"
    )
    return written


def float32_bytes(variables: Any) -> int:
    """Bytes of all variables of a network, were none quantized and each a float32."""
    values = jax.eval_shape(ab.dequantize, variables)
    return sum(4 * leaf.size for leaf in jax.tree.leaves(values))


def main() -> None:
    """The command line; what the user can mend ends it with one line on stderr."""
    config = tyro.cli(
        Config, prog="python -m experiments.export", description=__doc__, use_underscores=True
    )
    end_with_a_line(lambda: run(config))


if __name__ == "__main__":
    main()
