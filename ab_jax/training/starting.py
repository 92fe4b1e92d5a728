"""What a run starts from: another run's network or a file, and what is done to it before step 0.

The weights may be calibrated (`ab_jax.calibration`): the run then begins near the levels, at the
scales of the calibrated codes. Then batch norm may be re-based (`ab_jax.training.rebasing`).
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from ab_jax.blend import dequantize, quantize, scales_of
from ab_jax.calibration import CalibratedLayer, Method, calibrate
from ab_jax.data.batches import epoch_order
from ab_jax.data.dataset import Images
from ab_jax.data.stream import Photos
from ab_jax.describe import quantized_paths
from ab_jax.linen import RANGES, Model, module_of, plain_convolutions
from ab_jax.models.pretrained import load_pretrained
from ab_jax.rules import Rules, leaves_by_path
from ab_jax.training.checkpoint import Checkpoints
from ab_jax.training.distributed import is_first, tree_of_first
from ab_jax.training.rebasing import rebased
from ab_jax.training.state import TrainState, create_state
from ab_jax.training.train_step import Preprocessing, arguments_of

_REBASED_ON = 1_600  # images
_BATCH = 32  # images at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibratedStart:
    """How the weights that a run starts from are calibrated.

    Attributes:
      method: how a weight is rounded, one of `ab_jax.calibration`.
      images: how many training images calibrate.
      latents: what the parameters are then: `corrected`, the weights before they are rounded,
        regressed, scaled, and moved as little as needed to round to their codes; or `codes`, the
        values of the codes. Biases are corrected in both.
    """

    method: Method
    images: int = 128
    latents: Literal["corrected", "codes"] = "corrected"


def network_from(
    source: Path, like: TrainState, *, new_head: bool = False, flag: str = "init_from"
) -> TrainState:
    """`like` with the parameters and the model state of a network that was trained before.

    Args:
      source: the directory of a run, or a file of weights trained elsewhere
        (`ab_jax.models.pretrained`).
      like: a state of the same architecture.
      new_head: whether a head of other classes in that file is left out.
      flag: what a message names to be corrected.

    Raises:
      FileNotFoundError: there is no run. ValueError: another architecture, or a damaged file.
    """
    if source.is_file():
        network = {"params": like.params, **like.model_state}
        network = load_pretrained(source, network, new_head=new_head)
        params = network.pop("params")
        return dataclasses.replace(like, params=params, model_state=network)
    checkpoints = source / "checkpoints"
    if not checkpoints.is_dir():
        raise FileNotFoundError(
            f"There is no run to start from in {source}: {checkpoints} is missing. Train that run "
            f"first, or correct --{flag}."
        )
    with Checkpoints(checkpoints) as others:
        return others.restore_network(like)


def load_teacher(source: Path, model: Model, image_shape: tuple[int, ...]) -> dict[str, Any]:
    """The variables of a float network, with its running statistics.

    Args:
      source: as `network_from`.
      model: the student; of one with quantized inputs the teacher is the module itself.
      image_shape: [height, width, channels].

    Raises:
      As `network_from`.
    """
    like = create_state(module_of(model), optax.identity(), image_shape, seed=0)
    found = network_from(source, like, flag="teacher")
    return {"params": found.params, **found.model_state}


def with_rebased_norm(
    state: TrainState,
    model: Model,
    preprocessing: Preprocessing,
    images: Images | Photos,
    seed: int,
    *,
    calibrated_by: Rules | None = None,
) -> TrainState:
    """The state with batch norm re-based on up to 1,600 training images.

    Of a calibrated network it is the quantized one whose inputs of norms are measured. Its biases
    make good what the running means do not know, and batch statistics would make it good twice.

    Args:
      state: of a trained network.
      model: as it is trained; batch norm is re-based in its module, without quantized inputs.
      preprocessing: of the images, of which the augmentation is left out.
      images: the training part.
      seed: which draws the images.
      calibrated_by: the rules by which the network was calibrated, at the scales of the state;
        None: it was not, and is measured in float.

    Raises:
      ValueError: as `rebased`.
    """
    chosen = drawn_images(images, min(_REBASED_ON, len(images)), seed)
    batches = (  # one at a time: as floats all of them may be a gigabyte
        preprocessing.normalize(jnp.asarray(chosen[start : start + _BATCH]))
        for start in range(0, len(chosen), _BATCH)
    )
    own, ranges = _without_ranges(state.model_state)
    module = module_of(model)
    call = arguments_of(module, train=False, alpha=0.0)
    params = state.params
    if calibrated_by is not None:
        params = dequantize(quantize(params, calibrated_by, scales=state.scales))
    found = tree_of_first(rebased(module, {"params": params, **own}, batches, **call))
    of_norms = found.pop("params")
    if calibrated_by is not None:  # the weights themselves stay
        weights = set(quantized_paths(state.params, calibrated_by))
        pairs = zip(leaves_by_path(state.params), jax.tree.leaves(of_norms), strict=True)
        leaves = [old if path in weights else new for (path, old), new in pairs]
        of_norms = jax.tree.unflatten(jax.tree.structure(of_norms), leaves)
    return dataclasses.replace(state, params=of_norms, model_state={**found, **ranges})


def calibrated(
    state: TrainState,
    model: Model,
    preprocessing: Preprocessing,
    images: Images | Photos,
    seed: int,
    *,
    rules: Rules,
    start: CalibratedStart,
) -> TrainState:
    """The state with calibrated parameters, and with the scales of their codes.

    Args:
      state, model, preprocessing, images, seed: as for `with_rebased_norm`. Inputs stay in float.
      rules: of the weights.
      start: how.

    Raises:
      ValueError: fewer images than are asked for; otherwise as `ab_jax.calibration.calibrate` and
        `ab_jax.scales_of`.
    """
    chosen = drawn_images(images, start.images, seed)
    # Of one size, since batches of a calibration have one shape.
    size = max(n for n in range(1, _BATCH + 1) if len(chosen) % n == 0)
    batches = [
        (preprocessing.normalize(jnp.asarray(part)),)
        for part in np.split(chosen, len(chosen) // size)
    ]
    own, _ = _without_ranges(state.model_state)
    # The convolutions made for CPUs are custom derivatives, in which no products are found.
    module = module_of(plain_convolutions(model))

    def forward(params: Any, images: Array) -> Any:
        call = arguments_of(module, train=False, alpha=1.0)
        return module.apply({"params": params, **own}, images, **call)

    found = calibrate(forward, state.params, rules, batches, method=start.method, progress=_tell)
    params = found.latents if start.latents == "corrected" else dequantize(found.codes)
    params, scales = tree_of_first((params, scales_of(found.codes)))
    return dataclasses.replace(state, params=params, scales=scales)


def drawn_images(images: Images | Photos, count: int, seed: int) -> np.ndarray:
    """Training images without augmentation: the first that a run of this seed sees.

    Args:
      images: the training part.
      count: how many.
      seed: of the run.

    Returns:
      uint8 [count, height, width, channels].

    Raises:
      ValueError: there are fewer.
    """
    if count > len(images):
        raise ValueError(
            f"There are {len(images)} training images, and {count} are asked for. Lower "
            f"--calibration_images."
        )
    order = epoch_order(seed, 0, len(images))[:count]
    found = images[order] if isinstance(images, Images) else images.centers(order)
    return found.images


def _without_ranges(model_state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The collections of the module itself, and the ranges of quantized inputs."""
    own = {name: tree for name, tree in model_state.items() if name != RANGES}
    return own, {name: tree for name, tree in model_state.items() if name == RANGES}


def _tell(layer: CalibratedLayer) -> None:
    if is_first():
        note = layer.note and f" ({layer.note})"
        print(f"calibrated {layer.address}: {layer.bits} bits, lost {layer.lost:.4f}{note}")
