"""A calibrated network as an ONNX file that takes photographs as they are, and names the classes.

`python -m experiments.classify net.onnx photo.jpg` says what it sees, without JAX.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ab_jax as ab
from ab_jax.files import write_whole
from experiments.pretrained.imagenet_classes import COUNT, class_names
from experiments.pretrained.pretrained_models import PretrainedModel


def write_onnx(
    path: Path, model: PretrainedModel, codes: Any, *, description: Mapping[str, Any]
) -> int:
    """Write the file; returns its bytes.

    Args:
      codes: the parameters of `model`, as calibration returns them.
      description: JSON values for the file's metadata, of how the network was made.

    Raises:
      ValueError: as `onnx_bytes`. OSError: it cannot be written.
    """
    data = onnx_bytes(model, codes, description=description)
    write_whole(path, data)
    return len(data)


def onnx_bytes(model: PretrainedModel, params: Any, *, description: Mapping[str, Any]) -> bytes:
    """The content of the file.

    Args:
      model: whose pixels are normalized by a factor and a shift for each channel.
      params: its parameters, as floats or as codes.
      description: as for `write_onnx`.

    Raises:
      ValueError: ONNX is not installed; pixels are normalized otherwise; a network that has no
        counterpart in ONNX, as `function_to_onnx` says.
    """
    try:
        from ab_jax.export.onnx import function_to_onnx
    except ModuleNotFoundError as error:
        raise ValueError(
            f"A file of ONNX needs {error.name}, which is not installed: pip install '.[onnx]'"
        ) from error
    factor, shift = normalization(model)

    def logits(params: Any, pixels: jax.Array) -> Any:
        return model.forward(params, pixels.astype(jnp.float32) * factor + shift)

    images = jax.ShapeDtypeStruct((1, model.size, model.size, 3), jnp.uint8)
    classes = jax.eval_shape(logits, jax.eval_shape(ab.dequantize, params), images).shape[-1]
    file = function_to_onnx(
        logits,
        params,
        images,
        input_names=["images"],
        output_names=["logits"],
        class_names=class_names() if classes == COUNT else None,
        description=description,
    )
    return file.SerializeToString(deterministic=True)


def normalization(model: PretrainedModel) -> tuple[np.ndarray, np.ndarray]:
    """What pixels are multiplied by, and what is added then: float32 `[1, 1, 1, 3]` each.

    Raises:
      ValueError: the network's pixels are normalized otherwise.
    """
    values = np.arange(256, dtype=np.uint8).reshape(1, -1, 1, 1)
    pixels = np.broadcast_to(values, (1, 256, 256, 3)).copy()
    found = np.asarray(model.normalize(pixels), np.float64)
    black, white = found[:, :1, :1], found[:, -1:, :1]
    factor = (white - black) / 255
    if not np.allclose(found, pixels * factor + black, rtol=1e-5, atol=1e-5):
        raise ValueError(
            "A file of ONNX takes pixels that are normalized by a factor and a shift for each "
            "channel, and those of this network are not. Write --out=net.safetensors."
        )
    return factor.astype(np.float32), black.astype(np.float32)
