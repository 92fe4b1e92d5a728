"""How many bytes a run's network takes, in float and packed, from the flags in its record."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

import ab_jax as ab
from experiments.exporting.networks import rebuilt
from experiments.reporting.readings import Record

# Classes and image shape where a record of older code does not tell them.
_CIFAR10 = 10, [32, 32, 3]
_KNOWN = {"cifar10": _CIFAR10, "cifar10_jpeg": _CIFAR10, "digits": (10, [8, 8, 1])}


def packed_size(record: Record) -> tuple[int, int] | None:
    """Bytes of the parameters, as trained and with codes at their true width and their scales.

    Nothing is computed, shapes suffice. The means and variances of batch norm are not counted: they
    fold into its scale and shift, which are. None for a record of which the network is not known.
    """
    classes, shape = _images(record)
    if "network" not in record.config or shape is None:
        return None
    description = {
        "experiment": record.experiment,
        "config": dict(record.config),
        "classes": classes,
        "image_shape": shape,
    }
    try:
        model, rules, _ = rebuilt(description)
    except ValueError:  # flags of older or newer code
        return None
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    init = functools.partial(model.init, train=False)
    variables = jax.eval_shape(lambda x: init(jax.random.key(0), x), images)
    rows = ab.describe(variables["params"], rules).rows
    return sum(row.bytes_before for row in rows), sum(row.bytes_after for row in rows)


def _images(record: Record) -> tuple[Any, list[int] | None]:
    known = _KNOWN.get(str(record.config.get("dataset")), (None, None))
    classes, shape = record.data.get("classes", known[0]), record.data.get("image_shape", known[1])
    size = record.config.get("image_size")
    return classes, shape if shape is None or size is None else [size, size, shape[-1]]
