"""Which reader takes a file with a network that classifies, by what it is named.

The readers of ONNX and TFLite load no JAX; those of the other formats do, and are imported where
they are needed.
"""

from pathlib import Path

from experiments.exported.image_classifier import Classifier
from experiments.exported.image_inputs import Told
from experiments.exported.litert_classifier import from_litert
from experiments.exported.onnx_classifier import from_onnx

#: The endings of files that are read here; a directory is a checkpoint of Qwix.
ENDINGS = (".onnx", ".safetensors", ".tflite", ".stablehlo")


def read_classifier(path: Path, told: Told = Told()) -> Classifier:  # noqa: B008  frozen
    """The network in a file, by its ending, or in a directory that is a checkpoint of Qwix.

    Raises:
      ValueError: an unknown ending, no regular file, or what the readers raise. OSError: it cannot
        be read.
    """
    if not path.is_dir() and path.suffix not in ENDINGS:
        raise ValueError(
            f"{path} is no network that can be run here: its name must end in "
            f"{' or '.join(ENDINGS)}, or it must be the directory that --format=qwix writes."
        )
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path} is no regular file.")
    if path.suffix == ".onnx" and not path.is_dir():
        return from_onnx(path, told)
    if path.suffix == ".tflite" and not path.is_dir():
        return from_litert(path, told)
    from experiments.exported.jax_classifiers import from_packed, from_qwix, from_stablehlo

    if path.is_dir():
        return from_qwix(path, told)
    return {".safetensors": from_packed, ".stablehlo": from_stablehlo}[path.suffix](path, told)
