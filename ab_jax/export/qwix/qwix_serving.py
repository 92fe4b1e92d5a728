"""Serving by Qwix: a Linen model whose layers compute with our codes, by Qwix's kernels.

    variables = to_qwix({"params": quantize(params, rules), **state})
    inputs = input_codes(variables, input_rules, layer_paths(model, images, train=False))
    served, variables = serve(model, variables, images, inputs=inputs, train=False)
    logits = served.apply(variables, images, train=False)

The model is put into Qwix's PTQ mode (`qwix.PtqProvider`), as any Linen model is, and gets our
codes, scales and static ranges where Qwix would have computed its own. A layer

- whose input is quantized multiplies integers (int8 by int8, summed in int32) and scales the sum;
- whose input stays in float multiplies by the value of its codes (`qwix.dot_general` and
  `qwix.conv_general_dilated` dequantize, which XLA fuses with the product).

Inputs of 8 bits without sign are stored less 128, since a convolution takes int8 alone, and Qwix
then subtracts the convolution of that zero point: a second one. Inputs with a sign, or of 7 bits
and less, need none.

Static ranges of Qwix do not clip: an input is rounded to the values of its codes before its layer,
and Qwix then finds the very same codes.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import qwix
from flax.traverse_util import flatten_dict, unflatten_dict

from ab_jax.export.qwix.qwix_arrays import InputCodes
from ab_jax.linen import RANGES, Model, module_of

_CONVOLUTIONS = (nn.Conv,)
_PRODUCTS = (nn.Dense, nn.DenseGeneral)
_LOWEST = -128  # of int8


def serve(
    model: Model,
    variables: Mapping[str, Any],
    *args: Any,
    inputs: Mapping[str, InputCodes] | None = None,
    **kwargs: Any,
) -> tuple["ServedModel", dict[str, Any]]:
    """The model in Qwix's PTQ mode, and its variables as it then takes them.

    Args:
      model: a Linen module, or `WithQuantizedInputs` of one, whose Dense, DenseGeneral
        and Conv layers compute by `jax.lax.dot_general` and `jax.lax.conv_general_dilated` (so ours
        are made with `cpu_convolutions=False`).
      variables: of the model, with `qwix.QArray` where a kernel is quantized.
      *args, **kwargs: of its `__call__`; arrays may be `jax.ShapeDtypeStruct`. Nothing is computed.
      inputs: the codes of the layers' inputs by path; other layers' inputs stay in float.

    Returns:
      A model and variables for `model.apply(variables, *args, **kwargs)`.

    Raises:
      ValueError: codes that Qwix's kernels cannot compute with, or those of inputs in a loop
        (`nn.RNN`); names the parameter and the fix.
    """
    inputs = dict(inputs or {})
    model = module_of(model)
    variables = nn.unbox(dict(variables))  # what says where arrays lie is no part of them
    variables = {name: x for name, x in variables.items() if name != RANGES}
    params = flatten_dict(dict(variables["params"]))
    layers = _layers(model, args, kwargs)
    kernels = {keys[:-1]: (keys[-1], leaf) for keys, leaf in params.items() if _is_qarray(leaf)}
    for module, (name, kernel) in kernels.items():
        path = "/".join(module)
        _check(f"{path}/{name}", kernel, layers.get(path), inputs.get(path))
        params[*module, name] = _by_layer(kernel, layers[path].rank)
    if unused := sorted(inputs.keys() - {"/".join(module) for module in kernels}):
        raise ValueError(
            f"The input of {unused[0]} has codes, but its kernel has none, and Qwix multiplies "
            f"integers with integers. Quantize that kernel, or leave the layer out of `inputs`."
        )

    def rules(float_inputs: Any) -> list[qwix.QuantizationRule]:
        return [
            _rule("/".join(module), kernel.qvalue.dtype, inputs.get("/".join(module)), float_inputs)
            for module, (_, kernel) in kernels.items()
        ]

    # The form of the parameters is Qwix's own, of a model that it quantizes from the start. There
    # it takes no convolution whose input stays in float: give that one codes, only for the form.
    blank = qwix.quantize_model(model, qwix.PtqProvider(rules(jnp.int8)))
    try:
        form = nn.unbox(
            jax.eval_shape(lambda: blank.init(jax.random.key(0), *_zeros(args), **kwargs))
        )
    except Exception as error:
        lifted = [path for path in inputs if path in layers and layers[path].lifted]
        if not lifted:
            raise
        raise ValueError(
            f"The input of {lifted[0]} has codes, but this layer lies within nn.scan, nn.RNN or "
            f"another lifted transformation, which Qwix's static ranges do not enter. "
            f"Leave it out of `inputs`, or export a StableHLO program."
        ) from error
    filled = {}
    for keys, leaf in flatten_dict(form["params"]).items():
        codes = inputs.get("/".join(keys[:-1]))
        if keys in params:
            filled[keys] = _fitting("/".join(keys), params[keys], leaf)
        elif codes is not None and keys[-1].endswith("_scale"):
            filled[keys] = leaf.replace(array=_scales("/".join(keys), codes, leaf.shape))
        elif codes is not None and keys[-1].endswith("_zero_point"):
            filled[keys] = jnp.full(leaf.shape, _LOWEST, leaf.dtype)
        else:
            raise ValueError(f"The variables lack the parameter {'/'.join(keys)} of the model.")
    served = qwix.quantize_model(model, _Provider(rules(None)))
    return ServedModel(served, inputs), {**variables, "params": unflatten_dict(filled)}


@dataclasses.dataclass(frozen=True, eq=False)  # known by itself, for `jax.jit`
class ServedModel:
    """A model in Qwix's PTQ mode.

    Attributes:
      model: as Qwix makes it.
      inputs: the codes of the layers' inputs by path.
    """

    model: nn.Module
    inputs: Mapping[str, InputCodes]

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """What the model gives; the arguments are those of `flax.linen.Module.apply`."""
        with nn.intercept_methods(self._to_codes):
            return self.model.apply(variables, *args, **kwargs)

    def _to_codes(self, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        """Calls a layer with the values of the codes of its input."""
        module = context.module
        is_layer = isinstance(module, (*_CONVOLUTIONS, *_PRODUCTS))
        codes = self.inputs.get("/".join(module.path))
        if context.method_name != "__call__" or not is_layer or codes is None:
            return call(*args, **kwargs)
        x, *rest = args or (kwargs.pop("inputs"),)
        limits = jnp.atleast_1d(jnp.asarray(codes.limit, jnp.float32))
        limit = limits[0]
        if limits.size > 1:  # of a stack that of the layer whose turn it is, known by its scale
            own = module.variables["params"]
            (scale,) = [own[name].array for name in own if name.endswith("_lhs_scale")]
            scale = scale.reshape(())
            limit = limits[jnp.argmin(jnp.abs(codes.quantizer.scale(limits) - scale))]
        return call(codes.quantizer(x, limit, 1.0), *rest, **kwargs)


class _Provider(qwix.PtqProvider):
    """Qwix's own, which also takes a convolution by codes whose input stays in float.

    Qwix has the kernel for that one, but does not let a rule lead to it.
    """

    def conv_general_dilated(self, lhs: Any, rhs: Any, *args: Any, **kwargs: Any) -> jax.Array:
        rule, _ = self._get_current_rule_and_op_id("conv_general_dilated", only_rule=True)
        if rule is not None and rule.act_qtype is None:
            return qwix.conv_general_dilated(lhs, rhs.array, *args, **kwargs)
        return super().conv_general_dilated(lhs, rhs, *args, **kwargs)


@dataclasses.dataclass(frozen=True)
class _Layer:
    kind: type[nn.Module]
    dtype: jnp.dtype  # what it computes in
    rank: int  # of its kernel, as the layer sees it
    lifted: bool  # whether it is called within `nn.scan` or the like


def _layers(model: nn.Module, args: Any, kwargs: Any) -> dict[str, _Layer]:
    """The layers that a call of the model runs, by path."""
    seen: dict[str, _Layer] = {}
    roots: list[Any] = []  # outermost scopes: Flax makes another one within what it lifts

    def note(call: Any, inputs: Any, named: Any, context: Any) -> Any:
        module = context.module
        scope = module.scope
        assert scope is not None, "a module that is called is bound"
        roots.append(scope.root)
        y = call(*inputs, **named)
        if context.method_name == "__call__" and isinstance(module, (*_CONVOLUTIONS, *_PRODUCTS)):
            x = inputs[0] if inputs else named["inputs"]
            dtype = jnp.dtype(x.dtype if module.dtype is None else module.dtype)
            kernel = nn.unbox(scope.get_variable("params", "kernel"))
            lifted = scope.root is not roots[0]
            seen["/".join(module.path)] = _Layer(type(module), dtype, kernel.ndim, lifted)
        return y

    with nn.intercept_methods(note):
        jax.eval_shape(lambda: model.init(jax.random.key(0), *_zeros(args), **kwargs))
    return seen


def _zeros(args: Any) -> Any:
    """The arguments with arrays for their shapes, to be traced."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) if hasattr(x, "shape") else x, args)


def _check(name: str, kernel: qwix.QArray, layer: _Layer | None, codes: InputCodes | None) -> None:
    """Refuse what Qwix would fail at, or compute otherwise, later on."""
    if layer is None:
        raise ValueError(
            f"{name} has codes, but it is no kernel of a Dense, DenseGeneral or Conv layer that "
            f"the model calls. Hand over its value (ab_jax.dequantize) instead."
        )
    if codes is None:  # it is dequantized, whatever its scales
        return
    if layer.dtype != jnp.float32:
        raise ValueError(
            f"The layer of {name} computes in {layer.dtype}, in which Qwix would round the scale "
            f"of its input's codes. Make the model with dtype=float32: products are of integers."
        )
    lowest, highest = codes.quantizer.levels
    if kernel.qvalue.dtype == jnp.int4 and not -8 <= lowest <= highest <= 7:
        raise ValueError(
            f"{name} has codes of int4, but its input codes from {lowest} to {highest}, and Qwix "
            f"multiplies integers of one type. Hand the codes over as int8 (int4=False)."
        )
    one_by_channel = all(size == 1 for size in kernel.scale.shape[-layer.rank : -1])
    one_by_channel &= kernel.scale.shape[-1] in (1, kernel.shape[-1])
    fix = "Leave this layer out of `inputs`, or quantize its kernel"
    if issubclass(layer.kind, _CONVOLUTIONS) and not one_by_channel:
        raise ValueError(
            f"{name} has scales of shape {kernel.scale.shape}, but Qwix's convolution of integers "
            f"takes one of the last axis or one in all. {fix} with axis=-1 and without groups."
        )
    shifted = _shifted(codes) or issubclass(layer.kind, _CONVOLUTIONS)
    if kernel.zero_point is not None and shifted:
        raise ValueError(
            f"{name} has zero points, which Qwix does not take in a convolution of integers, nor "
            f"in a product with inputs of 8 bits without sign. {fix} with symmetric levels."
        )


def _shifted(codes: InputCodes) -> bool:
    """Whether the codes only fit into 8 bits with sign once they are shifted."""
    return codes.quantizer.levels[1] > -_LOWEST - 1


def _rule(
    path: str, dtype: jnp.dtype, codes: InputCodes | None, float_inputs: Any
) -> qwix.QuantizationRule:
    """Qwix's rule for a layer; `float_inputs`: the type of those that have no codes of ours."""
    if codes is None:
        return qwix.QuantizationRule(
            module_path=re.escape(path), weight_qtype=float_inputs or dtype, act_qtype=float_inputs
        )
    return qwix.QuantizationRule(
        module_path=re.escape(path),
        weight_qtype=dtype,
        act_qtype=dtype,
        act_static_scale=True,
        act_calibration_method="minmax" if _shifted(codes) else "absmax",
    )


def _by_layer(kernel: qwix.QArray, rank: int) -> qwix.QArray:
    """The kernel with scales for each layer of a stack, as `nn.scan` wants to slice them."""

    def repeated(per_block: Any) -> Any:
        for i in range(kernel.qvalue.ndim - rank):
            times = kernel.qvalue.shape[i] // per_block.shape[i]
            per_block = jnp.repeat(per_block, times, axis=i)
        return per_block

    parts = {"scale": kernel.scale, "zero_point": kernel.zero_point}
    return dataclasses.replace(
        kernel, **{name: repeated(x) for name, x in parts.items() if x is not None}
    )


def _scales(name: str, codes: InputCodes, shape: tuple[int, ...]) -> jax.Array:
    """The scales of a layer's input, of the shape that Qwix has for them."""
    scale = codes.quantizer.scale(jnp.asarray(codes.limit, jnp.float32))
    if scale.ndim and scale.shape != shape[:1]:
        raise ValueError(
            f"The codes of the input of {name.rpartition('/')[0]} have {scale.size} ranges, which "
            f"do not fit the model's {name}, of shape {shape}."
        )
    return jnp.broadcast_to(scale.reshape(*scale.shape, *(1,) * (len(shape) - scale.ndim)), shape)


def _fitting(name: str, value: Any, wanted: Any) -> Any:
    """A parameter in the place of Qwix's own."""
    if value.shape[1:] == wanted.shape:
        raise ValueError(
            f"{name} is a stack of {value.shape[0]} layers, of which Qwix sees one: it takes "
            f"nn.scan within a module, but not as the model. Make a module that calls it."
        )
    if value.shape != wanted.shape:
        raise ValueError(f"{name} is of shape {value.shape}, and of {wanted.shape} in the model.")
    if not _is_qarray(value):
        return value
    if not hasattr(wanted, "how"):  # Qwix saw no product with it
        raise ValueError(
            f"{name} has codes, but its layer computes by functions of its own, not by those of "
            f"jax.lax. Make the model without them: cpu_convolutions=False in ours."
        )
    return wanted.replace(array=value)


def _is_qarray(leaf: Any) -> bool:
    return isinstance(leaf, qwix.QArray)
