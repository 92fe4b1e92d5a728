"""The ImageNet networks with low-precision weights and activations: flags, and how they train.

A run has two phases. The float network comes first, from scratch (`--float_epochs`, in
`runs/NAME/float`) or from elsewhere (`--init_from`); then the method goes on from it (`--epochs`).
`--method=float` without `--init_from` is the float phase alone.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

import ab_jax as ab
from ab_jax.activations import ActivationQuantizer
from ab_jax.data import Dataset, load, steps_per_epoch
from ab_jax.data.stream import StreamedDataset, load_stream
from ab_jax.quantized_inputs import (
    ActivationRules,
    QuantizedInputs,
    describe_inputs,
    keep_input,
    layer_paths,
)
from ab_jax.training.distributed import all_devices, is_first
from ab_jax.training.loop import Training, train
from ab_jax.training.optimizers import make_optimizer, warmup_cosine
from ab_jax.training.parallel import AXIS, Parallel
from ab_jax.training.step import Preprocessing
from experiments.recipes.methods import (
    ESTIMATORS,
    Method,
    Ramp,
    alpha_schedule,
    keep_compiled_programs,
)
from experiments.recipes.processes import join, open_run

# Bits of the first and the last layer, weights and activations, which the rules leave alone: they
# are a small part of the network and lose the most.
_OUTER_BITS = 8
_PERCENTILE = 99.9
_STREAM_SIZE = 224  # pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Train an ImageNet network with low-precision weights and activations."""

    # What the loss sees: float (the network itself), ste (quantized values), soft_ste and ab (a
    # blend along the ramp; weights with the gradient of ste or with the blend's own).
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
    # How alpha rises from 0 to 1: cubic, linear, cosine, or jump (at the ramp's start).
    ramp: Ramp = "cubic"
    ramp_start: float = 0.0  # where the ramp starts, in parts of the run
    ramp_stop: float = 0.9  # where alpha is 1, in parts of the run
    act_start: float | None = None  # the same for activations; None: as the weights
    act_stop: float | None = None  # the same for activations; None: as the weights
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
    warmup: float = 1.0  # epochs of linear warm-up in each phase; a cosine down to 0 follows
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


# From the flags, the number of classes, the image size and further fields to the network.
MakeModel = Callable[..., nn.Module]


def run(config: Config, make_model: MakeModel, experiment: str) -> dict[str, Any]:
    """Train in one or two phases, as the flags say, and return the record of the last."""
    c = config
    join(c)
    keep_compiled_programs(c.compilation_cache)
    dataset = _load(c)
    if c.init_from is None:
        float_phase = dataclasses.replace(
            c,
            method="float",
            name=c.name if c.method == "float" else f"{c.name}/float",
            epochs=c.float_epochs,
            learning_rate=c.float_learning_rate,
            read_test=c.read_test and c.method == "float",
        )
        if c.method == "float":
            return _train_phase(float_phase, dataset, make_model, experiment)
        if not (_path(float_phase) / "record.json").exists():
            _train_phase(float_phase, dataset, make_model, experiment)
        c = dataclasses.replace(c, init_from=str(_path(float_phase)))
    return _train_phase(c, dataset, make_model, experiment)


def _load(config: Config) -> Dataset | StreamedDataset:
    c = config
    if not c.stream and c.dataset != "imagenet2012":
        return load(
            c.dataset,
            data_dir=c.data_dir,
            validation=c.validation,
            image_size=c.image_size,
            classes=c.classes,
        )
    for flag, value in {"classes": c.classes, "pad": c.pad}.items():
        if value is not None:
            raise ValueError(
                f"--{flag}={value} is for images in memory, not for a stream. Omit it."
            )
    return load_stream(
        c.dataset,
        image_size=c.image_size or _STREAM_SIZE,
        data_dir=c.data_dir,
        validation=c.validation,
        flip=c.flip,
        workers=c.workers,
        share=(jax.process_index(), jax.process_count()),
    )


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


def _path(config: Config) -> Path:
    return Path(config.runs_dir) / config.name


def _train_phase(
    config: Config, dataset: Dataset | StreamedDataset, make_model: MakeModel, experiment: str
) -> dict[str, Any]:
    c = config
    size = dataset.image_shape[0]
    streamed = isinstance(dataset, StreamedDataset)
    inputs = activation_rules(c)
    parallel = Parallel(c.parallel, all_devices(), norm_group=c.norm_group)
    model = make_model(
        c,
        num_classes=dataset.num_classes,
        image_size=size,
        axis_name=AXIS,
        axis_index_groups=parallel.norm_groups,
    )
    if inputs is not None:
        images = jax.ShapeDtypeStruct((1, *dataset.image_shape), jnp.float32)
        table = describe_inputs(layer_paths(model, images, train=False), inputs)
        if is_first():
            print(table)
    per_epoch = steps_per_epoch(c.batch_size, len(dataset.train))
    steps = max(1, round(c.epochs * per_epoch))
    learning_rate = warmup_cosine(
        c.learning_rate,
        round(c.warmup * per_epoch) // c.accumulate,
        max(1, steps // c.accumulate),
    )
    training = Training(
        model=model,
        dataset=dataset,
        preprocessing=Preprocessing(
            mean=dataset.mean,
            std=dataset.std,
            # A stream's crops and flips are made where its photographs are decoded.
            pad=0 if streamed else size // 8 if c.pad is None else c.pad,
            flip=c.flip and not streamed,
        ),
        rules=weight_rules(c),
        estimator=ESTIMATORS[c.method],
        alpha=alpha_schedule(c.method, c.ramp, c.ramp_start, c.ramp_stop, steps),
        activation_alpha=alpha_schedule(
            c.method,
            c.ramp,
            c.ramp_start if c.act_start is None else c.act_start,
            c.ramp_stop if c.act_stop is None else c.act_stop,
            steps,
        ),
        optimizer=make_optimizer(
            c.optimizer,
            learning_rate,
            momentum=c.momentum,
            weight_decay=c.weight_decay,
            clip_norm=c.clip_norm,
            accumulate=c.accumulate,
        ),
        learning_rate=learning_rate,
        batch_size=c.batch_size,
        steps=steps,
        eval_every=max(1, round(c.eval_every * per_epoch)),
        keep_checkpoints=c.keep_checkpoints,
        seed=c.seed,
        accumulate=c.accumulate,
        label_smoothing=c.label_smoothing,
        init_from=None if c.init_from is None else Path(c.init_from),
        new_head=c.new_head,
        read_test=c.read_test,
        watch=c.watch,
        profile=c.profile,
    )
    with open_run(_path(c), experiment, c, dataset) as directory:
        return train(training, parallel, directory)
