"""ONNX: any JAX function as a file, of whatever framework its network is.

    model = function_to_onnx(forward, ab.quantize(params, rules), images)
    Path("net.onnx").write_bytes(model.SerializeToString())

The function is traced (`ab_jax.export.traced`), and each operation of its graph written by a
counterpart of its own. The batch stays open; parameters that are codes stay codes. What has no
counterpart is named, with the weight it takes and the line of the model, before anything is
written.

Files are of opset 21, the first with types of 4 bits and scales by block.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import onnx
from onnx import helper

import ab_jax
from ab_jax.export.onnx.function_convolutions import CONVOLUTIONS
from ab_jax.export.onnx.function_elementwise import ELEMENTWISE, Write
from ab_jax.export.onnx.function_file import FunctionFile, onnx_type
from ab_jax.export.onnx.function_indexing import INDEXING
from ab_jax.export.onnx.function_layouts import LAYOUTS
from ab_jax.export.onnx.function_loops import loops
from ab_jax.export.onnx.function_moves import moved_codes
from ab_jax.export.onnx.function_named import NAMED
from ab_jax.export.onnx.function_products import PRODUCTS
from ab_jax.export.onnx.function_reductions import REDUCTIONS
from ab_jax.export.onnx.function_windows import WINDOWS
from ab_jax.export.traced import (
    Operation,
    Size,
    UnknownSizeError,
    endings,
    trace,
)
from ab_jax.export.traced.carrying import (
    NotCarriedError,
    check_carried,
    check_names,
    names_of,
    place,
    quantization_of,
    refusal,
)
from ab_jax.export.traced.named_functions import with_named_functions
from ab_jax.products import ActivationRules, Range

OPSET = 21
IR_VERSION = 10


def function_to_onnx(
    f: Callable[..., Any],
    params: Any,
    *inputs: Any,
    open_axes: Sequence[Any] | None = None,
    sizes: Mapping[str, tuple[int, int]] | None = None,
    rules: ActivationRules | None = None,
    ranges: Mapping[str, Range] | None = None,
    one_range_a_weight: bool = False,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    description: Mapping[str, Any] | None = None,
    fused: bool = False,
    integer_biases: bool = False,
) -> onnx.ModelProto:
    """`f(params, *inputs)` as an ONNX model of the inputs.

    Args:
      f: a forward function that JAX can trace.
      params: its parameters; those that `ab_jax.quantize` made codes are codes in the file.
      *inputs: examples, of which only shapes and dtypes are looked at.
      open_axes: which axes of the inputs may have any size; left out: the first, `"batch"`. See
        `ab_jax.export.traced.trace`.
      sizes: what to trace open axes at, where not any will do.
      rules, ranges, one_range_a_weight: quantize the inputs of products, as
        `ab_jax.products.quantize_inputs` does at alpha 1.
      input_names, output_names: one for each leaf of the inputs, and of what the function returns.
        Left out: `input0`, `input1/cache`, `output`, by their paths.
      class_names, mean, std, description: JSON values for the model's metadata, as in `to_onnx`;
        the function itself normalizes what it is given.
      fused: whether the matrices of products with floats stand behind `DequantizeLinear`, where
        their scales allow it. ONNX Runtime then multiplies by the codes as they are
        (`MatMulNBits`), which needs less memory, and rounds activations to 8 bits, off by some
        thousandths, unless the session has `session.qdq_matmulnbits_accuracy_level` set to "0".
        Else it makes numbers of weights once, when it loads the file. Matrices that meet quantized
        inputs always stand so.
      integer_biases: whether the bias of a convolution between codes may be rounded to a whole
        number of units of its products. ONNX Runtime then computes all of it in integers
        (`QLinearConv`), which is faster, and some codes change.

    Returns:
      A model with the metadata `class_names`, `mean`, `std`, `network`, as far as they are given,
      `quantization`, the bits of each weight that is codes, and of each input of a product, and
      `source`, what wrote it. The same function gives the same bytes by
      `SerializeToString(deterministic=True)`.

    Raises:
      ValueError: operations without a counterpart; what `trace` raises; names of another number,
        of classes too.
    """
    traced = trace(
        f,
        params,
        *inputs,
        open_axes=open_axes,
        sizes=sizes,
        rules=rules,
        ranges=ranges,
        one_range_a_weight=one_range_a_weight,
    ).simplified()
    traced = dataclasses.replace(traced, graph=with_named_functions(traced.graph, NAMED))
    graph = traced.graph
    check_carried(traced, CARRIED, "ONNX")
    if class_names is not None:
        classes = graph.outputs[0].shape[-1:] if graph.outputs else ()
        if tuple(classes) != (len(class_names),):
            raise ValueError(
                f"There are {len(class_names)} class names for {classes[0] if classes else 'no'} "
                f"classes, the last axis of the first output."
            )
    into = names_of(input_names, "input", traced.inputs)
    out = names_of(output_names, "output", traced.outputs)
    check_names(into, out)
    file = FunctionFile(
        dict(zip(graph.inputs, into, strict=True)),
        endings=endings(graph),
        fused=fused,
        integer_biases=integer_biases,
    )
    for name in out:
        file.unique(name)  # before anything within is called so
    _write(file, graph.operations)
    for name, output in zip(out, graph.outputs, strict=True):
        file.nodes.append(helper.make_node("Identity", [file.name(output)], [name], name=name))
    file.finish(out)
    metadata = {
        "class_names": None if class_names is None else list(class_names),
        "mean": None if mean is None else list(mean),
        "std": None if std is None else list(std),
        "network": None if description is None else dict(description),
        "quantization": quantization_of(graph),
        "source": {"ab_jax": ab_jax.__version__, "jax": jax.__version__},
    }
    model = file.model(
        [_described(n, v) for n, v in zip(into, graph.inputs, strict=True)],
        [_described(n, v) for n, v in zip(out, graph.outputs, strict=True)],
        opset=OPSET,
        ir_version=IR_VERSION,
        metadata={name: json.dumps(value) for name, value in metadata.items() if value is not None},
    )
    model.producer_version = ab_jax.__version__
    return model


def _write(file: FunctionFile, operations: Sequence[Operation]) -> None:
    """Append operations; those that move codes do so to the codes."""
    for operation in operations:
        if operation in file.written:
            continue
        outer, file.stem = file.stem, operation.path or operation.primitive
        try:
            write = CARRIED[operation.primitive]
            names = moved_codes(file, operation, write) or write(file, operation)
        except NotCarriedError as error:
            raise refusal([f"{operation.primitive} {error}{place(operation)}"], "ONNX") from None
        except UnknownSizeError as error:
            raise ValueError(f"{operation.primitive}{place(operation)}: {error}") from None
        names = [names] if isinstance(names, str) else names
        file.names.update(zip(operation.outputs, names, strict=True))
        file.stem = outer


#: What is written for each primitive.
CARRIED: dict[str, Write] = {
    **ELEMENTWISE,
    **LAYOUTS,
    **REDUCTIONS,
    **PRODUCTS,
    **CONVOLUTIONS,
    **WINDOWS,
    **INDEXING,
    **NAMED,
    **loops(_write),
}


def _described(name: str, value: Any) -> onnx.ValueInfoProto:
    shape = [str(size) if isinstance(size, Size) else int(size) for size in value.shape]
    return helper.make_tensor_value_info(name, onnx_type(value.dtype), shape)
