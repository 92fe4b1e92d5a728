"""What torchao's PARQ, the authors' own code, makes of fixed weights: written to references.json.

    python -m tests.against_torch.make_references

Needs torch and torchao (requirements-torch.txt) and neither JAX nor ab_jax. The tests of every day
compare with the file; `live.py` beside it compares with torchao itself, on random weights.
"""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchao.prototype.parq import LSBQuantizer, ProxPARQ

PATH = Path(__file__).with_name("references.json")
PACKAGES = ("torch", "torchao")

WEIGHTS = 30  # in a channel
START, STOP = 100, 300  # of the annealing, in steps
STEPS = (101, 150, 200, 250, 299)


def levels(weights: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Values and levels of weights float32 [channels, n] by least-squares binary quantization.

    A channel at a time, which for 2 bits is exact. (For all channels at once, torchao takes one of
    the weights for the larger scale there.)
    """
    quantizer = LSBQuantizer(optimal=bits <= 2)
    made = [quantizer.quantize(torch.from_numpy(channel), bits) for channel in weights]
    return tuple(np.stack([one[i].numpy() for one in made]) for i in range(2))


def proximal_map(
    weights: np.ndarray, rising: np.ndarray, step: int, steepness: float = 10.0
) -> tuple[np.ndarray, float]:
    """The map of weights [channels, n] with levels [channels, k] at a step, and its inverse slope.

    The annealing goes from START to STOP.
    """
    mapped = torch.from_numpy(weights.copy())
    anneal = ProxPARQ(START, STOP, steepness=steepness)
    inverse_slope = anneal.apply_(mapped, None, torch.from_numpy(rising.copy()), step, dim=-1)
    return mapped.numpy(), float(inverse_slope)


def references() -> dict[str, Any]:
    weights = np.random.default_rng(0).normal(size=(3, WEIGHTS)).astype(np.float32)
    made: dict[str, Any] = {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "weights": weights.tolist(),
        "start": START,
        "stop": STOP,
        "bits": {},
    }
    for bits in (1, 2, 3, 4):
        values, rising = levels(weights, bits)
        maps = []
        for step in STEPS:
            mapped, inverse_slope = proximal_map(weights, rising, step)
            maps.append({"step": step, "inverse_slope": inverse_slope, "mapped": mapped.tolist()})
        made["bits"][str(bits)] = {
            "values": values.tolist(),
            "levels": rising.tolist(),
            "maps": maps if bits <= 3 else [],
        }
    return made


if __name__ == "__main__":
    # Nine digits tell any two float32 apart.
    text = json.dumps(references(), indent=None, separators=(",", ":"))
    compact = json.loads(text, parse_float=lambda digits: float(f"{float(digits):.9g}"))
    PATH.write_text(json.dumps(compact, separators=(",", ":")).replace('],"', '],\n"') + "\n")
