"""English text that is on every machine with Python: the help on its language, as bytes.

`pydoc_data.topics` of the standard library holds what `help("for")` and its like show: about 450 KB
of prose and grammar, without any download and free to use. It repeats whole passages under several
topics, and a network tested on what it was trained on would look better than it is: so each
paragraph is kept once, where it stands first. That leaves about 370 KB. The text differs a little
between versions of Python, and a record holds its length and SHA-256.

Source: the Python documentation, shipped with CPython under the PSF license.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

BLOCKS = 20
VALIDATION = (4, 14)  # of the blocks
TEST = (9, 19)


@dataclasses.dataclass(frozen=True)
class Text:
    """Bytes as uint8 arrays; `facts` are JSON values on where they come from."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    facts: Mapping[str, Any]


def load_text() -> Text:
    """Python's topics, each paragraph once, in alphabetical order of the topics."""
    from pydoc_data.topics import topics  # half a megabyte, which only this wants

    return split(without_repetitions(topics[name] for name in sorted(topics)))


def without_repetitions(pages: Iterable[str]) -> str:
    """The paragraphs of all pages, each where it stands first; spaces do not tell two apart."""
    seen: dict[str, str] = {}
    for page in pages:
        for paragraph in page.split("\n\n"):
            seen.setdefault(" ".join(paragraph.split()), paragraph.strip("\n"))
    seen.pop("", None)
    return "\n\n".join(seen.values())


def split(text: str) -> Text:
    """Cut UTF-8 bytes into `BLOCKS` contiguous blocks, two for validation and two for the test.

    Raises:
      ValueError: a text of fewer bytes than blocks.
    """
    data = text.encode()
    if len(data) < BLOCKS:
        raise ValueError(f"A text of {len(data)} bytes cannot be cut into {BLOCKS} blocks.")
    blocks = np.array_split(np.frombuffer(data, np.uint8), BLOCKS)
    parts = {
        "train": [i for i in range(BLOCKS) if i not in (*VALIDATION, *TEST)],
        "validation": VALIDATION,
        "test": TEST,
    }
    arrays = {name: np.concatenate([blocks[i] for i in part]) for name, part in parts.items()}
    facts = {
        "text": "pydoc_data.topics, each paragraph once",
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        **{f"{name}_bytes": len(array) for name, array in arrays.items()},
        "unigram_bits_per_byte": unigram_entropy(arrays["train"], arrays["test"]),
    }
    return Text(**arrays, facts=facts)


def unigram_entropy(train: np.ndarray, test: np.ndarray) -> float:
    """Bits per byte of `test` under the frequencies of `train`, each byte counted once more.

    What a model reaches that knows how frequent each byte is and nothing of its neighbours.
    """
    counts = np.bincount(train, minlength=256) + 1
    return float(-np.log2(counts / counts.sum())[test].mean())


def draw(part: np.ndarray, count: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """int32 [count, length]: stretches that begin anywhere."""
    starts = rng.integers(len(part) - length + 1, size=count)
    return part[starts[:, None] + np.arange(length)].astype(np.int32)


def windows(part: np.ndarray, count: int, context: int) -> tuple[np.ndarray, np.ndarray]:
    """All of a part, in batches: every byte but the first is predicted exactly once.

    Returns:
      int32 [batches, count, context + 1], and float32 weights [batches, count, context] of the
      predicted bytes: 1, or 0 where the last stretch and the last batch are filled up.
    """
    targets = len(part) - 1
    batches = -(-targets // (count * context))
    padded = np.zeros(batches * count * context + 1, np.int32)
    padded[: len(part)] = part
    starts = np.arange(batches * count) * context
    stretches = padded[starts[:, None] + np.arange(context + 1)]
    weights = (np.arange(batches * count * context) < targets).astype(np.float32)
    return (
        stretches.reshape(batches, count, context + 1),
        weights.reshape(batches, count, context),
    )
