"""How a run goes on from a trained network: its teacher, its batch norm, calibrated weights."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ab_jax as ab
from ab_jax.calibration import (
    AdaRound,
    CoordinateDescent,
    Gptq,
    Method,
    Rounding,
    WeightedScales,
)
from ab_jax.estimators import rule_of_codes, takes_scale
from ab_jax.learned_scales import highest_level
from ab_jax.training.starting import CalibratedStart
from experiments.settings.choices import choose
from experiments.settings.config import Config, FlagError
from experiments.settings.levels import weight_rules
from experiments.settings.methods import method_of

#: How calibration rounds a weight: the values of --calibrate.
CALIBRATIONS: dict[str, Callable[[], Method]] = {
    "coordinate_descent": CoordinateDescent,
    "gptq": Gptq,
    "adaround": AdaRound,
    "rounding": Rounding,
    "weighted_scales": WeightedScales,
}

#: Flags that are for a network that is trained already: a float phase before it has none of them.
OF_LAST_PHASE: Mapping[str, Any] = {
    field.name: field.default
    for field in dataclasses.fields(Config)
    if field.name
    in {
        *("teacher", "teacher_share", "relative_updates", "rebase_norm"),
        *("calibrate", "calibration_images", "latents"),
    }
}


def check_start(config: Config) -> None:
    """Refuse flags on the start of a run that do not go together, whatever the data.

    Raises:
      FlagError: names the flag and what to give instead.
    """
    c = config
    has_start = c.init_from is not None or (c.float_epochs > 0 and c.method != "float")
    wants_one = {
        "--teacher=start": c.teacher == "start",
        "--rebase_norm": c.rebase_norm,
        f"--calibrate={c.calibrate}": c.calibrate is not None,
    }
    for flag, given in wants_one.items():
        if given and not has_start:
            raise FlagError(
                f"{flag} is for a run that starts from a trained network. Name one by --init_from, "
                f"have it trained by --float_epochs, or omit {flag.partition('=')[0]}."
            )
    if c.teacher == "start" and c.new_head:
        raise FlagError(
            "--teacher=start: with --new_head the network to start from has no head to teach with. "
            "Name a --teacher of these classes, or omit it."
        )
    for flag, needed in {
        "teacher_share": "teacher",
        "calibration_images": "calibrate",
        "latents": "calibrate",
    }.items():
        value = getattr(c, flag)
        if value != OF_LAST_PHASE[flag] and getattr(c, needed) is None:
            raise FlagError(f"--{flag}={value} is for --{needed}: give that, or omit it.")
    if c.calibrate is not None:
        _check_calibrate(c)


def _check_calibrate(config: Config) -> None:
    c = config
    choose("calibrate", str(c.calibrate), CALIBRATIONS)
    if c.refit_every > 1:
        raise FlagError(
            f"--calibrate={c.calibrate} gives the weights their scales, and --refit_every="
            f"{c.refit_every} fits others. Omit one of the two."
        )
    estimator = method_of(c.method).estimator
    if not takes_scale(estimator) and rule_of_codes(estimator) is None:
        raise FlagError(
            f"--calibrate={c.calibrate}: --method={c.method} takes no scales. Choose another "
            f"method, or omit --calibrate."
        )
    for _, quantizer in weight_rules(c).rules:
        try:
            if quantizer is not None:
                highest_level(quantizer)
        except ValueError:
            culprit = (
                "--weight_zero_point"
                if c.weight_zero_point
                else f"--weights={c.weights} --weight_scale={c.weight_scale}"
            )
            raise FlagError(
                f"--calibrate={c.calibrate} gives symmetric, evenly spaced levels their scales, "
                f"which {culprit} does not have ({quantizer}). Omit one of the two."
            ) from None


def with_its_scales(config: Config, estimator: Any) -> ab.Estimator | ab.ScaledEstimator:
    """The estimator, at the scales of the calibration where there is one.

    Those that take scales train them on; for all others they stay.
    """
    found: ab.Estimator | ab.ScaledEstimator = estimator
    if config.calibrate is None or takes_scale(estimator):
        return found
    return ab.at_fixed_scales(estimator)


def calibrated_start(config: Config, images: int) -> CalibratedStart | None:
    """How the start is calibrated; None: it is not.

    Args:
      images: how many training images there are.

    Raises:
      FlagError: fewer than --calibration_images.
    """
    c = config
    if c.calibrate is None:
        return None
    if c.calibration_images > images:
        raise FlagError(
            f"--calibration_images={c.calibration_images} is more than the {images} training "
            f"images. Lower it."
        )
    return CalibratedStart(
        method=CALIBRATIONS[c.calibrate](), images=c.calibration_images, latents=c.latents
    )


def teacher_of(config: Config) -> Path | None:
    """Where the float network to learn from is; None: there is none."""
    source = config.init_from if config.teacher == "start" else config.teacher
    return None if source is None else Path(source)
