"""Small folders of real image files, and where the archive of CIFAR-10 may lie."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]

# Pixels by the name that a prepared data set gives the file: "train/cat/0.png".
Pixels = dict[str, np.ndarray]


@pytest.fixture
def image_folder(tmp_path: Path, rng: np.random.Generator) -> Callable[..., tuple[Path, Pixels]]:
    """Makes a folder of random PNG files: `image_folder({"train": 6, "test": 3})` per class."""

    def make(
        counts: dict[str, int],
        classes: tuple[str, ...] = ("ant", "bee"),
        size: int = 8,
    ) -> tuple[Path, Pixels]:
        pixels = {}
        for split, count in counts.items():
            for class_name in classes:
                for index in range(count):
                    file = f"{split}/{class_name}/{index}.png"
                    pixels[file] = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
                    path = tmp_path / "source" / file
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels[file]).save(path)
        return tmp_path / "source", pixels

    return make


@pytest.fixture(scope="session")
def cifar10_jpeg_archive() -> Path:
    """The archive of `cifar10_jpeg`, or a skip that says where it was looked for."""
    default = ROOT.parent / "shared" / "data" / "cifar10_jpeg.tar.xz"
    archive = Path(os.environ.get("AB_JAX_DATA_SOURCE", default))
    if not archive.exists():
        pytest.skip(f"no archive of cifar10_jpeg at {archive}; AB_JAX_DATA_SOURCE may name one")
    return archive
