"""A small transformer on text, its kernels ternary: AB against STE, soft STE, float and rounding.

    python -m experiments.decoder_text --method=float --steps=1500 --name=start/seed0
    python -m experiments.decoder_text --method=ab --init_from=runs/start/seed0

(about a minute each on one core). Two blocks of width 64 predict the next byte of Python's own help
pages (`experiments/decoder/help_text.py` says why these). Attention and hidden layers have ternary
kernels; the embedding, which is the output layer too, has 8 bits; positions and norms stay in
float. The model is plain Flax NNX (`experiments/decoder/transformer.py`): an example of how a model
that is not ours, and a loop that is not ours, take the methods in by one line.

Every method goes on from the same float model of its seed, for equally many steps. A float run is
read twice, as trained and rounded after training. Readings are in bits per byte; to compare, what a
model reaches that knows each byte's frequency alone stands in the record.

The whole study, of which `results/decoder_text` holds the records (about 40 minutes on one core):

    python -m experiments.sweep decoder_text --keep=results -- --method=float --steps=1500 \\
        --seed=0..4,100 --name='decoder_text_start/seed{seed}'
    python -m experiments.sweep decoder_text --keep=results -- --method=float,ste,soft_ste,ab \\
        --learning_rate=0.003,0.006,0.012,0.024,0.048 --seed=100 \\
        --init_from='runs/decoder_text_start/seed{seed}' \\
        --name='decoder_text/trials/{method}_lr{learning_rate}_seed{seed}'
    python -m experiments.decoder.bits_per_byte results/decoder_text    (its best rates)
    python -m experiments.sweep decoder_text --keep=results -- --method=ab --seed=0..4 \\
        --read_test --learning_rate=BEST --init_from='runs/decoder_text_start/seed{seed}' \\
        --name='decoder_text/final/{method}_seed{seed}'            (and so for each method)
    python -m experiments.decoder.bits_per_byte results/decoder_text --page=docs/frameworks.md
"""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any, Literal

import tyro
from flax import nnx

from ab_jax import nnx as ab_nnx
from ab_jax.export.dictionaries import from_dictionaries, to_dictionaries
from ab_jax.export.packed import read_packed, write_packed
from ab_jax.training.records import RunDirectory
from experiments.decoder.decoder_training import bits_per_byte, make_optimizer, make_step, train
from experiments.decoder.help_text import Text, load_text
from experiments.decoder.transformer import RULES, Decoder
from experiments.settings.command_line import end_with_a_line
from experiments.settings.config import FREE_FLAGS
from experiments.settings.methods import METHODS, alpha_schedule

PARAMETERS = "params.safetensors"  # as trained, for further runs to start from
CODES = "net.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    # What the loss sees of the weights.
    method: Literal[
        "float", "ste", "soft_ste", "ab", "ab_compensated", "ab_then_ste", "float_then_ste", "parq"
    ] = "ab"
    ramp: Literal["cubic", "linear", "cosine", "sigmoid", "jump"] = "cubic"  # of alpha
    ramp_start: float = 0.0  # in parts of the run
    ramp_stop: float = 0.9  # in parts of the run
    steps: int = 1000  # updates
    batch_size: int = 16  # stretches of text
    context: int = 64  # bytes that a prediction sees at most
    learning_rate: float = 0.003  # peak, of Adam
    warmup: float = 0.05  # in parts of the run
    width: int = 64  # features of the residual stream
    layers: int = 2  # blocks
    heads: int = 4  # of attention, in a block
    seed: int = 0  # of the initial weights and the order of the text
    init_from: str | None = None  # directory of a run to start from
    eval_every: int = 200  # steps
    read_test: bool = False  # whether to read the test part, once, at the end
    runs_dir: str = "runs"
    name: str | None = None  # the run lives in RUNS_DIR/NAME; None: METHOD_seedSEED


def build(config: Config) -> Decoder:
    """The model with the weights that the run starts from.

    Raises:
      OSError, ValueError: those of `init_from` are not there or are of another model.
    """
    model = Decoder(
        width=config.width,
        heads=config.heads,
        layers=config.layers,
        context=config.context,
        rngs=nnx.Rngs(config.seed),
    )
    if config.init_from is not None:
        variables = read_packed(Path(config.init_from) / PARAMETERS).variables
        own = nnx.state(model, nnx.Param)
        nnx.update(model, from_dictionaries(variables["params"], like=own))
    return model


def run(config: Config, text: Text | None = None) -> dict[str, Any]:
    """Train, read, write codes and record; returns the record.

    Raises:
      FileExistsError: the run is complete already. ValueError, OSError: flags that do not fit; a
        directory that cannot be written or was begun with other flags; a loss that is not finite.
    """
    started = time.monotonic()
    if config.width % config.heads:
        raise ValueError(f"--heads={config.heads} does not divide --width={config.width}.")
    text = load_text() if text is None else text
    method = METHODS[config.method]
    estimator = method.estimator
    alpha = alpha_schedule(method, config.ramp, config.ramp_start, config.ramp_stop, config.steps)
    model = build(config)
    optimizer = make_optimizer(model, config.learning_rate, config.steps, config.warmup)
    sizes = {"batch_size": config.batch_size, "context": config.context}
    path = Path(config.runs_dir) / (config.name or f"{config.method}_seed{config.seed}")
    flags = dataclasses.asdict(config)
    directory = RunDirectory(
        path, experiment="experiments.decoder_text", config=flags, data=text.facts, free=FREE_FLAGS
    )
    with directory:
        directory.forget_after(0)  # a run that was cut off begins anew: it takes a minute

        def readings(part: Any, step: int) -> dict[str, float]:
            # The same codes as exported ones; and the model that the loss sees.
            codes = ab_nnx.quantize(model, RULES)
            seen = ab_nnx.blended(model, RULES, float(alpha(step)), estimator=estimator)
            return {
                "blended": bits_per_byte(seen, part, **sizes),
                "quantized": bits_per_byte(ab_nnx.with_params(model, codes), part, **sizes),
            }

        def look(step: int, loss: float) -> None:
            line = {"step": step, "alpha": float(alpha(step)), "training": loss / math.log(2)}
            line |= readings(text.validation, step)
            directory.write_metrics(line)
            print(" ".join(f"{name} {value:.4g}" for name, value in line.items()), flush=True)

        train(
            model,
            optimizer,
            make_step(RULES, estimator, alpha),
            text.train,
            steps=config.steps,
            seed=config.seed,
            every=config.eval_every,
            look=look,
            **sizes,
        )
        last = directory.metrics[-1]
        params = to_dictionaries(nnx.state(model, nnx.Param))
        write_packed(path / PARAMETERS, {"params": params})
        codes = to_dictionaries(ab_nnx.quantize(model, RULES))
        write_packed(path / CODES, {"params": codes}, rules=RULES, network=flags)
        summary = {
            "validation": {key: last[key] for key in ("blended", "quantized")},
            "test": readings(text.test, config.steps) if config.read_test else None,
            "seconds": time.monotonic() - started,
        }
        return directory.complete(summary)


def main() -> None:
    """The command line."""
    config = tyro.cli(Config, description=__doc__, use_underscores=True)
    end_with_a_line(lambda: run(config))


if __name__ == "__main__":
    main()
