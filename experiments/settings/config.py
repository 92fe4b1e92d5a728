"""The flags of a training run: one vocabulary for every network, data set and method.

A flag is a field of `Config`: its type says its limits, the comment beside it its meaning and unit.
The command line, study files and Python code all make a `Config`, and one that makes no sense
cannot be made: `FlagError` names each culprit by its flag. What a default depends on (the
network, the method) is filled in by `experiments.settings`.
"""

import dataclasses
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, AllowInfNan, ConfigDict, ValidationError, model_validator
from pydantic.dataclasses import dataclass

Finite = AllowInfNan(False)
# The upper ends are far beyond use: what lies above them is a slip of the hand.
Positive = Annotated[float, Finite, Gt(0), Le(1e6)]
NotNegative = Annotated[float, Finite, Ge(0), Le(1e6)]
Share = Annotated[float, Finite, Ge(0), Le(1)]
Count = Annotated[int, Gt(0), Lt(2**31)]
Bits = Annotated[int, Ge(2), Le(8)]


_LONGEST_NAME = 200  # bytes


class FlagError(Exception):
    """A flag has a value that makes no sense; the message names the flag and what it may be.

    No ValueError: Pydantic and tyro would wrap one in several lines of their own.
    """


def relative_name(name: str) -> str:
    """A run's name: a path below the directory of runs.

    Raises:
      ValueError: it is empty, or leads out of that directory.
    """
    parts = name.split("/")
    if PurePosixPath(name).is_absolute() or any(part in ("", ".", "..") for part in parts):
        raise ValueError("should be a relative path that stays below runs_dir, such as study/ab")
    if not name.isprintable() or any(part != part.strip() for part in parts):
        raise ValueError("should hold printable characters alone, and no blanks at the ends")
    if any(len(part.encode()) > _LONGEST_NAME for part in parts):
        raise ValueError(f"should have parts of at most {_LONGEST_NAME} bytes, as file systems do")
    return name


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class Config:
    """Train a network with low-precision weights and activations."""

    # Which network: one of ours, or package.module:NAME for one of somebody else's
    # (docs/extending.md).
    network: str = "binarynet"
    width: Annotated[float, Finite, Gt(0), Le(64)] = 1.0  # multiplies features of hidden layers
    # Between layers: relu, relu6, sign (1-bit activations, backward the hard tanh's derivative) or
    # sign_blend (the same, its gradient scaled by 1 - alpha). None: the network's own.
    activation: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"  # of convolutions and products
    # Of what batch norm gives out; its statistics are float32. None: of binarynet float32, of our
    # other networks dtype.
    norm_dtype: Literal["float32", "bfloat16"] | None = None

    # What the loss sees of the weights: one of ours, or package.module:NAME for somebody else's.
    method: str = "ab"
    # What weights become: binary, ternary, int2 to int8, or least_squares_binary1 to 4 (the levels
    # +-v1 +-v2 ..., a scale a bit).
    weights: str = "binary"
    # Scales of least squared error, at the largest magnitude (absmax, of int2 to int8), at the mean
    # magnitude (absmean, of ternary: BitNet's), or 1 (one, of binary).
    weight_scale: Literal["least_squares", "absmax", "absmean", "one"] = "least_squares"
    # A scale for each output channel, one for the tensor, or one for each group of input channels.
    weight_granularity: Literal["channel", "tensor", "group"] = "channel"
    weight_group_size: Count | None = None  # input channels in a group; None: there are no groups
    weight_zero_point: bool = False  # int2 to int8: levels need not be symmetric about 0
    # Bits of the first and the last layer, of their weights and inputs. None: as all the others.
    outer_bits: Bits | None = None
    # Bits of the weights of depthwise convolutions. None: as all the others.
    depthwise_bits: Bits | None = None

    # Bits of the inputs of layers (of images always 8, signed). None: they stay in float.
    act_bits: Bits | None = None
    # Range of activations: the running mean of batches' maxima, or of their 99.9th percentiles, or
    # fixed at 6 (for ReLU6).
    act_range: Literal["max", "percentile", "fixed"] = "percentile"
    # Their gradient: clipped (1 inside the range, 0 outside at alpha 1) or blended (1 - alpha).
    act_backward: Literal["clipped", "blended"] = "clipped"

    # How alpha rises from 0 to 1: cubic, linear, cosine, sigmoid (PARQ's) or jump (at ramp_start).
    # None: the method's own.
    ramp: Literal["cubic", "linear", "cosine", "sigmoid", "jump"] | None = None
    ramp_start: Share = 0.0  # where the ramp starts, in parts of the run
    ramp_stop: Share = 0.9  # where alpha is 1, in parts of the run
    act_start: Share | None = None  # the same for activations; None: as the weights
    act_stop: Share | None = None  # the same for activations; None: as the weights
    # Of ab_compensated: the most that AB's gradient is enlarged.
    cap: Annotated[float, Finite, Ge(1), Le(1e6)] = 8.0
    # Of ab_layerwise: which layers come first, those near the images or those near the logits.
    layer_order: Literal["forward", "backward"] = "forward"

    # Network to start from: the directory of a run, or a file of weights trained elsewhere, of
    # Keras applications (.h5) or timm (.safetensors; that may have the names of Keras too).
    init_from: str | None = None
    new_head: bool = False  # leave out the head of that file, whose classes are others
    # Without init_from: epochs of a float network that is trained first, in NAME/float; 0: none.
    float_epochs: NotNegative = 0.0
    float_learning_rate: Positive = 0.1  # at its peak

    # Of the last phase, which starts from such a network (docs/experiments.md). Float network to
    # learn from: given as init_from, or start, the network that the phase itself starts from.
    teacher: str | None = None
    # Share of the loss that is the divergence from the teacher's predictions; the rest is the
    # cross-entropy of the labels.
    teacher_share: Share = 1.0
    # Start from calibrated weights, at their scales: how they are rounded, such as gptq. A network
    # with batch norm wants --rebase_norm too.
    calibrate: str | None = None
    calibration_images: Count = 128  # training images that calibrate
    # What the weights are then: corrected for what layers lose, but not rounded; or the codes.
    latents: Literal["corrected", "codes"] = "corrected"
    # Make batch norm's running statistics those of training images; the function stays.
    rebase_norm: bool = False

    # Which images: one of ours, image_folder:NAME, or package.module:NAME for somebody else's
    # (docs/extending.md).
    dataset: str = "cifar10"
    data_dir: str | None = None  # where prepared data lie; None: $TFDS_DATA_DIR or TFDS's default
    # Pixels to average images down to, or of the crops of a stream. None: as they are, 224 of a
    # stream.
    image_size: Annotated[int, Gt(0), Le(4096)] | None = None
    # Decode photographs as they are needed, with crops of random size, as imagenet2012 always is.
    stream: bool = False
    workers: Annotated[int, Ge(0), Le(1024)] = 0  # processes that decode a stream; 0: a thread
    classes: Count | None = None  # keep the images of the first so many classes; None: of all
    # Training images kept for validation. None: a tenth.
    validation: Annotated[int, Ge(0), Lt(2**31)] | None = None
    # Padding for random crops of images in memory, in pixels. None: an eighth of the image.
    pad: Annotated[int, Ge(0), Le(1024)] | None = None
    flip: bool = True  # mirror training images at random

    epochs: Positive = 30.0  # length of the run, in epochs
    batch_size: Count = 128  # images in a batch, over all devices
    optimizer: Literal["sgd", "adamw"] = "sgd"  # sgd has momentum; adamw is AdamW
    learning_rate: Positive = 0.1  # at the peak
    # Epochs of linear warm-up; a cosine follows.
    warmup: NotNegative = 1.0
    final_rate: Share = 0.0  # learning rate at the end of the cosine, in parts of the peak
    # Of SGD; the first moment's decay of AdamW.
    momentum: Annotated[float, Finite, Ge(0), Lt(1)] = 0.9
    weight_decay: NotNegative = 5e-4  # on kernels only
    # Share of the target that goes to all classes alike.
    label_smoothing: Annotated[float, Finite, Ge(0), Lt(1)] = 0.0
    # Updates relative to the weights that training starts from, channel by channel.
    relative_updates: bool = False
    clip_norm: Positive | None = None  # largest global norm of the gradient; None: not clipped
    accumulate: Annotated[int, Gt(0), Le(2**20)] = 1  # batches averaged for one update
    latent_limit: Positive | None = None  # clip stored weights to +- this; None: do not
    refit_every: Count = 1  # steps that fitted scales serve; at alpha 1 each step fits anyway
    # Of the initial weights, the order and the augmentation.
    seed: Annotated[int, Ge(0), Lt(2**32)] = 0

    # The run's directory below runs_dir; the same name resumes.
    name: Annotated[str, AfterValidator(relative_name)] = "run"
    runs_dir: str = "runs"  # where runs lie
    allow_changed: bool = False  # resume with other flags than before; the record tells of it
    eval_every: Positive = 1.0  # epochs between evaluations and checkpoints
    # How many of the newest to keep, beside the best.
    keep_checkpoints: Annotated[int, Gt(0), Le(10_000)] = 2
    read_test: bool = True  # read the test set at the end; no, for trials that choose a setting
    watch: str | None = None  # parameter whose weights are kept as histograms, as conv3/kernel
    # Steps that one program runs, with images in memory. None: 20 on accelerators, 1 on CPUs.
    steps_per_call: Count | None = None
    parallel: Literal["pmap", "shard_map"] = "pmap"  # how the step is spread over the devices
    norm_group: Count | None = None  # devices that share batch-norm statistics; None: all of them
    # Several processes, each with devices of its own: the host and free port of process 0, how many
    # there are, and which one this is. On a TPU pod and in Slurm --distributed finds out all three.
    coordinator: str | None = None  # HOST:PORT of process 0
    processes: Count | None = None  # how many processes train together
    process: Annotated[int, Ge(0), Lt(2**31)] | None = None  # which one this is, from 0
    distributed: bool = False  # as the cluster says: a TPU pod, Slurm, Open MPI or Kubernetes
    profile: bool = False  # write a JAX trace of ten steps
    compilation_cache: str = "~/.cache/ab_jax"  # where compiled steps are kept; empty: nowhere

    @model_validator(mode="wrap")
    @classmethod
    def _named_by_flag(cls, values: Any, handler: Any) -> Any:
        """Pydantic's errors, in a line and by flag."""
        try:
            return handler(values)
        except ValidationError as error:
            raise FlagError("; ".join(_told(found) for found in error.errors())) from None


# Flags that cannot change what a run computes: they may differ when it is resumed. Where things
# lie, how the work is spread, what is kept and shown. (pmap and shard_map, and single steps
# and several in a call, differ in the last bits of a sum, as two machines do.)
FREE_FLAGS = frozenset(
    {
        *("name", "runs_dir", "data_dir", "compilation_cache"),
        *("parallel", "steps_per_call", "workers"),
        *("keep_checkpoints", "profile", "allow_changed"),
    }
)
# Flags that say where the processes run. They are no part of what a run is: it may go on elsewhere.
PLACES = frozenset({"coordinator", "processes", "process", "distributed"})


def recorded(config: Config) -> dict[str, Any]:
    """The flags that make a run what it is, for its record."""
    flags = dataclasses.asdict(config)
    return {name: value for name, value in flags.items() if name not in PLACES}


def _told(found: Any) -> str:
    """A finding of Pydantic's as `--epochs=-1.0: should be greater than 0`."""
    flag = found["loc"][0] if found["loc"] else "?"
    message = found["msg"].removeprefix("Value error, ").replace("Input should", "should")
    if found["type"] == "unexpected_keyword_argument":
        return f"--{flag}: there is no such flag"
    return f"--{flag}={found['input']!r}: {message}"
