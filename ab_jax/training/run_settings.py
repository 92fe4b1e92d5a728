"""All that a run of training is made of, as plain values."""

import dataclasses
from pathlib import Path

import optax

from ab_jax.blend import AlphaSchedule
from ab_jax.data.dataset import Dataset
from ab_jax.data.stream import StreamedDataset
from ab_jax.estimators import Estimator, ScaledEstimator
from ab_jax.linen import Model
from ab_jax.rules import Rules
from ab_jax.training.optimizers import OptimizerSettings
from ab_jax.training.starting import CalibratedStart
from ab_jax.training.train_step import Preprocessing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """All that a run is made of, as plain values.

    Attributes:
      model: a Linen module as `make_train_step` takes it.
      dataset: images in memory, or a stream of photographs.
      preprocessing: how they are augmented and normalized.
      rules, estimator: what the loss sees of the weights; an estimator that takes scales has them
        trained, from those of the weights that the run starts with.
      alpha: the ramp, a schedule over steps, of all weights or by path (see `make_train_step`).
      activation_alpha: the ramp of quantized activations; None: the same.
      optimizer: its settings, which enter the compiled step as numbers; or an optax optimizer of
        one's own, whose numbers are a part of the program.
      learning_rate: the schedule over updates; with an optimizer of one's own for the records.
      batch_size: images in a batch, over all devices.
      steps: length of the run, in batches.
      eval_every: steps between evaluations; each writes a checkpoint.
      keep_checkpoints: how many of the newest to keep, beside the best.
      seed: of the initial weights, the order of the images and their augmentation.
      accumulate: batches in an update (see `make_optimizer`).
      label_smoothing, latent_limit, refit_every: see `make_train_step`.
      init_from: what to start from: the directory of a run, for its weights and batch statistics,
        or a file of weights trained elsewhere (`ab_jax.models.pretrained`).
      new_head: whether a head of other classes in that file is left out.
      rebase_norm: whether the batch norm of what it starts from is re-based (see
        `ab_jax.training.rebasing`), after its calibration.
      calibration: how the weights of what it starts from are calibrated; the estimator takes
        scales (`ab_jax.learned_scales`), which begin as those of the codes. None: they are not.
      teacher: a float network to learn from, as `init_from`; None: there is none.
      teacher_share: of the loss, see `make_train_step`.
      read_test: whether to read the test set, once, at the end.
      steps_per_call: how many steps one program runs; None: 20 on accelerators, 1 on CPUs, where a
        convolution's gradient within a loop takes many times as long, and of a stream.
      watch: path of a quantized parameter whose effective weights are kept as histograms.
      profile: whether to write a JAX trace of ten steps into the run's directory.
    """

    model: Model
    dataset: Dataset | StreamedDataset
    preprocessing: Preprocessing
    rules: Rules
    estimator: Estimator | ScaledEstimator
    alpha: AlphaSchedule
    optimizer: OptimizerSettings | optax.GradientTransformation
    learning_rate: optax.Schedule
    batch_size: int
    steps: int
    eval_every: int
    seed: int
    accumulate: int = 1
    label_smoothing: float = 0.0
    latent_limit: float | None = None
    refit_every: int = 1
    init_from: Path | None = None
    new_head: bool = False
    rebase_norm: bool = False
    calibration: CalibratedStart | None = None
    teacher: Path | None = None
    teacher_share: float = 1.0
    activation_alpha: optax.Schedule | None = None
    keep_checkpoints: int = 2
    read_test: bool = True
    steps_per_call: int | None = None
    watch: str | None = None
    profile: bool = False
