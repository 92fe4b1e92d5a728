"""Files of strangers, damaged at random: each is read, or refused by one line that names it.

Packed files have a test of their own (`tests.export.test_fuzzing`), and so have files of weights
(`tests.models.test_weight_files`).
"""

from pathlib import Path

import numpy as np
import pytest

from tests.mutants import KINDS, Found, read_mutants

# Mutants of each kind, and how many may end the process. Runtimes that check little of what a file
# claims die over some, and `experiments.classify` says so; nothing of our own does.
COUNTS = {
    "onnx": (600, 3),
    "tflite": (1000, 12),
    "jpeg": (1000, 0),
    "png": (800, 0),
    "webp": (1000, 0),
    "bmp": (1000, 0),
    "tar": (500, 0),
    "tar.gz": (1000, 0),
    "zip": (1000, 0),
}
LONG = {
    "stablehlo": (300, 40),
    "tar.xz": (3000, 0),
    "tar.bz2": (3000, 0),
    **{kind: (10_000, 10 * deaths) for kind, (_, deaths) in COUNTS.items()},
}


def check(kind: str, directory: Path, rng: np.random.Generator, count: int, deaths: int) -> Found:
    seed = int(rng.integers(2**32))
    found = read_mutants(kind, directory, seed, count, seconds=count / 10 + 60)
    assert found.outcomes.keys() <= {"read", "refused"}, f"seed {seed}"
    assert found.outcomes["refused"] > count / 10
    assert len(found.deaths) <= deaths, f"seed {seed}: {found.deaths}"
    assert found.outcomes.total() + len(found.deaths) == count
    assert found.slowest < 5
    return found


@pytest.mark.parametrize("kind", COUNTS)
def test_mutants_are_refused_by_a_line_or_read(
    kind: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    check(kind, tmp_path, rng, *COUNTS[kind])


@pytest.mark.long
@pytest.mark.parametrize("kind", LONG)
def test_many_mutants_are_refused_by_a_line_or_read(
    kind: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    check(kind, tmp_path, rng, *LONG[kind])


def test_every_kind_is_read() -> None:
    assert KINDS.keys() == LONG.keys()
