"""Trained networks, rebuilt from what a finished run left behind or from a packed file.

No images are needed: the record says which experiment it was, with which flags and on images of
which shape, and the checkpoint has the rest. The batch statistics are the running ones.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import ab_jax as ab
from ab_jax.export.packed import read_packed, readable
from ab_jax.linen import (
    RANGES,
    Model,
    WithQuantizedInputs,
    layer_paths,
    module_of,
    ranges_by_address,
)
from ab_jax.products import ActivationRules
from ab_jax.quantized import Quantized
from ab_jax.training.checkpoint import Checkpoints
from experiments.settings.build import make_model
from experiments.settings.config import Config, FlagError
from experiments.settings.levels import activation_rules, weight_rules
from experiments.settings.networks import NETWORKS
from experiments.settings.old_flags import todays

_MOST = 2**24  # classes, or pixels of a side: far more than any, and no number to hang over


@dataclasses.dataclass(frozen=True)
class TrainedNetwork:
    """A trained network at alpha 1.

    Attributes:
      model: `model.apply(ab.dequantize(variables), images, train=False)` gives its logits, of
        normalized images [batch, *image_shape].
      variables: `params`, with a `Quantized` in place of each leaf that the rules quantize, and the
        model's other collections.
      rules: of the weights.
      activation_rules: of the layers' inputs; None: they stay in float.
      description: JSON values, of which `rebuilt` makes the model and the rules again: experiment,
        config, classes and image_shape; and what else is known: the data (with the names of the
        classes and the mean and std by which images are normalized, where the run's code noted
        them), the revision, the step, the rules of activations as text; `quantization`, the bits
        of weights and of layers' inputs by path, and `source`, the versions of what exported it,
        as in files of `ab_jax.export.onnx.function_to_onnx`; and `scales: learned` where the codes
        are at scales that the run trained, `calibrated` where these began as those of a
        calibration, at which most methods leave them.
    """

    model: Model
    variables: dict[str, Any]
    rules: ab.Rules
    activation_rules: ActivationRules | None
    description: dict[str, Any]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        height, width, channels = self.description["image_shape"]
        return height, width, channels


def read_run(
    path: Path, image_size: int | None = None, network: str | None = None
) -> TrainedNetwork:
    """The network of a finished run, from its record and its last checkpoint.

    It is quantized as the run's own evaluation does it at alpha 1, whatever its method: of a float
    run this is the float network, rounded after training.

    Args:
      path: the run's directory.
      image_size: in pixels, for runs of older code whose record does not tell.
      network: of a run of somebody else's network, the value of its --network once more.

    Raises:
      FileNotFoundError: the run is not complete. ValueError: its record or checkpoints are damaged,
        or do not go together; names the fix.
    """
    record = _read_record(path / "record.json")
    with Checkpoints(path / "checkpoints") as checkpoints:
        step, steps = checkpoints.latest_step, record["summary"].get("steps")
        stored = checkpoints.network()
    if step != steps:
        raise ValueError(
            f"The newest whole checkpoint of {path} is that of step {step}, but its record is of "
            f"step {steps}: it is not the network that the record tells of. Put the right one back."
        )
    params = stored["params"]
    data = record.get("data", {})
    image_shape = data.get("image_shape")
    if image_shape is None:
        size = record["config"].get("image_size") or image_size
        if size is None:
            raise ValueError(
                f"The record of {path} does not tell the size of its images. Give --image_size."
            )
        first = params["stem" if "stem" in params else "conv0"]["kernel"]
        image_shape = [size, size, int(first.shape[-2])]
    elif image_size not in (None, image_shape[0]):
        raise ValueError(
            f"--image_size={image_size}, but the images of {path} have {image_shape[0]} pixels a "
            f"side. Omit it."
        )
    description = {
        "experiment": record["experiment"],
        "config": record["config"],
        "classes": int(params["head"]["kernel"].shape[-1]),
        "image_shape": image_shape,
        "data": data,
        "revision": record.get("revision"),
        "step": step,
    }
    model, rules, of_activations = rebuilt(description, network)
    scales = stored.get("scales")  # of a run that trained them, or began with calibrated ones
    if scales is not None:
        calibrated = record["config"].get("calibrate") is not None
        description["scales"] = "calibrated" if calibrated else "learned"
    variables = {"params": ab.quantize(params, rules, scales=scales), **stored["model_state"]}
    variables = _with_todays_ranges(model, image_shape, variables)
    _check_fits(model, image_shape, variables)
    if of_activations is not None:
        description["activation_rules"] = readable(of_activations)
    description["quantization"] = _bits(model, image_shape, variables["params"], of_activations)
    description["source"] = {"ab_jax": ab.__version__, "jax": jax.__version__}
    variables = jax.tree.map(jnp.asarray, variables)
    return TrainedNetwork(model, variables, rules, of_activations, description)


def load_packed(path: Path, network: str | None = None) -> tuple[Model, dict[str, Any]]:
    """The model and the variables of a packed file that `experiments.export` wrote.

    `model.apply(variables, images, train=False)` gives the logits of the network at alpha 1, bit
    for bit.

    Args:
      network: as for `read_run`.

    Raises:
      ValueError: it is no such file, as `read_packed` has it, or its network is none of ours.
      OSError: it cannot be read.
    """
    packed = read_packed(path)
    try:
        model, _, _ = rebuilt(packed.network, network)
        image_shape = packed.network["image_shape"]
        variables = _with_todays_ranges(model, image_shape, packed.variables)
        _check_fits(model, image_shape, variables)
    # Flags that make no sense fail in Flax and JAX in as many ways as there are.
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} holds none of the experiments' networks: {reason}") from error
    return model, ab.dequantize(variables)


def rebuilt(
    description: Mapping[str, Any], network: str | None = None
) -> tuple[Model, ab.Rules, ActivationRules | None]:
    """The model, and the rules of its weights and of its activations, from a description.

    Args:
      description: as of a `TrainedNetwork`.
      network: the value of --network where it names somebody else's module, which is imported: a
        file alone must not name code to be run.

    Raises:
      ValueError: a network, a flag or a number that there is not.
    """
    config = _config(description, network)
    classes, shape = description.get("classes"), description.get("image_shape")
    sizes = [classes, *shape] if isinstance(shape, list) else []
    if len(sizes) != 4 or not all(type(x) is int and 1 <= x <= _MOST for x in sizes):
        raise ValueError(f"{classes!r} classes of images of shape {shape!r} make no network.")
    assert isinstance(shape, list)
    assert isinstance(classes, int)
    try:
        model = make_model(config, num_classes=classes, image_size=shape[0])
        return model, weight_rules(config), activation_rules(config)
    except FlagError as error:
        raise ValueError(str(error)) from error


def _read_record(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no run in {path.parent}. Correct the path.")
    if not path.exists():
        raise FileNotFoundError(
            f"There is no {path}: the run is not complete. Give its command again, and it goes on."
        )
    try:
        record = json.loads(path.read_text())
        if all(isinstance(record[key], dict) for key in ("config", "summary")):
            return {"experiment": None, **record}
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path} is no record of a run.")


def _config(description: Mapping[str, Any], trusted: str | None) -> Config:
    """The flags of a description; what those of an older record lack has its default."""
    flags = description.get("config")
    if not isinstance(flags, dict):
        raise ValueError(f"The flags are {flags!r}.")
    flags = todays(description.get("experiment"), flags)
    network = flags.get("network")
    if not isinstance(network, str) or network not in {*NETWORKS, trusted}:
        raise ValueError(
            f"The network is {network!r}, none of {', '.join(NETWORKS)}. If it is yours, name it "
            f"once more by --network: a file alone must not name code to be run."
        )
    known = {field.name for field in dataclasses.fields(Config)}
    if unknown := sorted(flags.keys() - known):
        raise ValueError(f"There is no flag --{unknown[0]} any more. Use the code of the run.")
    try:
        return Config(**flags)
    except FlagError as error:
        raise ValueError(str(error)) from error


def _with_todays_ranges(
    model: Model, image_shape: list[int], variables: dict[str, Any]
) -> dict[str, Any]:
    """The variables, with ranges that older code has written by the names of today."""
    if not isinstance(model, WithQuantizedInputs) or RANGES not in variables:
        return variables
    spec = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    shapes = jax.eval_shape(ab.dequantize, variables)
    like = model.initial_ranges(shapes, spec, train=False)
    return {**variables, RANGES: ranges_by_address(variables[RANGES], like)}


def _bits(
    model: Model, image_shape: list[int], params: Any, inputs: ActivationRules | None
) -> dict[str, dict[str, int]]:
    """Of each weight that is codes, and of the input of each layer that is quantized, by path."""
    leaves = jax.tree.leaves_with_path(params, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    weights = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.bits
        for path, leaf in leaves
        if isinstance(leaf, Quantized)
    }
    of_inputs = {}
    if inputs is not None:
        images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        for path in layer_paths(module_of(model), images, train=False):
            if (quantizer := inputs.of(path)) is not None:
                of_inputs[path] = quantizer.bits
    return {"weights": weights, "inputs": of_inputs}


def _check_fits(model: Model, image_shape: list[int], variables: Mapping[str, Any]) -> None:
    spec = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    init = functools.partial(model.init, train=False)
    wanted = _shapes(jax.eval_shape(init, jax.random.key(0), spec))
    found = _shapes(jax.eval_shape(ab.dequantize, variables))
    for path in sorted({*wanted, *found}):
        if wanted.get(path) != found.get(path):
            raise ValueError(
                f"{path} is {found.get(path, 'absent')}, and {wanted.get(path, 'absent')} in the "
                f"network of these flags."
            )


def _shapes(tree: Any) -> dict[str, str]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
