"""ONNX files of ours and of others, run by ONNX Runtime on the CPU, without JAX."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from experiments.exported.image_classifier import Classifier, line, shown
from experiments.exported.image_inputs import Told, image_input

_MOST_BYTES = 2**31  # of a file; Protocol Buffers have no more
_DTYPES: dict[str, np.dtype] = {
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(float)": np.dtype(np.float32),
}
_OURS = "ab_jax"


def from_onnx(path: Path, told: Told = Told()) -> Classifier:  # noqa: B008  frozen
    """An ONNX file with one input, images, uint8 or float32, of either layout.

    Names of classes are its metadata `class_names`, a JSON list. Files of ours that take float32
    tell `mean` and `std` there, too; uint8 goes in as it is.

    Raises:
      ValueError: ONNX Runtime is not there; it is no such file; something is missing, or told
        otherwise. OSError: it cannot be read.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ValueError(
            "ONNX files need ONNX Runtime, which is not installed: pip install onnxruntime"
        ) from error
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path} has more than {_MOST_BYTES} bytes, as no ONNX file does.")
    data = path.read_bytes()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # nothing but what is raised, too
    # Without VNNI the fast kernels saturate where two products of 8 bits are added.
    options.add_session_config_entry("session.x64quantprecision", "1")
    # Arrays may lie in files of their own: in the same folder, and nowhere else.
    beside = str(path.absolute().parent)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", beside)
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        # Names are read of the file only here, and may be no text.
        inputs = [(x.name, x.type, x.shape) for x in session.get_inputs()]
        outputs = [output.name for output in session.get_outputs()]
        about = session.get_modelmeta()
        producer, known = about.producer_name, about.custom_metadata_map
    except Exception as error:  # of classes that ONNX Runtime does not publish
        raise ValueError(f"{path} cannot be read as an ONNX model: {line(error)}") from error
    if len(inputs) != 1 or len(inputs[0][2]) != 4 or not outputs:
        raise ValueError(f"{path} takes no images [batch, height, width, channels].")
    ((images, kind, shape),) = inputs
    if kind not in _DTYPES:
        raise ValueError(f"{path} takes images of {shown(kind)[1:-1]}, not of uint8 or float32.")
    ours = producer == _OURS
    to_input = image_input(
        path,
        told,
        shape,
        _DTYPES[kind],
        mean=_value(path, known, "mean") if ours else None,
        std=_value(path, known, "std") if ours else None,
    )
    output = _output(path, outputs, told.output)

    def logits(pixels: np.ndarray) -> np.ndarray:
        given = to_input(pixels)
        try:
            return session.run([output], {images: given})[0]
        except Exception as error:
            raise ValueError(f"{path} cannot be run: {line(error)}") from error

    names = None if told.class_names is not None else _value(path, known, "class_names")
    return Classifier(
        path,
        logits,
        to_input.image_shape,
        told.names(path, names),
        to_input.batch,
        told.softmax,
    )


def _value(path: Path, metadata: dict[str, str], name: str) -> Any:
    """A JSON value of a file's metadata; None: it has none of this name."""
    try:
        return json.loads(metadata.get(name, "null"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The {name} of {path} are no JSON: {line(error)}") from error


def _output(path: Path, names: list[str], told: str | None) -> str:
    """The output of this name, or the first one."""
    if told is None:
        return names[0]
    if told not in names:
        raise ValueError(f"--output={told}: the outputs of {path} are {shown(names)}.")
    return told
