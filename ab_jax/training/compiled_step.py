"""The compiled step of a run: one step, or a chunk of them, with its numbers as arguments."""

from collections.abc import Callable, Iterator
from typing import Any

import optax

from ab_jax.data.stream import StreamedDataset
from ab_jax.describe import quantized_paths
from ab_jax.training.optimizers import OptimizerSettings
from ab_jax.training.parallel import Parallel
from ab_jax.training.run_settings import Training
from ab_jax.training.state import TrainState
from ab_jax.training.step_numbers import BLOCK, Schedules, StepNumbers
from ab_jax.training.train_step import Metrics, in_chunks, make_train_step

#: Steps between looks at the loss: a look waits for the device.
LOOK_EVERY = 20


def compile_train_step(
    training: Training, parallel: Parallel, *, streamed: bool = False, chunked: bool = False
) -> Callable[..., Any]:
    """The training step over all devices, which takes over the memory of the state it is given.

    It takes a block of `StepNumbers` behind the positions.

    Args:
      streamed: whether images and labels are shared out (`Feed.sharded`).
      chunked: whether it runs several steps, see `in_chunks`.
    """
    t = training

    def step(
        state: TrainState,
        images: Any,
        labels: Any,
        indices: Any,
        positions: Any,
        block: StepNumbers,
        *teacher: Any,
    ) -> tuple[TrainState, Metrics]:
        now = block.at(state.step)
        of_activations = now.activation_alpha
        run = make_train_step(
            t.model,
            _optimizer(t.optimizer, now),
            rules=t.rules,
            estimator=t.estimator,
            alpha=lambda step: now.alpha_of_weights,
            activation_alpha=None if of_activations is None else lambda step: of_activations,
            preprocessing=t.preprocessing,
            label_smoothing=t.label_smoothing,
            latent_limit=t.latent_limit,
            refit_every=t.refit_every,
            teacher_share=None if t.teacher is None else t.teacher_share,
        )
        return run(state, images, labels, indices, positions, *teacher)

    given = [False] if t.teacher is None else [False, False]
    sharded = [False, streamed, streamed, True, True, *given]
    return parallel.wrap(in_chunks(step) if chunked else step, sharded=sharded, donate=[0])


def schedules_of(training: Training, params: Any) -> Schedules:
    """Where the numbers of its steps come from."""
    t = training
    own = t.optimizer if isinstance(t.optimizer, OptimizerSettings) else None
    return Schedules(
        learning_rate=t.learning_rate,
        alpha=t.alpha,
        activation_alpha=t.activation_alpha,
        accumulate=t.accumulate,
        momentum=0.0 if own is None else own.momentum,
        weight_decay=0.0 if own is None else own.weight_decay,
        paths=tuple(quantized_paths(params, t.rules)),
    )


def _optimizer(
    optimizer: OptimizerSettings | optax.GradientTransformation, numbers: StepNumbers
) -> optax.GradientTransformation:
    if not isinstance(optimizer, OptimizerSettings):
        return optimizer
    n = numbers
    return optimizer.with_numbers(lambda count: n.learning_rate, n.momentum, n.weight_decay)


def steps_per_call(training: Training, parallel: Parallel) -> int:
    """How many steps a program runs.

    Raises:
      ValueError: several, of a stream; less than one, or more than there are numbers for.
    """
    asked = training.steps_per_call
    streamed = isinstance(training.dataset, StreamedDataset)
    if asked is None:
        on_cpus = parallel.devices[0].platform == "cpu"
        return 1 if on_cpus or streamed else LOOK_EVERY
    if not 1 <= asked <= BLOCK:
        raise ValueError(f"steps_per_call={asked} must be 1 to {BLOCK}.")
    if asked > 1 and streamed:
        raise ValueError(
            f"steps_per_call={asked}: photographs of a stream come step by step. Omit it."
        )
    return asked


def spans_of(first: int, steps: int, per_call: int, eval_every: int) -> Iterator[range]:
    """The steps of each call: up to multiples of `per_call`, evaluations, and the end.

    They do not depend on where a run was resumed, at the end of a call, so that it computes the
    same to the bit.
    """
    while first < steps:
        ends = [first - first % every + every for every in (per_call, eval_every)]
        end = min(*ends, steps)
        yield range(first, end)
        first = end


def metrics_of_steps(metrics: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The metrics of each of the steps that a call ran."""
    return [{name: values[i] for name, values in metrics.items()} for i in range(count)]


def optimizer_of_state(training: Training) -> optax.GradientTransformation:
    """The optimizer whose state is trained with: its numbers do not matter."""
    t = training
    if not isinstance(t.optimizer, OptimizerSettings):
        return t.optimizer
    return t.optimizer.with_numbers(t.learning_rate, t.optimizer.momentum, t.optimizer.weight_decay)
