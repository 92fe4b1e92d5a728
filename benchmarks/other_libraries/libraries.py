"""One Linen network under each library: float, ours, Qwix and AQT, with the same bits and layers.

Every library is applied as its documentation tells its users to, at its own defaults but for the
bits. They agree in what is quantized (kernels per output channel, inputs of Conv and Dense, both
symmetric, the largest magnitude at the end of the range) and differ in three things:

- the scale: ours puts the largest magnitude on the last code, Qwix and AQT half a step beyond it;
- ranges of activations: ours one a tensor, a running maximum; Qwix and AQT one an image, of the
  moment;
- signs: ours has unsigned codes behind a ReLU, so one bit more for the same width.
"""

import dataclasses
import importlib.metadata
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import qwix
from aqt.jax.v2 import aqt_conv_general, aqt_quantizer
from aqt.jax.v2 import config as aqt_config
from aqt.jax.v2.flax import aqt_flax
from jax import Array, lax
from jax.typing import ArrayLike

import ab_jax as ab
from ab_jax.activations import ActivationQuantizer
from ab_jax.linen import Model, WithQuantizedInputs
from ab_jax.products import ActivationRules

Variables = Any  # Flax's collections by name


@dataclasses.dataclass(frozen=True)
class Bits:
    """How many bits the weights have, and the activations; None: these stay in float."""

    weights: int
    activations: int | None = None

    def __str__(self) -> str:
        return f"W{self.weights}" + (f"A{self.activations}" if self.activations else "")


@dataclasses.dataclass(frozen=True)
class Applied:
    """A network under a library.

    Attributes:
      init: `(key, images) -> variables`, with whatever collections the library adds.
      apply: `(variables, images, train, alpha) -> (logits, changed collections)`; alpha is heeded
        by ours alone.
    """

    init: Callable[[Array, Array], Variables]
    apply: Callable[[Variables, Array, bool, ArrayLike], tuple[Array, Variables]]


#: From a network (its `__call__` takes images and `train`) and bits to the network applied.
Library = Callable[[nn.Module, Bits], Applied]


def _plain(model: Model) -> Applied:
    """A model whose `__call__` has all that happens in it."""

    def apply(
        variables: Variables, images: Array, train: bool, alpha: ArrayLike
    ) -> tuple[Array, Variables]:
        mutable = [name for name in variables if name != "params"] if train else []
        with_inputs = isinstance(model, WithQuantizedInputs)
        call: dict[str, Any] = {"alpha": alpha} if with_inputs else {}
        logits, changed = model.apply(variables, images, train=train, mutable=mutable, **call)
        return logits, changed

    return Applied(lambda key, images: model.init(key, images, train=True), apply)


def in_float(model: nn.Module, bits: Bits) -> Applied:
    """Nothing quantized: what the others are compared with."""
    return _plain(model)


def by_ab(estimator: ab.Estimator, scale: Literal["absmax", "least_squares"] = "absmax") -> Library:
    """Ours: kernels blended in the loss, those of the inputs of products quantized.

    `scale` is that of the kernels; `least_squares`, which the peers do not have, is our default.
    """

    def apply_library(model: nn.Module, bits: Bits) -> Applied:
        kernels = ab.Uniform(bits=bits.weights, scale=scale)
        rules = ab.Rules([(r"(.*/)?kernel", kernels), (r".*", None)])
        plain = _plain(model)
        if bits.activations is not None:
            quantizer = ActivationQuantizer(bits=bits.activations, signed=False)
            signed = dataclasses.replace(quantizer, signed=True)  # images have both signs
            inputs = ActivationRules([(r"stem|conv0", signed), (r".*", quantizer)])
            plain = _plain(WithQuantizedInputs(model, inputs))

        def apply(
            variables: Variables, images: Array, train: bool, alpha: ArrayLike
        ) -> tuple[Array, Variables]:
            effective = ab.blend(variables["params"], rules, alpha, estimator=estimator)
            return plain.apply({**variables, "params": effective}, images, train, alpha)

        return Applied(plain.init, apply)

    return apply_library


def by_qwix(model: nn.Module, bits: Bits) -> Applied:
    """Qwix's quantized training: `QtProvider`, its rules, the model wrapped."""
    return _plain(qwix.quantize_model(model, qwix.QtProvider([_qwix_rule(bits)])))


def by_qwix_odml(model: nn.Module, bits: Bits) -> Applied:
    """Qwix's fake quantization for LiteRT; see `is_comparable`."""
    return _plain(qwix.quantize_model(model, qwix.OdmlQatProvider([_qwix_rule(bits)])))


def _qwix_rule(bits: Bits) -> qwix.QuantizationRule:
    activations = None if bits.activations is None else f"int{bits.activations}"
    return qwix.QuantizationRule(weight_qtype=f"int{bits.weights}", act_qtype=activations)


def by_aqt(model: nn.Module, bits: Bits) -> Applied:
    """AQT's layers for Flax, `AqtConvGeneralDilated` and `AqtDotGeneral`, in every Conv and Dense.

    Kernels of convolutions get no gradient (aqtp 0.9.0); see docs/peers.md.
    """
    config = aqt_config.default_unquantized_config()
    config.fwd = aqt_conv_general.conv_general_dilated_make(2, bits.activations, bits.weights)
    return _injected(model, lambda: aqt_flax.AqtConvGeneralDilated(config, prng_name=None), bits)


def by_aqt_mended(model: nn.Module, bits: Bits) -> Applied:
    """AQT's quantizers, with the gradient of a convolution led past them by hand."""
    quantizers = aqt_conv_general.conv_general_dilated_make(
        2, bits.activations, bits.weights
    ).dg_quantizer
    return _injected(model, lambda: _conv_past(quantizers, bits), bits)


def _conv_past(quantizers: Any, bits: Bits) -> Callable[..., Array]:
    def past(x: Array, quantizer: Any) -> Array:
        values = aqt_quantizer.make_fake_quant(quantizer)(lax.stop_gradient(x))
        return x + lax.stop_gradient(values - x)

    def conv(lhs: Array, rhs: Array, *args: Any, **kwargs: Any) -> Array:
        if bits.activations is not None:
            lhs = past(lhs, quantizers.lhs)
        return lax.conv_general_dilated(lhs, past(rhs, quantizers.rhs), *args, **kwargs)

    return conv


def _injected(model: nn.Module, conv: Callable[[], Any], bits: Bits) -> Applied:
    """The model with AQT in its layers.

    AQT's users pass `conv_general_dilated_cls` and `dot_general_cls` where they make a layer. Here
    the layers get them just before they are called, since the networks are not ours to rewrite for
    each library.
    """
    config = aqt_config.default_unquantized_config()  # the backward pass in float
    aqt_config.set_bits(config, bits.activations, bits.weights, None, None, None, None)

    def inject(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name == "__call__":
            # A layer is made anew in each call of the model: nothing of this stays.
            if isinstance(context.module, nn.Conv):
                object.__setattr__(context.module, "conv_general_dilated_cls", conv)
            elif isinstance(context.module, nn.Dense):
                object.__setattr__(
                    context.module,
                    "dot_general_cls",
                    lambda: aqt_flax.AqtDotGeneral(config, prng_name=None),
                )
        return call(*args, **kwargs)

    plain = _plain(model)

    def init(key: Array, images: Array) -> Variables:
        with nn.intercept_methods(inject):
            return plain.init(key, images)

    def apply(
        variables: Variables, images: Array, train: bool, alpha: ArrayLike
    ) -> tuple[Array, Variables]:
        with nn.intercept_methods(inject):
            return plain.apply(variables, images, train, alpha)

    return Applied(init, apply)


FLOAT = "float"
#: By the name in tables. Float runs twice: the second is the control.
LIBRARIES: dict[str, Library] = {
    FLOAT: in_float,
    "float, again": in_float,
    "ab_jax, AB": by_ab(ab.alpha_blend),
    "ab_jax, STE": by_ab(ab.straight_through),
    "Qwix": by_qwix,
    "Qwix ODML": by_qwix_odml,
    "AQT": by_aqt,
    "AQT, mended": by_aqt_mended,
}


def is_comparable(library: str, bits: Bits) -> bool:
    """Whether a library quantizes what the others do with these bits.

    Qwix ODML does with weights alone: of activations it quantizes what operations give out, all of
    them, and not what layers take in.
    """
    return bits.activations is None or library != "Qwix ODML"


def peer_versions() -> dict[str, str]:
    """What the peers' packages are, for a record."""
    return {name: importlib.metadata.version(name) for name in ("qwix", "aqtp")}


def loss(logits: Array, labels: Array) -> Array:
    """Mean cross-entropy of logits [batch, classes] and int32 labels [batch]."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
    return -jnp.mean(chosen)
