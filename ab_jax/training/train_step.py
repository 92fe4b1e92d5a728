"""What one device does in a training step, an evaluation step and a re-estimation step.

Each is written once and mapped over the devices by `ab_jax.training.parallel`. A step picks its
images by index out of uint8 images on the device: the whole training set, or its share of a batch.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from ab_jax.blend import Alpha, AlphaSchedule, blend, clip_latent, fit, mean_alpha
from ab_jax.data.augment import augment, normalize
from ab_jax.estimators import Estimator, ScaledEstimator
from ab_jax.learned_scales import keep_scales_positive
from ab_jax.linen import CUT_OFF, NOT_FINITE, RANGES, Model, WithQuantizedInputs, module_of, takes
from ab_jax.rules import Rules
from ab_jax.training.distillation import divergence
from ab_jax.training.finite import finite_leaves
from ab_jax.training.parallel import AXIS
from ab_jax.training.state import TrainState

Metrics = dict[str, Array]

# What a step of a model with quantized inputs tells of them.
_MEASURED = [NOT_FINITE, CUT_OFF]


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """From uint8 images to what the model sees.

    Attributes:
      mean, std: per channel, for pixels in 0 to 1.
      pad: pixels of padding for random crops in training; 0: no crops.
      flip: whether to flip images at random in training.
      dtype: of the result.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int = 0
    flip: bool = False
    dtype: DTypeLike = jnp.float32

    def normalize(self, images: Array) -> Array:
        """Normalized images of the same shape."""
        return normalize(images, self.mean, self.std, self.dtype)

    def augment(self, key: Array, images: Array, positions: Array) -> Array:
        """Augmented images, still uint8; an image's randomness depends on its position alone."""
        return augment(key, images, positions, pad=self.pad, flip=self.flip)


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    rules: Rules,
    estimator: Estimator | ScaledEstimator,
    alpha: AlphaSchedule,
    activation_alpha: optax.Schedule | None = None,
    preprocessing: Preprocessing,
    label_smoothing: float = 0.0,
    latent_limit: float | None = None,
    refit_every: int = 1,
    teacher_share: float | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The training step of one device.

    Args:
      model: takes images, `train` and, if its activations follow a ramp, `alpha`; synchronizes its
        batch statistics over `AXIS`, or over groups of it (`axis_index_groups`, as our models have
        it).
      optimizer: applied to gradients averaged over the devices.
      rules, estimator: what the loss sees of each parameter; an estimator that takes scales has
        those of the state, which are trained with the parameters.
      alpha: a schedule of the step, for the parameters; it may give a function of the path, where
        layers follow ramps of their own (`ab_jax.layerwise_ramp`).
      activation_alpha: another one for what the model is given as `alpha`; None: the same, or the
        mean over the parameters where they have their own.
      preprocessing: of the images.
      label_smoothing: share of the target that goes to all classes alike.
      latent_limit: clip the stored quantized weights to this after each update.
      refit_every: steps that what the quantizers fit serves, in a state that holds it (`fits`); at
        alpha 1 every step fits, so that the loss sees the codes that there are in the end.
      teacher_share: the share of the loss that is the divergence from a teacher's predictions
        (`ab_jax.training.distillation`); the rest is the cross-entropy. None: there is no teacher.

    Returns:
      `(state, images, labels, indices, positions) -> (state, metrics)`, with uint8 images
      [N, H, W, C] and int32 labels [N] of the whole set, int32 indices [B] of this device's images
      and their int32 positions [B] in the global batch. The metrics are of the global batch: loss,
      accuracy, the (mean) alpha, and `finite`, bool [leaves], of the gradients by leaf; of a
      model that measures ranges also `not_finite_inputs`, how many were left alone, since what
      was measured was not finite, and `cut_off`, float32 [inputs], the share that unsigned ranges
      cut off of each, in the order of the leaves of `RANGES`.

      With a teacher its variables are a last argument: those of the module without quantized
      inputs, which sees the same augmented images, with its running statistics and its activations
      as they are in float (alpha 0).
    """

    def loss_fn(
        trained: Any,
        state: TrainState,
        images: Array,
        labels: Array,
        alpha_now: Alpha,
        of_activations: ArrayLike,
        taught: Array | None,
    ) -> tuple[Array, tuple[dict[str, Any], Array]]:
        at = state.with_trained(trained)
        effective = blend(
            at.params, rules, alpha_now, estimator=estimator, scales=at.scales, fits=at.fits
        )
        logits, model_state = model.apply(
            {"params": effective, **state.model_state},
            images,
            **arguments_of(model, train=True, alpha=of_activations),
            mutable=[*state.model_state, *(_MEASURED if RANGES in state.model_state else [])],
        )
        targets = optax.smooth_labels(
            jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), label_smoothing
        )
        loss = jnp.mean(optax.softmax_cross_entropy(logits, targets))
        if taught is not None and teacher_share is not None:
            loss = teacher_share * divergence(taught, logits) + (1 - teacher_share) * loss
        return loss, (dict(model_state), logits)

    def train_step(
        state: TrainState,
        images: Array,
        labels: Array,
        indices: Array,
        positions: Array,
        teacher: Any = None,
    ) -> tuple[TrainState, Metrics]:
        alpha_now = alpha(state.step)
        mean = mean_alpha(state.params, rules, alpha_now)
        of_activations = mean if activation_alpha is None else activation_alpha(state.step)
        if state.fits is not None:
            fits = jax.lax.cond(
                (state.step % refit_every == 0) | (mean == 1),
                lambda state: fit(state.params, rules),
                lambda state: state.fits,
                state,
            )
            state = dataclasses.replace(state, fits=fits)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        batch = preprocessing.augment(key, images[indices], positions)
        batch = preprocessing.normalize(batch)
        targets = labels[indices]
        taught = None
        if teacher_share is not None:
            module = module_of(model)
            taught = module.apply(teacher, batch, **arguments_of(module, train=False, alpha=0.0))
        # shard_map sums the gradient of replicated parameters by itself, pmap does not. Parameters
        # that differ by device in type get their device's own gradient from both.
        trained = jax.lax.pcast(state.trained, AXIS, to="varying")
        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (model_state, logits)), grads = gradient(
            trained, state, batch, targets, alpha_now, of_activations, taught
        )
        correct = jnp.mean((jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32))
        counts = jax.tree.leaves(model_state.pop(NOT_FINITE, {}))
        cut_off = jax.tree.leaves(model_state.pop(CUT_OFF, {}))
        grads, loss, accuracy = jax.lax.pmean((grads, loss, correct), AXIS)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
        updated = state.with_trained(optax.apply_updates(state.trained, updates))
        params, scales = updated.params, updated.scales
        if latent_limit is not None:
            params = clip_latent(params, rules, limit=latent_limit)
        if scales is not None:
            scales = keep_scales_positive(scales, state.scales)
        new_state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            scales=scales,
            model_state=_equal_on_all_devices(model, model_state),
            opt_state=opt_state,
        )
        metrics = {
            "loss": loss,
            "accuracy": accuracy,
            "alpha": mean,
            "finite": finite_leaves(grads),
            **({"not_finite_inputs": sum(map(jnp.sum, counts))} if counts else {}),
            **({"cut_off": jnp.stack([jnp.max(share) for share in cut_off])} if cut_off else {}),
        }
        return new_state, metrics

    return train_step


def in_chunks(step: Callable[..., tuple[TrainState, Metrics]]) -> Callable[..., Any]:
    """Several training steps of one device as one program.

    Args:
      step: as `make_train_step` returns it, or with further arguments.

    Returns:
      The same function of int32 indices [B, n], those of n steps side by side; its metrics have a
      leading axis of n.
    """

    def steps(
        state: TrainState, images: Array, labels: Array, indices: Array, *others: Any
    ) -> tuple[TrainState, Metrics]:
        return jax.lax.scan(
            lambda state, own: step(state, images, labels, own, *others), state, indices.T
        )

    return steps


def make_eval_step(model: Model, preprocessing: Preprocessing) -> Callable[..., Metrics]:
    """The evaluation step of one device.

    Returns:
      `(params, model_state, alpha, images, labels, indices, mask) -> sums`: `loss`, `correct` and
      `count`, summed over the images of the global batch whose bool mask [B] is set. The parameters
      are used as they are; alpha is that of the activations.
    """

    def eval_step(
        params: Any,
        model_state: Any,
        alpha: ArrayLike,
        images: Array,
        labels: Array,
        indices: Array,
        mask: Array,
    ) -> Metrics:
        variables = {"params": params, **model_state}
        batch = preprocessing.normalize(images[indices])
        call = arguments_of(model, train=False, alpha=alpha)
        logits = jnp.asarray(model.apply(variables, batch, **call))
        targets = labels[indices]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        sums = {
            "loss": jnp.sum(jnp.where(mask, losses, 0)),
            "correct": jnp.sum((jnp.argmax(logits, axis=-1) == targets) & mask),
            "count": jnp.sum(mask),
        }
        return jax.lax.psum(sums, AXIS)

    return eval_step


def make_batch_stats_step(model: Model, preprocessing: Preprocessing) -> Callable[..., Any]:
    """The step of one device that measures the statistics of a batch.

    Returns:
      `(params, model_state, alpha, images, indices) -> measured` with the collection `batch_stats`
      of these images alone, augmented as in training: the weights have learned to work with those.
      (Statistics of images without the black borders of random crops cost BinaryNet 2 points.)
    """
    if hasattr(module_of(model), "batch_stats_momentum"):  # a network without batch norm has none
        model = model.clone(batch_stats_momentum=0.0)

    def batch_stats_step(
        params: Any, model_state: Any, alpha: ArrayLike, images: Array, indices: Array
    ) -> Any:
        variables = {"params": params, **model_state}
        # Always the same crops of an image, so that a network is always read alike.
        batch = preprocessing.augment(jax.random.key(0), images[indices], indices)
        _, measured = model.apply(
            variables,
            preprocessing.normalize(batch),
            **arguments_of(model, train=True, alpha=alpha),
            mutable=["batch_stats"],
        )
        return _equal_on_all_devices(model, measured)

    return batch_stats_step


def arguments_of(model: Model, *, train: bool, alpha: ArrayLike) -> dict[str, Any]:
    """The arguments of a model's call, `alpha` only if it has activations that take it."""
    takes_alpha = isinstance(model, WithQuantizedInputs) or takes("alpha", model)
    return {"train": train, **({"alpha": alpha} if takes_alpha else {})}


def _equal_on_all_devices(model: Model, model_state: Any) -> Any:
    """The collections with one set of batch statistics, whatever the groups that measured them.

    The running statistics stand for those that the network has learned to work with, of batches as
    large as a group's: the mean over the groups is what one group would see in as many steps. (The
    variance of the whole batch would be larger, by that of the groups' means.)
    """
    if getattr(module_of(model), "axis_index_groups", None) is None:
        return model_state
    return {**model_state, "batch_stats": jax.lax.pmean(model_state["batch_stats"], AXIS)}
