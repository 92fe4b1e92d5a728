"""Packed files, StableHLO programs and Qwix checkpoints of ours, run by JAX."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ab_jax.export.packed import read_packed
from ab_jax.linen import plain_convolutions
from experiments.exported.finished_networks import load_packed, rebuilt
from experiments.exported.image_classifier import Classifier, line, shown
from experiments.exported.image_inputs import ImageInput, Told, image_input

# What a program of plain arithmetic has no use for: calls of code outside of it (but for the check
# of its input's shape, which JAX writes), and what waits for another program.
_CALL = re.compile(r"custom_call(?! @shape_assertion\()|stablehlo\.(?:infeed|outfeed|send|recv)\b")
_MOST_BYTES = 2**31  # of a program, whose offsets have 32 bits


def from_packed(path: Path, told: Told) -> Classifier:
    """A packed file that `experiments.export` wrote.

    Raises:
      ValueError: it is no such file; something is missing, or told otherwise. OSError: it cannot be
        read.
    """
    told.refuse(path, "layout", "output")
    model, variables = load_packed(path)

    @jax.jit
    def logits(images: jax.Array) -> Any:
        return model.apply(variables, images, train=False)

    return _described(path, told, read_packed(path).network, logits)


def from_qwix(path: Path, told: Told) -> Classifier:
    """A checkpoint that `experiments.export --format=qwix` wrote, a directory, run by Qwix.

    Raises:
      ValueError: Qwix is not there; it is no such directory; something is missing, or told
        otherwise. OSError: it cannot be read.
    """
    told.refuse(path, "layout", "output")
    try:
        from ab_jax.export.qwix import read_qwix, serve
    except ModuleNotFoundError as error:
        raise ValueError(
            f"Checkpoints of Qwix need {error.name}, which is not installed: pip install '.[qwix]'"
        ) from error
    try:
        network = read_qwix(path)
        model = plain_convolutions(rebuilt(network.network)[0])
        like = jax.ShapeDtypeStruct((1, *network.network["image_shape"]), jnp.float32)
        served, variables = serve(
            model, network.variables, like, inputs=network.inputs, train=False
        )
    except FileNotFoundError:
        raise
    except Exception as error:  # of Orbax and Flax, in as many ways as there are
        raise ValueError(
            f"{path} holds none of the experiments' networks: {line(error)}"
        ) from error

    @jax.jit
    def logits(images: jax.Array) -> Any:
        return served.apply(variables, images, train=False)

    return _described(path, told, network.network, logits)


def from_stablehlo(path: Path, told: Told) -> Classifier:
    """A StableHLO program from images, float32 or uint8, to logits.

    It tells nothing but the shape of its images. It is a program: it may take whatever time and
    memory, but one that calls code outside of it is refused. JAX's reader trusts its files: a
    forged one can end the process by a segmentation fault.

    Raises:
      ValueError: it is no such program; something is missing, or told otherwise. OSError: it cannot
        be read.
    """
    told.refuse(path, "output")
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path} has more than {_MOST_BYTES} bytes, as no such program does.")
    try:
        program = jax.export.deserialize(bytearray(path.read_bytes()))
        shapes, outputs, text = program.in_avals, program.out_avals, program.mlir_module()
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a StableHLO program: {line(error)}") from error
    if outside := _CALL.search(text):
        call = text[outside.start() : outside.start() + 60].partition("(")[0]
        raise ValueError(f"{path} calls code outside of it: {shown(call)}. It is not run.")
    if len(shapes) != 1 or len(outputs) != 1 or len(shapes[0].shape) != 4:
        raise ValueError(f"{path} takes no images [batch, height, width, channels] alone.")
    to_input = image_input(path, told, shapes[0].shape, np.dtype(shapes[0].dtype))

    def logits(images: np.ndarray) -> Any:
        try:
            return program.call(images)
        except Exception as error:
            raise ValueError(f"{path} cannot be run: {line(error)}") from error

    return _classifier(path, told, to_input, logits, None)


def _described(
    path: Path, told: Told, network: dict[str, Any], logits: Callable[[Any], Any]
) -> Classifier:
    """A network of ours, whose file tells what its record told."""
    data = network.get("data")
    known = data if isinstance(data, dict) else {}
    if told.mean is None and not {"mean", "std"} <= known.keys():
        raise ValueError(
            f"{path} does not tell the mean and std by which images are normalized: nor did the "
            f"record of its run. Give --mean and --std, or export a run of newer code."
        )
    shape = (None, *network["image_shape"])
    to_input = image_input(
        path,
        dataclasses.replace(told, layout="NHWC"),
        shape,
        np.dtype(np.float32),
        mean=known.get("mean"),
        std=known.get("std"),
    )
    return _classifier(path, told, to_input, logits, known.get("class_names"))


def _classifier(
    path: Path, told: Told, to_input: ImageInput, logits: Callable[[Any], Any], names: Any
) -> Classifier:
    return Classifier(
        path,
        lambda pixels: np.asarray(logits(to_input(pixels)), dtype=np.float32),
        to_input.image_shape,
        told.names(path, names),
        to_input.batch,
        told.softmax,
    )
