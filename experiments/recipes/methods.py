"""Methods, ramps and other choices by the names that they have on the command line."""

from pathlib import Path
from typing import Any, Literal

import jax
import optax

import ab_jax as ab

Method = Literal["float", "ste", "soft_ste", "ab", "lsq"]
Ramp = Literal["cubic", "linear", "cosine", "jump"]

ESTIMATORS: dict[str, ab.Estimator | ab.ScaledEstimator] = {
    "float": ab.full_precision,
    "ste": ab.straight_through,
    "soft_ste": ab.soft_straight_through,
    "ab": ab.alpha_blend,
    "lsq": ab.learned_step_size,
}

RAMPS = {"cubic": ab.cubic_ramp, "linear": ab.linear_ramp, "cosine": ab.cosine_ramp}


def alpha_schedule(
    method: Method, ramp: Ramp, start: float, stop: float, steps: int
) -> optax.Schedule:
    """Alpha over the steps of a run: 0 for float, 1 for STE and LSQ, else the ramp.

    Args:
      start, stop: of the ramp, in parts of the run.
      steps: length of the run.
    """
    if method == "float":
        return optax.constant_schedule(0.0)
    if method in ("ste", "lsq"):
        return optax.constant_schedule(1.0)
    if ramp == "jump":
        return ab.jump(round(start * steps))
    return RAMPS[ramp](round(start * steps), round(stop * steps))


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
