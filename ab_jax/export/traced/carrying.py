"""What writers of files tell of a graph: what they do not carry, names, and bits."""

from collections.abc import Container, Sequence
from typing import Any

import numpy as np

from ab_jax.export.traced.functions import TracedFunction
from ab_jax.export.traced.sizes import Size
from ab_jax.export.traced.traced_graph import Codes, Graph, Operation

_MOST_TOLD = 8


class NotCarriedError(ValueError):
    """An operation that has no counterpart in the file."""


def closed(number: Any) -> int:
    """A number of an operation's parameters that is known.

    Raises:
      NotCarriedError: it depends on open axes.
    """
    if isinstance(number, Size):
        raise NotCarriedError(f"by {number}, which is open")
    return int(number)


def check_padding(padding: Sequence[Sequence[Any]]) -> None:
    """That padding is known.

    Raises:
      NotCarriedError: it depends on open axes.
    """
    for size in (size for ends in padding for size in ends if isinstance(size, Size)):
        raise NotCarriedError(
            f"with a padding of {size}, which is open (trace at multiples of its stride by sizes=, "
            f"and give the file no others, or leave the axis closed)"
        )


def check_carried(traced: TracedFunction, carried: Container[str], format_name: str) -> None:
    """Refuse operations that nothing is written for, all at once, and dtypes that there are not.

    Args:
      traced: the function.
      carried: names of the primitives that are written.
      format_name: whose file it is, for the message.

    Raises:
      ValueError: names the primitives, with their weights' paths and the lines of the model.
    """
    graph = traced.graph
    told = [
        f"{operation.primitive}{place(operation)}"
        for operation in graph.all_operations()
        if operation.primitive not in carried
    ]
    paths, values = (*traced.inputs, *traced.outputs), (*graph.inputs, *graph.outputs)
    for path, value in zip(paths, values, strict=True):
        if not isinstance(value.dtype, np.dtype) or value.dtype.kind == "c":
            told.append(f"the dtype {value.dtype} of {path or 'the output'}")
    if told:
        raise refusal(list(dict.fromkeys(told)), format_name)


def refusal(told: Sequence[str], format_name: str) -> ValueError:
    """The error that names what a format does not carry."""
    more = f"; and {len(told) - _MOST_TOLD} more" if len(told) > _MOST_TOLD else ""
    return ValueError(
        f"{format_name} has no counterpart of {'; '.join(told[:_MOST_TOLD])}{more}. Write the "
        f"function without, or leave this part out of it."
    )


def place(operation: Operation) -> str:
    """The weight that an operation takes and its line in the model, as far as they are known."""
    weight = f" of {operation.path}" if operation.path else ""
    return weight + (f", at {operation.line}" if operation.line else "")


def names_of(given: Sequence[str] | None, word: str, paths: Sequence[str]) -> list[str]:
    """Names of inputs or outputs: those that are given, or a word and their paths.

    Raises:
      ValueError: another number of names, or some that are no texts.
    """
    if given is None:
        return [
            f"{word}{path if path[:1].isdigit() else f'/{path}' if path else ''}" for path in paths
        ]
    if len(given) != len(paths):
        raise ValueError(
            f"There are {len(given)} {word} names for {len(paths)} {word}s: {', '.join(paths)}."
        )
    if not all(isinstance(name, str) and name for name in given):
        raise ValueError(f"The {word} names {list(given)} are not all texts that say something.")
    return list(given)


def check_names(into: Sequence[str], out: Sequence[str]) -> None:
    """That a file has outputs, and all names are different.

    Raises:
      ValueError: one of these does not hold.
    """
    if not out:
        raise ValueError(
            "The function returns no array, so that a file of it would have no output."
        )
    if len({*into, *out}) < len(into) + len(out):
        raise ValueError(f"The names {[*into, *out]} of inputs and outputs are not all different.")


def quantization_of(graph: Graph) -> dict[str, Any]:
    """Bits of the weights by their paths, and of the inputs of products by theirs."""
    weights: dict[str, int] = {}
    inputs: dict[str, int] = {}
    quantized: dict[Any, int] = {}
    for operation in graph.all_operations():
        if operation.primitive in ("quantize", "quantize_tokens"):
            quantized[operation.outputs[0]] = operation.params["quantizer"].bits
        for x in operation.inputs:
            if isinstance(x, Codes):
                weights[x.path] = x.bits
            elif x in quantized and operation.path:
                inputs[operation.path] = quantized[x]
    return {"weights": dict(sorted(weights.items())), "inputs": dict(sorted(inputs.items()))}
