"""Decoded images kept beside their records, since decoding CIFAR-10 takes ten seconds.

A study starts dozens of processes that all want the same pixels; the first one writes them.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ab_jax.data.dataset import Images


def cached(path: Path, make: Callable[[], Images]) -> Images:
    """The images in `path`, or else those that `make` returns, which are then written there.

    The file appears complete or not at all, so that any number of processes may do this at once. In
    a directory that cannot be written nothing is kept, which costs only time.

    Args:
      path: a `.npz` file, whose name must say everything that the images depend on.
      make: decodes the images.
    """
    if path.exists():
        with np.load(path) as arrays:
            return Images(arrays["images"], arrays["labels"])
    images = make()
    with contextlib.suppress(OSError):
        _write(path, images)
    return images


def _write(path: Path, images: Images) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            np.savez(file, images=images.images, labels=images.labels)
            file.flush()
            # Temporary files are made for their owner alone; this one is for whoever reads the
            # records beside it.
            os.fchmod(file.fileno(), 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
