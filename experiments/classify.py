"""What an exported network sees in image files: the most likely classes, with probabilities.

    python -m experiments.classify net.onnx photo.jpg other.png

Networks: .onnx (`experiments.export --format=onnx`), which needs ONNX Runtime, NumPy, Pillow and
OpenCV and loads no JAX; and packed .safetensors, which JAX runs. Images of other sizes are cut and
resized as the evaluation of runs does it (`experiments.exported.pictures`).
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import tyro

from experiments.exported.classifiers import read_classifier
from experiments.exported.pictures import read_picture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Which network, and which images."""

    model: tyro.conf.Positional[Path]  # exported network, .onnx or .safetensors
    images: tyro.conf.Positional[tuple[Path, ...]]  # PNG, JPEG, WebP or BMP files
    top: int = 5  # classes to show for each image


def run(config: Config) -> None:
    """Print the classes of each image."""
    if config.top < 1:
        raise ValueError(f"--top={config.top} must be at least 1.")
    if not config.images:
        raise ValueError("There are no images to classify. Name some files after the network.")
    network = read_classifier(config.model)
    together = network.images_at_a_time
    for start in range(0, len(config.images), together):
        paths = config.images[start : start + together]
        pictures = [read_picture(path, network.image_shape) for path in paths]
        for path, shares in zip(paths, network.probabilities(np.stack(pictures)), strict=True):
            print(path)
            for index in np.argsort(-shares, kind="stable")[: config.top]:
                print(f"{100 * shares[index]:7.2f} %  {network.name(int(index))}")


def main() -> None:
    """The command line; what the user can mend ends it with one line on stderr."""
    config = tyro.cli(
        Config, prog="python -m experiments.classify", description=__doc__, use_underscores=True
    )
    try:
        run(config)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
