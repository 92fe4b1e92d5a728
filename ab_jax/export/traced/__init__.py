"""Any JAX function as a flat graph, from which files of other runtimes are written."""

from ab_jax.export.traced.folding import times
from ab_jax.export.traced.functions import BATCH, TracedFunction, trace
from ab_jax.export.traced.sizes import Dim, OpenAxes, Shape, Size, UnknownSizeError
from ab_jax.export.traced.traced_graph import Codes, Constant, Graph, Operand, Operation, Value
from ab_jax.export.traced.weighted_products import (
    Ending,
    WeightedProduct,
    endings,
    weighted_product,
)

__all__ = [
    "BATCH",
    "Codes",
    "Constant",
    "Dim",
    "Ending",
    "Graph",
    "OpenAxes",
    "Operand",
    "Operation",
    "Shape",
    "Size",
    "TracedFunction",
    "UnknownSizeError",
    "Value",
    "WeightedProduct",
    "endings",
    "times",
    "trace",
    "weighted_product",
]
