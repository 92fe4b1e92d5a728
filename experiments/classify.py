"""What a network sees in image files: the most likely classes, with probabilities.

    python -m experiments.classify net.onnx photo.jpg other.png
    python -m experiments.classify theirs.onnx photos --mean=0.5 --std=0.5 --class_names=names.txt

Networks: all that `experiments.export` writes. .onnx needs ONNX Runtime, .tflite LiteRT (and both
NumPy, Pillow and OpenCV), and neither loads JAX; packed .safetensors, .stablehlo and the directory
that --format=qwix writes are run by JAX. And .onnx and .tflite files of others, from images to
logits or probabilities.

Images: files, and folders, of which all images are taken that lie directly in them, by name. Of
other sizes than the network's they are cut and resized as the evaluation of runs does it
(`experiments.exported.pictures`).

What a file tells is used, and flags say the rest. Of --mean, --std, --image_size and --layout one
that contradicts the file is refused, since one of the two is a mistake; so is --output of a name
that there is not. --class_names wins over the names in a file: names change no answer. Pixels that
a file takes as they are (uint8) need no --mean and --std; where it takes float32, or integers that
stand for normalized pixels, these are for pixels in 0 to 1, one number for each channel or one for
all. StableHLO programs tell nothing but the size of images.

Files of strangers: nothing in them is executed but the network itself, and what is damaged is
refused in a line. But LiteRT and JAX's reader of StableHLO trust their files: a forged .tflite or
.stablehlo can end this process by a segmentation fault. And any network may ask for time and memory
as it likes. Run those you do not trust where that does no harm.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import tyro

from experiments.exported.classifiers import read_classifier
from experiments.exported.image_inputs import Told, read_class_names
from experiments.exported.pictures import images_in, read_picture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Which network, and which images."""

    model: tyro.conf.Positional[Path]  # .onnx, .tflite, .safetensors, .stablehlo, or Qwix's
    images: tyro.conf.Positional[tuple[Path, ...]]  # PNG, JPEG, WebP or BMP files, or folders
    top: int = 5  # classes to show for each image
    mean: tuple[float, ...] | None = None  # of pixels in 0 to 1, for each channel or one for all
    std: tuple[float, ...] | None = None  # the same
    image_size: int | None = None  # pixels of a side, where the network's file leaves it open
    layout: str | None = None  # NHWC or NCHW, where the input's shape does not tell
    class_names: Path | None = None  # a text file, one name a line in the order of the logits
    output: str | None = None  # name of the output with the logits; None: the first
    softmax: bool | None = None  # None: unless the network gives probabilities already


def run(config: Config) -> None:
    """Print the classes of each image."""
    if config.top < 1:
        raise ValueError(f"--top={config.top} must be at least 1.")
    images = [image for path in config.images for image in images_in(path)]
    if not images:
        raise ValueError("There are no images to classify. Name some files after the network.")
    names = None if config.class_names is None else read_class_names(config.class_names)
    told = Told(
        mean=config.mean,
        std=config.std,
        image_size=config.image_size,
        layout=config.layout,
        class_names=names,
        output=config.output,
        softmax=config.softmax,
    )
    network = read_classifier(config.model, told)
    together = network.images_at_a_time
    for start in range(0, len(images), together):
        paths = images[start : start + together]
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
