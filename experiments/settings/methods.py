"""The methods that train a network to low precision: one record each, and nothing elsewhere.

A method added to `METHODS` is a value of --method, in its help, in every table and every plot.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import optax

import ab_jax as ab
from experiments.settings.choices import choose, is_elsewhere, load_elsewhere
from experiments.settings.config import FlagError

_RAMP = frozenset({"ramp", "ramp_start", "ramp_stop", "act_start", "act_stop"})
_STOP = frozenset({"ramp_stop", "act_stop"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """How a network gets from float to few bits.

    Attributes:
      label: its name in tables and plots.
      help: a few words for the command line.
      estimator: what the loss sees of a weight.
      alpha: how far the weights have moved towards their levels: not at all (`zero`), wholly
        (`one`), from one to the other at the ramp's stop (`jump`), along the ramp (`ramp`), or
        along it one layer after another (`layerwise`).
      ramp: the ramp's shape where --ramp does not say.
      own_flag: the flag that this method alone reads; its value is a part of the method's name. An
        estimator that has an argument of that name gets it.
      suffix: how the value of `own_flag` follows the label.
      colors: of its lines, on light and on dark ground; None: one that is left.
    """

    label: str
    help: str = ""
    estimator: ab.Estimator | ab.ScaledEstimator
    alpha: Literal["zero", "one", "jump", "ramp", "layerwise"] = "ramp"
    ramp: Literal["cubic", "linear", "cosine", "sigmoid", "jump"] = "cubic"
    own_flag: str | None = None
    suffix: str = " {}"
    colors: tuple[str, str] | None = None

    @property
    def unread(self) -> frozenset[str]:
        """The flags that say nothing to this method, although its records hold values."""
        ramp = {"zero": frozenset[str](), "one": frozenset[str](), "jump": _STOP}
        others = {m.own_flag for m in METHODS.values() if m.own_flag} - {self.own_flag}
        return (_RAMP - ramp.get(self.alpha, _RAMP)) | frozenset(others)


#: In the order of a table. The colours are distinct to readers with colour blindness too (the
#: palette of Okabe and Ito, lighter on dark).
METHODS: dict[str, Method] = {
    "float": Method(
        label="float",
        help="the weights as they are",
        estimator=ab.full_precision,
        alpha="zero",
        colors=("#555555", "#b4b8bc"),
    ),
    "ste": Method(
        label="STE",
        help="their quantized values",
        estimator=ab.straight_through,
        alpha="one",
        colors=("#d55e00", "#ff8a4c"),
    ),
    "soft_ste": Method(
        label="soft STE (BinaryRelax)",
        help="a blend along the ramp, with the gradient of ste",
        estimator=ab.soft_straight_through,
        colors=("#009e73", "#3dcb9f"),
    ),
    "ab": Method(
        label="AB",
        help="the blend with its own gradient",
        estimator=ab.alpha_blend,
        colors=("#0072b2", "#5bb8f5"),
    ),
    "ab_compensated": Method(
        label="AB compensated",
        help="its gradient enlarged up to --cap times",
        estimator=ab.compensated_alpha_blend,
        own_flag="cap",
        suffix=" (cap {})",
        colors=("#56b4e9", "#a8e0ff"),
    ),
    "ab_then_ste": Method(
        label="AB then STE",
        help="ab up to the ramp's stop, then ste",
        estimator=ab.alpha_blend_then_straight_through,
        colors=("#7f4fc9", "#b79bf0"),
    ),
    "float_then_ste": Method(
        label="float then STE",
        help="float up to the ramp's stop, then ste",
        estimator=ab.soft_straight_through,  # along a jump
        alpha="jump",
        colors=("#b58900", "#e6c34d"),
    ),
    "ab_layerwise": Method(
        label="AB layer by layer",
        help="ab, one layer after another (--layer_order)",
        estimator=ab.alpha_blend,
        alpha="layerwise",
        own_flag="layer_order",
        colors=("#7fa800", "#b5d94c"),
    ),
    "parq": Method(
        label="PARQ",
        help="weights drawn to the levels beside them, activations as with soft_ste",
        estimator=ab.parq,
        ramp="sigmoid",
        colors=("#cc79a7", "#f0a3cb"),
    ),
    "lsq": Method(
        label="LSQ",
        help="as ste, with the weights' scales trained too",
        estimator=ab.learned_step_size,
        alpha="one",
        colors=("#9c4a2f", "#cf8165"),
    ),
}

RAMPS: dict[str, Callable[[int, int], optax.Schedule]] = {
    "cubic": ab.cubic_ramp,
    "linear": ab.linear_ramp,
    "cosine": ab.cosine_ramp,
    "sigmoid": ab.sigmoid_ramp,
    "jump": lambda start, stop: ab.jump(start),
}


def method_of(name: str) -> Method:
    """The method of a flag's value: one of ours, or a `Method` or an estimator from elsewhere.

    Raises:
      FlagError: there is none of that name.
    """
    if not is_elsewhere(name):
        return choose("method", name, METHODS)
    found = load_elsewhere("method", name)
    if isinstance(found, Method):
        return found
    if not callable(found):
        raise FlagError(
            f"--method={name} is {found!r}: it should be an estimator, a function of w, quantizer "
            f"and alpha, or an experiments.settings.methods.Method."
        )
    return Method(label=name.partition(":")[2], estimator=found)


def estimator_of(method: Method, flags: Mapping[str, Any]) -> ab.Estimator | ab.ScaledEstimator:
    """What the loss sees of the weights, with the method's own flag if the estimator takes it."""
    own = method.own_flag
    if own is not None and own in inspect.signature(method.estimator).parameters:
        return functools.partial(method.estimator, **{own: flags[own]})
    return method.estimator


def alpha_schedule(
    method: Method, ramp: str, start: float, stop: float, steps: int
) -> optax.Schedule:
    """Alpha over the steps of a run.

    Layer by layer this is the ramp of the whole, which the activations follow.

    Args:
      ramp: one of `RAMPS`.
      start, stop: of the ramp, in parts of the run.
      steps: length of the run.

    Raises:
      ValueError: a ramp that does not stop after it starts.
    """
    if method.alpha == "zero":
        return optax.constant_schedule(0.0)
    if method.alpha == "one":
        return optax.constant_schedule(1.0)
    if method.alpha == "jump":
        return ab.jump(round(stop * steps))
    return RAMPS[ramp](round(start * steps), round(stop * steps))
