"""The CIFAR networks with low-precision weights: flags, and what they stand for.

How they train is in `experiments.recipes.cifar_training`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn

import ab_jax as ab
from ab_jax.activations import ACTIVATIONS, ActivationQuantizer
from ab_jax.quantized_inputs import ActivationRules, QuantizedInputs, keep_input
from experiments.recipes.methods import LayerOrder, Method, Ramp, named

QUANTIZERS: dict[str, ab.Quantizer] = {
    "binary": ab.Binary(),
    "binary_fixed": ab.Binary(fixed_scale=1.0),
    "ternary": ab.Ternary(),
    **{f"int{bits}": ab.Uniform(bits=bits) for bits in range(2, 9)},
    **{f"int{bits}_absmax": ab.Uniform(bits=bits, scale="absmax") for bits in range(2, 9)},
    **{
        f"int{bits}_tensor_absmax": ab.Uniform(bits=bits, scale="absmax", axis=None)
        for bits in range(2, 9)
    },
    **{f"least_squares_binary{bits}": ab.LeastSquaresBinary(bits=bits) for bits in range(1, 5)},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Train a CIFAR network with low-precision weights."""

    # What the loss sees of the weights: float (the weights), ste (their quantized values), soft_ste
    # and ab (a blend along the ramp, with the gradient of ste or with its own), ab_compensated (its
    # gradient enlarged up to --cap times), ab_then_ste (ste once alpha is 1), float_then_ste (float
    # up to the ramp's stop), ab_layerwise (one layer after another), parq (drawn to the levels),
    # lsq (quantized values at scales that are trained too).
    method: Method = "ab"
    # What the weights become: binary (scale mean |w|), binary_fixed (scale 1), ternary, int2 to
    # int8 (least squares), int2_absmax to int8_absmax, int2_tensor_absmax to int8_tensor_absmax
    # (one scale a tensor), least_squares_binary1 to 4 (a scale a bit).
    quantizer: str = "binary"
    # relu: 1-bit weights only. sign: 1-bit activations too, with the hard tanh's derivative
    # backward. sign_blend: the same, its gradient scaled by 1 - alpha as the weights' is.
    activation: str = "relu"
    # 2 to 8 bits for the inputs of layers after a ReLU, up to the running mean of batches' 99.9th
    # percentiles (images: 8, signed); None: they stay in float. Alpha is that of the weights.
    act_bits: int | None = None
    # How alpha rises from 0 to 1: cubic, linear, cosine, sigmoid (PARQ's), or jump (at the ramp's
    # start; float_then_ste always jumps, at its stop).
    ramp: Ramp = "cubic"
    ramp_start: float = 0.0  # where the ramp starts, in parts of the run
    ramp_stop: float = 0.9  # where alpha is 1, in parts of the run
    cap: float = 8.0  # of ab_compensated: the most that AB's gradient is enlarged
    layer_order: LayerOrder = "forward"  # of ab_layerwise: from the images on, or backward
    # Run to start from, as a directory: its last checkpoint's weights and batch statistics.
    init_from: str | None = None

    dataset: str = "cifar10"  # cifar10, cifar10_jpeg, digits, or image_folder:NAME
    data_dir: str | None = None  # where prepared data lie; None: $TFDS_DATA_DIR or TFDS's default
    image_size: int | None = None  # average images down to this many pixels; None: as they are
    validation: int | None = None  # training images kept for validation; None: 5,000 of CIFAR-10
    pad: int | None = None  # pixels of padding for random crops; None: an eighth of the image
    flip: bool = True  # mirror training images at random

    width: float = 1.0  # multiplies the features of every hidden layer
    dtype: Literal["float32", "bfloat16"] = "float32"  # of convolutions and products

    epochs: float = 30.0  # length of the run, in epochs
    batch_size: int = 128  # images in a batch, over all devices
    optimizer: Literal["sgd", "adamw"] = "sgd"  # sgd has momentum; adamw is AdamW
    learning_rate: float = 0.1  # at the peak
    warmup: float = 1.0  # epochs of linear warm-up; a cosine follows
    final_rate: float = 0.0  # learning rate at the end of the cosine, in parts of the peak
    momentum: float = 0.9  # of SGD; the first moment's decay of AdamW
    weight_decay: float = 5e-4  # on kernels only
    label_smoothing: float = 0.0  # share of the target that goes to all classes alike
    clip_norm: float | None = None  # largest global norm of the gradient; None: not clipped
    accumulate: int = 1  # batches whose gradients are averaged for one update
    latent_limit: float | None = None  # clip stored weights to +- this (BinaryNet: 1); None: do not
    seed: int = 0  # of the initial weights, the order and the augmentation

    name: str = "cifar10"  # the run's directory below runs_dir; the same name resumes
    runs_dir: str = "runs"  # where runs lie
    allow_changed: bool = False  # resume with other flags than before; the record tells of it
    eval_every: float = 1.0  # epochs between evaluations and checkpoints
    keep_checkpoints: int = 2  # how many of the newest to keep, beside the best
    read_test: bool = True  # read the test set at the end; no, for trials that choose a setting
    watch: str | None = None  # parameter whose weights are kept as histograms, such as conv3/kernel
    parallel: Literal["pmap", "shard_map"] = "pmap"  # how the step is spread over the devices
    norm_group: int | None = None  # devices that share batch-norm statistics; None: all of them
    # Several processes, each with devices of its own: the host and free port of process 0, how many
    # there are, and which one this is. On a TPU pod and in Slurm --distributed finds out all three.
    coordinator: str | None = None  # HOST:PORT of process 0
    processes: int | None = None  # how many processes train together
    process: int | None = None  # which one this is, from 0
    distributed: bool = False  # as the cluster says: a TPU pod, Slurm, Open MPI or Kubernetes
    profile: bool = False  # write a JAX trace of ten steps
    compilation_cache: str = "~/.cache/ab_jax"  # where compiled steps are kept; empty: nowhere


def weight_rules(config: Config) -> ab.Rules:
    """Kernels by the flag."""
    quantizer = named("quantizer", config.quantizer, QUANTIZERS)
    return ab.Rules([(r"(.*/)?kernel", quantizer), (r".*", None)])


def activation_rules(config: Config) -> ActivationRules | None:
    """Inputs of layers by the flag."""
    bits = config.act_bits
    if bits is None:
        return None
    if config.activation != "relu":
        raise ValueError(
            f"--act_bits={bits} is for --activation=relu: what --activation={config.activation} "
            f"gives out has one bit. Omit one of the two."
        )
    images = ActivationQuantizer(bits=8, signed=True)
    return ActivationRules(
        [("conv0|stem", images), (r".*", ActivationQuantizer(bits=bits, percentile=99.9))]
    )


def make_model(
    network: Callable[..., nn.Module],
    config: Config,
    *,
    num_classes: int,
    axis_name: str | None = None,
    **fields: Any,
) -> nn.Module:
    """What the flags make of a network; `fields` are further ones of its own.

    Raises:
      ValueError: an activation that there is not, or flags that exclude each other.
    """
    inputs = activation_rules(config)
    return network(
        num_classes=num_classes,
        width=config.width,
        activation=named("activation", config.activation, ACTIVATIONS),
        quantize_input=keep_input if inputs is None else QuantizedInputs(inputs, axis_name),
        dtype=config.dtype,
        axis_name=axis_name,
        **fields,
    )
