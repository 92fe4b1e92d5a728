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

# Goes up when the same files become other pixels: 2 since 16 bits and orientation are heeded.
_DECODING = 2


def cached(path: Path, make: Callable[[], Images]) -> Images:
    """The images in `path`, or else those that `make` returns, which are then written there.

    The file appears complete or not at all, so that any number of processes may do this at once. In
    a directory that cannot be written nothing is kept, which costs only time. A damaged file is
    written anew.

    Args:
      path: a `.npz` file, whose name must say everything that the images depend on.
      make: decodes the images.
    """
    if (kept := _read(path)) is not None:
        return kept
    images = make()
    with contextlib.suppress(OSError):
        _write(path, images)
    return images


def _read(path: Path) -> Images | None:
    """What `_write` wrote; None if there is no such file, or a damaged or outdated one."""
    # There is no list of what zip files and NumPy raise over damaged bytes, and the images can be
    # had again. Zip files have checksums, so that no changed pixel is read.
    with contextlib.suppress(Exception), path.open("rb") as file, np.load(file) as arrays:
        if arrays["decoding"] == _DECODING:
            return Images(arrays["images"], arrays["labels"])
    return None


def _write(path: Path, images: Images) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            np.savez(file, decoding=_DECODING, images=images.images, labels=images.labels)
            file.flush()
            # Temporary files are made for their owner alone; this one is for whoever reads the
            # records beside it.
            os.fchmod(file.fileno(), 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
