"""Steps of one network under all libraries, timed in turns."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.peers.gradients import ALPHA
from experiments.peers.libraries import LIBRARIES, Bits, is_comparable
from experiments.peers.steps import Compiled, State, compile_step

FLOAT = "float"


def time_steps(
    model: nn.Module,
    libraries: Sequence[str],
    quantized: Sequence[Bits],
    images: Array,
    labels: Array,
    rounds: int,
    seed: int,
) -> list[dict[str, Any]]:
    """One step of each library and bits in each round, in an order drawn anew.

    Args:
      model: a Linen network.
      libraries: names of `LIBRARIES`; the first is float, and
        float, which has no bits, is compiled once.
      quantized: the bits of the others.
      images, labels: the batch of every step.
      rounds: measurements of each, after a round to warm up.
      seed: of the orders.

    Returns:
      For each `library`, `bits`, and either `raises`, or `compile_seconds`, `peak_bytes`, and by
      round `seconds` and `processor_seconds`, the latter of all cores together.
    """
    cases = [
        (name, FLOAT if name.startswith(FLOAT) else str(bits), bits)
        for name in libraries
        for bits in (quantized[:1] if name.startswith(FLOAT) else quantized)
        if is_comparable(name, bits)
    ]
    found: dict[int, dict[str, Any]] = {}
    steps: dict[int, Compiled] = {}
    states: dict[int, State] = {}
    for i, (name, label, bits) in enumerate(cases):
        found[i] = {"library": name, "bits": label}
        try:
            if label == FLOAT and i:  # the same program, from a state of its own
                steps[i] = dataclasses.replace(steps[0], state=jax.tree.map(jnp.copy, states[0]))
            else:
                applied = LIBRARIES[name](model, bits)
                steps[i] = compile_step(applied, images, labels, ALPHA.get(name, 1.0))
        except Exception as error:  # whatever a library raises is what is to be told
            found[i]["raises"] = in_short(error)
            continue
        states[i] = steps[i].state
        found[i] |= {
            "compile_seconds": steps[i].compile_seconds,
            "peak_bytes": steps[i].peak_bytes,
            "seconds": [],
            "processor_seconds": [],
        }
    rng = np.random.default_rng(seed)
    for number in range(rounds + 1):
        for i in rng.permutation(list(steps)):
            started = time.perf_counter(), time.process_time()
            states[i], _ = jax.block_until_ready(steps[i].step(states[i], images, labels))
            took = time.perf_counter() - started[0], time.process_time() - started[1]
            if number:  # the first round warms up
                found[i]["seconds"].append(took[0])
                found[i]["processor_seconds"].append(took[1])
    return list(found.values())


def in_short(error: Exception) -> str:
    """The kind of an error and how its message begins, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
