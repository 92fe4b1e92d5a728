"""TFLite files of ours and of others, run by LiteRT on the CPU, without JAX.

LiteRT checks little of what a file claims: a forged one can end the process without a word, or
take all memory. Run what you do not trust in a process whose memory and rights are limited.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.exported.image_classifier import Classifier, check_size, line, shown
from experiments.exported.image_inputs import Told, image_input

_METADATA = b"ab_jax"  # the entry that files of ours have, as `ab_jax.export.litert` writes it
_MOST_BYTES = 2**31  # of a file, whose offsets have 32 bits
_IDENTIFIER = b"TFL3"


def from_litert(path: Path, told: Told = Told()) -> Classifier:  # noqa: B008  frozen
    """A TFLite file with one input, images, float32, uint8 or int8, of either layout.

    Files of ours tell mean, std and the classes' names. Of others, uint8 goes in as it is, unless
    a mean and std are told: then pixels are normalized, and rounded as the file's quantization
    says. Quantized outputs are turned into the numbers that they stand for; those with the scale
    that LiteRT has for its softmax (1/256 from the lowest code on) are probabilities already.

    Raises:
      ValueError: LiteRT is not there; it is no such file; something is missing, or told otherwise.
        OSError: it cannot be read.
    """
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ModuleNotFoundError as error:
        raise ValueError(
            "TFLite files need LiteRT, which is not installed: pip install ai-edge-litert"
        ) from error
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path} has more than {_MOST_BYTES} bytes, as no TFLite file does.")
    data = path.read_bytes()
    if data[4:8] != _IDENTIFIER:
        raise ValueError(f"{path} cannot be read as a TFLite model: it does not start as one.")
    try:
        with _quiet():
            interpreter = Interpreter(model_content=data)
            inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
        about = _description(data)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a TFLite model: {line(error)}") from error
    known = about.get("data") if isinstance(about, dict) else None
    known = known if isinstance(known, dict) else {}
    if len(inputs) != 1 or not outputs:
        raise ValueError(f"{path} takes no images [batch, height, width, channels].")
    (images,) = inputs
    to_input = image_input(
        path,
        told,
        [int(size) for size in _shape(images)],
        np.dtype(images["dtype"]),
        mean=known.get("mean"),
        std=known.get("std"),
        quantization=_quantization(path, images),
    )
    output = _output(path, outputs, told.output)
    given_as = _quantization(path, output)
    softmax = told.softmax
    if softmax is None and given_as == (1 / 256, 0 if output["dtype"] == np.uint8 else -128):
        softmax = False

    def logits(pixels: np.ndarray) -> np.ndarray:
        given = to_input(pixels)
        try:
            with _quiet():
                if given.shape != tuple(interpreter.get_input_details()[0]["shape"]):
                    interpreter.resize_tensor_input(images["index"], given.shape)
                interpreter.allocate_tensors()
                interpreter.set_tensor(images["index"], given)
                interpreter.invoke()
                found = interpreter.get_tensor(output["index"])
        except Exception as error:
            raise ValueError(f"{path} cannot be run: {line(error)}") from error
        if given_as is None:
            return found
        check_size(path, found)
        scale, zero_point = given_as
        return (found.astype(np.float64) - zero_point) * scale

    names = None if told.class_names is not None else known.get("class_names")
    return Classifier(
        path, logits, to_input.image_shape, told.names(path, names), to_input.batch, softmax
    )


def _shape(tensor: dict[str, Any]) -> Any:
    """With -1 for a size that is open."""
    signature = tensor["shape_signature"]
    return signature if len(signature) == len(tensor["shape"]) else tensor["shape"]


def _quantization(path: Path, tensor: dict[str, Any]) -> tuple[float, int] | None:
    """Scale and zero point of an integer tensor; None: it has none."""
    scale, zero_point = tensor["quantization"]
    if np.dtype(tensor["dtype"]).kind not in "iu" or not scale:
        return None
    if not (np.isfinite(scale) and scale > 0):
        raise ValueError(f"{path} has a quantization of scale {scale}, which must be above 0.")
    return float(scale), int(zero_point)


def _output(path: Path, outputs: list[dict[str, Any]], told: str | None) -> dict[str, Any]:
    """The output tensor of this name, or the first one."""
    if told is None:
        return outputs[0]
    for output in outputs:
        if output["name"] == told:
            return output
    names = [output["name"] for output in outputs]
    raise ValueError(f"--output={told}: the outputs of {path} are {shown(names)}.")


def _description(data: bytes) -> Any:
    """The JSON value that files of ours have in their metadata; None: it is a file of others."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.Model.GetRootAs(data, 0)
    for i in range(model.MetadataLength()):
        entry = model.Metadata(i)
        if entry is not None and entry.Name() == _METADATA:
            values = model.Buffers(entry.Buffer()).DataAsNumpy()
            return json.loads(bytes(values))
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within it nothing is written to stderr, to which LiteRT's own code writes as it runs."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
