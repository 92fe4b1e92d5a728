"""Methods, ramps and other choices by the names that they have on the command line."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import ab_jax as ab
from ab_jax.blend import AlphaSchedule
from ab_jax.quantized_inputs import layer_paths

Method = Literal[
    "float",
    "ste",
    "soft_ste",
    "ab",
    "ab_compensated",
    "ab_then_ste",
    "float_then_ste",
    "ab_layerwise",
    "parq",
    "lsq",
]
Ramp = Literal["cubic", "linear", "cosine", "sigmoid", "jump"]
LayerOrder = Literal["forward", "backward"]

ESTIMATORS: dict[str, ab.Estimator | ab.ScaledEstimator] = {
    "float": ab.full_precision,
    "ste": ab.straight_through,
    "soft_ste": ab.soft_straight_through,
    "ab": ab.alpha_blend,
    "ab_compensated": ab.compensated_alpha_blend,
    "ab_then_ste": ab.alpha_blend_then_straight_through,
    "float_then_ste": ab.soft_straight_through,  # along a jump
    "ab_layerwise": ab.alpha_blend,
    "parq": ab.parq,
    "lsq": ab.learned_step_size,
}

RAMPS: dict[str, Callable[[int, int], optax.Schedule]] = {
    "cubic": ab.cubic_ramp,
    "linear": ab.linear_ramp,
    "cosine": ab.cosine_ramp,
    "sigmoid": ab.sigmoid_ramp,
    "jump": lambda start, stop: ab.jump(start),
}


def estimator_of(method: Method, cap: float) -> ab.Estimator | ab.ScaledEstimator:
    """What the loss sees of the weights; `cap` is that of `ab_compensated`.

    Raises:
      ValueError: a cap below 1, whatever the method.
    """
    if not cap >= 1:
        raise ValueError(f"--cap={cap} is below 1: AB's gradient is only ever enlarged.")
    if method == "ab_compensated":
        return functools.partial(ab.compensated_alpha_blend, cap=cap)
    return ESTIMATORS[method]


def alpha_schedule(
    method: Method, ramp: Ramp, start: float, stop: float, steps: int
) -> optax.Schedule:
    """Alpha over the steps of a run: 0 for float, 1 for STE and LSQ, else the ramp.

    From float to STE it jumps where the ramp would stop. Layer by layer this is the ramp of the
    whole, which the activations follow.

    Args:
      start, stop: of the ramp, in parts of the run.
      steps: length of the run.
    """
    if method == "float":
        return optax.constant_schedule(0.0)
    if method in ("ste", "lsq"):
        return optax.constant_schedule(1.0)
    if method == "float_then_ste":
        return ab.jump(round(stop * steps))
    return RAMPS[ramp](round(start * steps), round(stop * steps))


def layerwise_schedule(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    rules: ab.Rules,
    *,
    order: LayerOrder,
    ramp: Ramp,
    start: float,
    stop: float,
    steps: int,
) -> AlphaSchedule:
    """Alpha by path, for layers one after another in the order in which the model calls them.

    Args:
      model: as it is trained.
      image_shape: (height, width, channels).
      rules: of the weights.
      order: from the images to the logits, or back.
      ramp, start, stop, steps: of the whole, as for `alpha_schedule`; each layer has a part.

    Raises:
      ValueError: a quantized parameter of no Dense or Conv layer; more layers than steps.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    init = functools.partial(model.init, train=False)
    params = jax.eval_shape(init, jax.random.key(0), images)["params"]
    paths = ab.quantized_paths(params, rules)
    called = layer_paths(model, images, train=False)
    layers = [name for name in called if any(path.startswith(f"{name}/") for path in paths)]
    return ab.layerwise_ramp(
        [f"{re.escape(name)}/.*" for name in layers][:: 1 if order == "forward" else -1],
        round(start * steps),
        round(stop * steps),
        ramp=RAMPS[ramp],
        paths=paths,
    )


def named(flag: str, name: str, known: dict[str, Any]) -> Any:
    """What a flag's value stands for.

    Raises:
      ValueError: it is not known.
    """
    if name not in known:
        raise ValueError(f"--{flag}={name} is not known. Choose one of {', '.join(known)}.")
    return known[name]


def keep_compiled_programs(directory: str) -> None:
    """Keep compiled programs in a directory, for the next run; an empty name: nowhere."""
    if not directory:
        return
    jax.config.update("jax_compilation_cache_dir", str(Path(directory).expanduser()))
    # Small programs too: there are a hundred of them, and they add up.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
