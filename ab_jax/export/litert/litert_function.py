"""LiteRT (TensorFlow Lite): any JAX function as a .tflite file, with our integers in it.

    data = function_to_litert(forward, ab.quantize(params, rules), images)
    Path("net.tflite").write_bytes(data)

The function is traced (`ab_jax.export.traced`), and each operation of its graph written by a
counterpart of its own; no converter has a say in it. The batch stays open: the interpreter can be
resized. Parameters that are codes stay codes. What has no counterpart is named, with the weight it
takes and the line of the model, before anything is written.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

import ab_jax
from ab_jax.export.litert.litert_convolutions import CONVOLUTIONS
from ab_jax.export.litert.litert_elementwise import ELEMENTWISE, Write
from ab_jax.export.litert.litert_file import LitertFile
from ab_jax.export.litert.litert_indexing import INDEXING
from ab_jax.export.litert.litert_layouts import LAYOUTS, moved_codes
from ab_jax.export.litert.litert_loops import copied, loops
from ab_jax.export.litert.litert_named import NAMED
from ab_jax.export.litert.litert_products import PRODUCTS
from ab_jax.export.litert.litert_reductions import REDUCTIONS
from ab_jax.export.litert.litert_special import SPECIAL
from ab_jax.export.litert.litert_tensors import Tensor
from ab_jax.export.litert.litert_windows import WINDOWS
from ab_jax.export.traced import (
    Operation,
    TracedFunction,
    UnknownSizeError,
    Value,
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

METADATA = "ab_jax"  # the name under which a file has its description


def function_to_litert(
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
    description: Mapping[str, Any] | None = None,
    narrowest: int = 8,
) -> bytes:
    """`f(params, *inputs)` as the bytes of a .tflite file of the inputs.

    Args:
      f: a forward function that JAX can trace.
      params: its parameters; those that `ab_jax.quantize` made codes are codes in the file.
      *inputs: examples, of which only shapes and dtypes are looked at.
      open_axes: which axes of the inputs may have any size; left out: the first, `"batch"`. See
        `ab_jax.export.traced.trace`.
      sizes: what to trace open axes at, where not any will do.
      rules, ranges, one_range_a_weight: quantize the inputs of products, as
        `ab_jax.products.quantize_inputs` does at alpha 1.
      input_names, output_names: one for each leaf of the inputs, and of what the function returns,
        in the signature `serving_default`. Left out: `input0`, `input1/cache`, `output`, by their
        paths.
      description: JSON values that travel with the file, as the entry `ab_jax` of its metadata:
        class names, say, and the mean and deviation by which images are normalized.
      narrowest: width in bits, 8, 4 or 2, below which no codes are stored: the weights of float
        operators may take 4 or 2 bits where that is enough, but XNNPACK, the interpreter's fast
        kernels, reads none but those of 8. Weights of integer operators always take 8.

    Returns:
      A file whose metadata has `quantization` beside the description, the bits of each weight that
      is codes, and of each input of a product, and `source`, what wrote it.

    Raises:
      ValueError: operations without a counterpart; what `trace` raises; names of another number;
        another width.
    """
    if narrowest not in (2, 4, 8):
        raise ValueError(f"narrowest={narrowest!r}: codes are stored at 2, 4 or 8 bits.")
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
    return graph_to_litert(
        traced,
        sizes=sizes,
        input_names=input_names,
        output_names=output_names,
        description=description,
        narrowest=narrowest,
    )


def graph_to_litert(
    traced: TracedFunction,
    *,
    sizes: Mapping[str, tuple[int, int]] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    description: Mapping[str, Any] | None = None,
    narrowest: int = 8,
) -> bytes:
    """A function that is traced, as `function_to_litert` writes it; `simplified` ones get integers.

    Raises:
      ValueError: operations without a counterpart, or names of another number.
    """
    traced = dataclasses.replace(traced, graph=with_named_functions(traced.graph, NAMED))
    graph = traced.graph
    check_carried(traced, CARRIED, "LiteRT")
    into = names_of(input_names, "input", traced.inputs)
    out = names_of(output_names, "output", traced.outputs)
    check_names(into, out)
    file = LitertFile(graph, into, sizes=sizes or {}, narrowest=narrowest)
    _write_all(file, graph.operations)
    given = [file.tensors[value].number for value in graph.inputs]
    results: dict[str, int] = {}
    for name, output in zip(out, graph.outputs, strict=True):
        tensor = file.tensor(output)
        is_own = isinstance(output, Value) and tensor.number not in (*given, *results.values())
        results[name] = (tensor if is_own else copied(file, tensor)).number
        file.rename(results[name], name)
    metadata = {
        "quantization": quantization_of(graph),
        "source": {"ab_jax": ab_jax.__version__, "jax": jax.__version__},
    }
    if description is not None:
        metadata[METADATA] = dict(description)
    return file.serialize(dict(zip(into, given, strict=True)), results, metadata)


def _write_all(file: LitertFile, operations: Sequence[Operation]) -> None:
    for operation in operations:
        if operation not in file.written:
            _write(file, operation)


def _write(file: LitertFile, operation: Operation) -> None:
    """Append an operation; those that move codes do so to the codes."""
    outer, file.stem = file.stem, operation.path or operation.primitive
    try:
        write = CARRIED[operation.primitive]
        found = None if moved_codes(file, operation, write) else write(file, operation)
    except NotCarriedError as error:
        raise refusal([f"{operation.primitive} {error}{place(operation)}"], "LiteRT") from None
    except UnknownSizeError as error:
        raise ValueError(f"{operation.primitive}{place(operation)}: {error}") from None
    if found is not None:
        tensors = [found] if isinstance(found, Tensor) else found
        file.tensors.update(zip(operation.outputs, tensors, strict=True))
    file.stem = outer


#: What is written for each primitive.
CARRIED: dict[str, Write] = {
    **ELEMENTWISE,
    **SPECIAL,
    **LAYOUTS,
    **REDUCTIONS,
    **PRODUCTS,
    **CONVOLUTIONS,
    **WINDOWS,
    **INDEXING,
    **NAMED,
    **loops(_write_all),
}
