"""Distillation: a float network teaches the one of few bits what to answer (arXiv 1503.02531).

The teacher has the student's architecture, and its logits are those of the same images. Temperature
1 alone: a student that starts from its teacher is near it from the first step on.
"""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from ab_jax.rules import leaves_by_path


def divergence(teacher: Array, student: Array) -> Array:
    """The Kullback-Leibler divergence KL(teacher || student), in nats, mean over a batch.

    Args:
      teacher, student: logits, float [batch, classes]. No gradient reaches the teacher's.

    Returns:
      A scalar of their dtype.
    """
    log_p, log_q = (jax.nn.log_softmax(x) for x in (jax.lax.stop_gradient(teacher), student))
    return jnp.mean(optax.losses.kl_divergence_with_log_targets(log_q, log_p))


def digest(variables: Any) -> str:
    """SHA-256 of arrays with their paths: another teacher has another one."""
    found = hashlib.sha256()
    for path, leaf in leaves_by_path(variables):
        x = np.asarray(leaf)
        found.update(f"{path} {x.dtype} {x.shape}\n".encode())
        found.update(np.ascontiguousarray(x).tobytes())
    return found.hexdigest()
