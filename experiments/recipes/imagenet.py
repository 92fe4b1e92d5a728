"""The ImageNet networks with low-precision weights and activations: flags, and what they stand for.

How they train is in `experiments.recipes.imagenet_training`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn

import ab_jax as ab
from ab_jax.activations import ActivationQuantizer
from ab_jax.quantized_inputs import ActivationRules, QuantizedInputs, keep_input
from experiments.recipes.methods import LayerOrder, Method, Ramp

# Bits of the first and the last layer, weights and activations, which the rules leave alone: they
# are a small part of the network and lose the most.
_OUTER_BITS = 8
_PERCENTILE = 99.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Train an ImageNet network with low-precision weights and activations."""

    # What the loss sees: float (the network itself), ste (quantized values), soft_ste and ab (a
    # blend along the ramp; weights with the gradient of ste or with the blend's own),
    # ab_compensated (its gradient enlarged up to --cap times), ab_then_ste (ste once alpha is 1),
    # float_then_ste (float up to the ramp's stop), ab_layerwise (one layer after another), parq
    # (weights drawn to the levels beside them, activations as with soft_ste), lsq (as
    # ste, with the weights' scales trained too).
    method: Method = "ab"
    weight_bits: int = 8  # 2 to 8; the first and the last layer always have 8
    act_bits: int | None = 8  # 2 to 8 for the inputs of layers; None: activations stay in float
    # Levels of the weights: scales by channel of least squared error, as one would choose today, or
    # one scale a tensor at its largest magnitude, as fake quantization was in the paper's time.
    weight_scales: Literal["channel_least_squares", "tensor_absmax"] = "channel_least_squares"
    # Range of the activations: the running mean of batches' maxima, or of 99.9th percentiles, or
    # fixed at 6 (for ReLU6).
    act_range: Literal["max", "percentile", "fixed"] = "percentile"
    # Their gradient: clipped (1 inside the range, 0 outside at alpha 1) or blended (1 - alpha).
    act_backward: Literal["clipped", "blended"] = "clipped"
    # How alpha rises from 0 to 1: cubic, linear, cosine, sigmoid (PARQ's), or jump (at the ramp's
    # start; float_then_ste always jumps, at its stop).
    ramp: Ramp = "cubic"
    ramp_start: float = 0.0  # where the ramp starts, in parts of the run
    ramp_stop: float = 0.9  # where alpha is 1, in parts of the run
    act_start: float | None = None  # the same for activations; None: as the weights
    act_stop: float | None = None  # the same for activations; None: as the weights
    cap: float = 8.0  # of ab_compensated: the most that AB's gradient is enlarged
    layer_order: LayerOrder = "forward"  # of ab_layerwise: from the images on, or backward
    # Network to start from, which replaces the float phase: the directory of a run, or a file of
    # weights trained elsewhere, of Keras applications (.h5) or timm (.safetensors).
    init_from: str | None = None
    new_head: bool = False  # leave out the head of that file, whose classes are others

    # imagenet2012, tiny_imagenet, cifar10, cifar10_jpeg, or image_folder:NAME.
    dataset: str = "tiny_imagenet"
    data_dir: str | None = None  # where prepared data lie; None: $TFDS_DATA_DIR or TFDS's default
    # Pixels to average images down to, or of the crops of a stream. None: as they are, 224 of a
    # stream.
    image_size: int | None = None
    # Decode photographs as they are needed, with crops of random size, as imagenet2012 always is.
    stream: bool = False
    workers: int = 0  # processes that decode a stream; 0: a thread of this one
    classes: int | None = None  # keep the images of the first so many classes; None: of all
    validation: int | None = None  # training images kept for validation; None: a tenth
    pad: int | None = None  # padding for crops of images in memory, in pixels; None: an eighth
    flip: bool = True  # mirror training images at random

    width: float = 1.0  # multiplies the features of every hidden layer
    dtype: Literal["float32", "bfloat16"] = "float32"  # of convolutions and products

    float_epochs: float = 60.0  # length of the float phase, in epochs
    epochs: float = 30.0  # length of the method's phase, in epochs
    batch_size: int = 128  # images in a batch, over all devices
    optimizer: Literal["sgd", "adamw"] = "sgd"  # sgd has momentum; adamw is AdamW
    float_learning_rate: float = 0.1  # at the peak, in the float phase
    learning_rate: float = 0.02  # at the peak, in the method's phase
    warmup: float = 1.0  # epochs of linear warm-up in each phase; a cosine follows
    final_rate: float = 0.0  # learning rate at the end of the cosine, in parts of the peak
    momentum: float = 0.9  # of SGD; the first moment's decay of AdamW
    weight_decay: float = 1e-4  # on kernels only
    label_smoothing: float = 0.0  # share of the target that goes to all classes alike
    clip_norm: float | None = None  # largest global norm of the gradient; None: not clipped
    accumulate: int = 1  # batches whose gradients are averaged for one update
    seed: int = 0  # of the initial weights, the order and the augmentation

    name: str = "imagenet"  # the run's directory below runs_dir; the same name resumes
    runs_dir: str = "runs"  # where runs lie
    allow_changed: bool = False  # resume with other flags than before; the record tells of it
    eval_every: float = 1.0  # epochs between evaluations and checkpoints
    keep_checkpoints: int = 2  # how many of the newest to keep, beside the best
    read_test: bool = True  # read the test set at the end; no, for trials that choose a setting
    watch: str | None = None  # parameter whose weights are kept as histograms
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
    """Kernels by the flags, those of the first and the last layer at 8 bits."""

    def quantizer(bits: int) -> ab.Uniform:
        if config.weight_scales == "tensor_absmax":
            return ab.Uniform(bits=bits, scale="absmax", axis=None)
        return ab.Uniform(bits=bits)

    return ab.Rules(
        [
            (r"(stem|head)/kernel", quantizer(_OUTER_BITS)),
            (r"(.*/)?kernel", quantizer(config.weight_bits)),
            (r".*", None),
        ]
    )


def activation_rules(config: Config) -> ActivationRules | None:
    """Inputs of layers by the flags: the images signed, the others, after a ReLU, not."""
    c = config
    if c.act_bits is None:
        return None
    backward = c.act_backward
    images = ActivationQuantizer(bits=_OUTER_BITS, signed=True, backward=backward)

    def quantizer(bits: int) -> ActivationQuantizer:
        return ActivationQuantizer(
            bits=bits,
            limit=6.0 if c.act_range == "fixed" else None,
            percentile=_PERCENTILE if c.act_range == "percentile" else None,
            backward=backward,
        )

    return ActivationRules(
        [("stem", images), ("head", quantizer(_OUTER_BITS)), (r".*", quantizer(c.act_bits))]
    )


def stem_for(image_size: int) -> int:
    """The stem whose strides fit images of this size."""
    return 224 if image_size > 96 else 64 if image_size > 48 else 32


def make_model(
    network: Callable[..., nn.Module],
    config: Config,
    *,
    num_classes: int,
    image_size: int,
    axis_name: str | None = None,
    **fields: Any,
) -> nn.Module:
    """What the flags make of a network; `fields` are further ones that all our networks share."""
    inputs = activation_rules(config)
    return network(
        num_classes=num_classes,
        width=config.width,
        stem=stem_for(image_size),
        quantize_input=keep_input if inputs is None else QuantizedInputs(inputs, axis_name),
        dtype=config.dtype,
        axis_name=axis_name,
        **fields,
    )
