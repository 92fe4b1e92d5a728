"""What ONNX Runtime makes of a function's file, beside what JAX makes of the function."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import onnx
import onnxruntime


def session(model: onnx.ModelProto) -> Any:
    """As users run it; on processors without VNNI without sums that saturate."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")
    data = model.SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def answers(model: onnx.ModelProto, *inputs: Any) -> list[np.ndarray]:
    """The leaves of what a file gives for these inputs."""
    running = session(model)
    leaves = jax.tree.leaves(inputs)
    names = [i.name for i in running.get_inputs()]
    return running.run(None, dict(zip(names, map(np.asarray, leaves), strict=True)))


def check_close(
    found: list[np.ndarray], wanted: Any, *, relative: float = 1e-5, absolute: float = 0.0
) -> None:
    """Each array to a tolerance relative to its largest magnitude; whole numbers exactly."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(wanted)]
    for a, b in zip(found, leaves, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        if a.dtype.kind in "biu":
            np.testing.assert_array_equal(a, b)
            continue
        a, b = a.astype(np.float64), b.astype(np.float64)
        finite = np.isfinite(b)
        np.testing.assert_array_equal(a[~finite], b[~finite])
        largest = np.abs(b[finite]).max(initial=0.0)
        tolerance = relative * largest + absolute
        np.testing.assert_allclose(a[finite], b[finite], rtol=0, atol=tolerance)


def check_mostly(found: Any, wanted: Any, plain: Any) -> None:
    """Most of what codes of inputs move lies where it should, to a tenth of how far they move it.

    A number on the border of two codes rounding may send to either, which moves what depends on it.

    Args:
      found, wanted, plain: leaves, the last without codes of inputs.
    """
    for leaves in zip(*map(jax.tree.leaves, (found, wanted, plain)), strict=True):
        a, b, c = (np.asarray(leaf, np.float64) for leaf in leaves)
        moved = b != c
        tolerance = 3e-5 * np.abs(b).max(initial=0.0)
        np.testing.assert_allclose(a[~moved], b[~moved], rtol=0, atol=tolerance)
        if moved.any():
            off, step = (np.median(np.abs(x - b)[moved]) for x in (a, c))
            assert off <= 0.1 * step + 1e-6


def evaluate(f: Callable[..., Any], *inputs: Any) -> Any:
    """By JAX, compiled cheaply, since it runs but once."""
    flags = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(f).lower(*inputs).compile(flags)(*inputs)
