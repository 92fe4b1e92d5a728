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


def evaluate(f: Callable[..., Any], *inputs: Any) -> Any:
    """By JAX, compiled cheaply, since it runs but once."""
    flags = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(f).lower(*inputs).compile(flags)(*inputs)
