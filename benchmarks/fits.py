"""What fitted scales are worth and what they cost: errors, compile time, bytes, memory, time.

    pip install ".[peers]"
    python -m benchmarks.fits        (about twenty minutes on two cores, most of them to compile)

Errors: blocks of several sizes and distributions, and the kernels of given networks, against the
least error there is (`measuring.least_errors`). Costs: a step of Adam of a decoder whose kernels
are all blended, beside the float step and beside Qwix's straight-through training to 4 bits, which
takes its scales from the largest weights. Compile times and steps run in turns
(`measuring.ratios`). Bytes and temporaries are the compiler's counts; bodies of loops are counted
as often as they run.
"""

import dataclasses
import importlib.metadata
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx
from safetensors.numpy import load_file

import ab_jax as ab
import ab_jax.nnx as ab_nnx
from ab_jax.training.parallel import cpu_options
from benchmarks.measuring import least_errors
from benchmarks.measuring.benchmark_command import (
    Record,
    main,
    recorded,
    require_at_least_one,
    versions,
)
from benchmarks.measuring.generated_decoder import UntiedDecoder, adam_step, kernel_rules
from benchmarks.measuring.ratios import (
    Seconds,
    going_on,
    in_rounds,
    markdown,
    over_rounds,
    ratio_cells,
)

FLOAT, QWIX, CARRIED = "float", "Qwix, 4 bits, absmax", ", fits of an earlier step"
FITTED: dict[str, Callable[..., ab.Quantizer]] = {
    "4 bits": lambda **sharing: ab.Uniform(bits=4, **sharing),
    "8 bits": lambda **sharing: ab.Uniform(bits=8, **sharing),
    "4 bits, zero point": lambda **sharing: ab.Uniform(bits=4, symmetric=False, **sharing),
    "ternary": lambda **sharing: ab.Ternary(**sharing),
    "2 scales": lambda **sharing: ab.LeastSquaresBinary(bits=2, **sharing),
    "3 scales": lambda **sharing: ab.LeastSquaresBinary(bits=3, **sharing),
    "4 scales": lambda **sharing: ab.LeastSquaresBinary(bits=4, **sharing),
}
# What tables call them.
_CALLED = {
    "4 bits, absmax": "Uniform, 4 bits, absmax",
    "4 bits": "Uniform, 4 bits",
    "8 bits": "Uniform, 8 bits",
    "4 bits, zero point": "Uniform, 4 bits, zero point",
    "ternary": "Ternary",
    **{f"{n} scales": f"LeastSquaresBinary, {n} bits" for n in (2, 3, 4)},
    f"4 bits{CARRIED}": f"Uniform, 4 bits{CARRIED}",
}
STEPS: dict[str, Callable[..., ab.Quantizer]] = {
    "4 bits, absmax": lambda **sharing: ab.Uniform(bits=4, scale="absmax", **sharing),
    **FITTED,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to measure, and where to write the record."""

    sizes: tuple[int, ...] = (9, 64, 512)  # weights in a block whose error is measured
    channels: int = 8  # blocks of each size and distribution
    starts: int = 200  # of the alternations that 3 and 4 scales are held against
    networks: tuple[Path, ...] = ()  # safetensors whose kernels' errors are measured too
    vocabulary: int = 8192  # of the decoder: tokens
    width: int = 512  # features of its residual stream
    layers: int = 8  # blocks
    heads: int = 8
    batch_size: int = 4
    context: int = 128  # tokens
    steps: tuple[str, ...] = (*STEPS, f"4 bits{CARRIED}", QWIX)  # beside float
    compilations: int = 3  # of each step, after one to warm up
    rounds: int = 9  # measurements of each step, after a round to warm up
    seed: int = 0  # of weights, and of the order in which a round runs the steps
    out: Path = Path("results/bench_fits/after.json")


@recorded("benchmarks.fits")
def run(config: Config) -> Record:
    """Measure errors and costs."""
    require_at_least_one(config, "sizes", "channels", "starts", "compilations", "rounds")
    return {
        "peers": {"qwix": importlib.metadata.version("qwix")},
        "errors": list(_errors(config)),
        **_costs(config),
    }


def _errors(config: Config) -> Iterator[dict[str, Any]]:
    """For each quantizer and size of block the errors over the least, by distribution."""
    rng = np.random.default_rng(config.seed)
    for size in config.sizes:
        w = least_errors.drawn(rng, size, config.channels)
        for name in FITTED:
            print(f"errors of {name}, blocks of {size}", file=sys.stderr)
            ratios = _over_least(config, name, w).reshape(-1, config.channels)
            for kind, of_kind in zip(least_errors.KINDS, ratios.tolist(), strict=True):
                yield {"quantizer": name, "blocks": kind, "size": size, "ratios": of_kind}
    for path in config.networks:
        kernels = list(_channels(path, config.channels, rng))
        for name in FITTED:
            print(f"errors of {name}, {path.stem}", file=sys.stderr)
            of_network = [r for w in kernels for r in _over_least(config, name, w).tolist()]
            yield {"quantizer": name, "blocks": path.stem, "size": None, "ratios": of_network}


def _channels(path: Path, count: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Up to so many channels of nine weights and more of each kernel: [weights, channels]."""
    for w in load_file(path).values():
        if w.ndim < 2:
            continue
        # PyTorch's convolutions, whose last two axes are those of the image, have channels first.
        axis = 0 if w.ndim == 4 and w.shape[2] == w.shape[3] <= 7 else -1
        axis = -2 if w.shape[-1] == 1 else axis  # Keras' depthwise convolutions
        columns = np.moveaxis(w, axis, -1).reshape(-1, w.shape[axis]).astype(np.float32)
        if len(columns) >= 9:
            yield columns[:, rng.permutation(columns.shape[1])[:count]]


def _over_least(config: Config, name: str, w: np.ndarray) -> np.ndarray:
    """The error of each column over the least there is; 1 where both are next to nothing."""
    quantizer = FITTED[name](axis=-1)
    value = np.asarray(quantizer.quantize(w).dequantize(), np.float64)
    found = np.square(w - value).sum(0)
    if isinstance(quantizer, ab.Uniform):
        least = least_errors.even_levels(w, quantizer.bits, quantizer.symmetric)
    elif isinstance(quantizer, ab.Ternary):
        least = least_errors.even_levels(w, 2, True)
    elif quantizer.bits == 2:
        least = least_errors.two_groups(w)
    else:
        rng = np.random.default_rng(config.seed)
        least = least_errors.bit_scales(w, quantizer.bits, config.starts, rng)
    squares = np.square(w.astype(np.float64)).sum(0)
    ratio = np.maximum(found, 1e-12 * squares) / np.maximum(least, 1e-12 * squares)
    return np.asarray(np.where(found <= 1e-6 * squares, 1, ratio))


def _costs(config: Config) -> dict[str, Any]:
    """What the steps take."""
    names = (FLOAT, f"{FLOAT}, again", *config.steps)
    lowered = {name: _lowered(config, name) for name in names}
    programs: dict[str, Any] = {}
    cases = {name: _compilation(lower, programs, name) for name, (lower, _) in lowered.items()}
    compiled = in_rounds(cases, rounds=config.compilations, seed=config.seed)
    steps = {name: going_on(*_step(programs[name], lowered[name][1])) for name in names}
    found = in_rounds(steps, rounds=config.rounds, seed=config.seed)
    return {
        "parameters": int(sum(x.size for x in jax.tree.leaves(lowered[FLOAT][1][0][0]))),
        "compile_seconds": {name: [t.wall for t in took] for name, took in compiled.items()},
        "seconds": {name: [t.wall for t in took] for name, took in found.items()},
        "bytes": {
            name: programs[name].cost_analysis()["bytes accessed"] + _of_loops(config, name)
            for name in names
        },
        "temporaries": {
            name: programs[name].memory_analysis().temp_size_in_bytes for name in names
        },
    }


def _step(program: Any, arguments: Any) -> tuple[Callable[[Any], Any], Any]:
    # A copy, since the step takes over its state's memory.
    state, *others = arguments
    return lambda state: program(state, *others), jax.tree.map(jnp.copy, state)


def _compilation(
    lower: Callable[[], Any], programs: dict[str, Any], name: str
) -> Callable[[], Seconds]:
    """Compiling a step once more, without the tracing; the program is kept."""

    def measured() -> Seconds:
        lowered = lower()
        wall, processor = time.perf_counter(), time.process_time()
        programs[name] = lowered.compile()
        return Seconds(time.perf_counter() - wall, time.process_time() - processor)

    return measured


def _lowered(config: Config, name: str) -> tuple[Callable[[], Any], Any]:
    """A step, to be compiled as often as one likes; and what it takes."""
    c = config
    model: nnx.Module = _model(c)
    rng = np.random.default_rng(c.seed)
    tokens = jnp.asarray(rng.integers(0, c.vocabulary, (c.batch_size, c.context)), jnp.int32)
    given: Any = None
    rules: Any = None
    if name == QWIX:
        rule = qwix.QuantizationRule(module_path=r"blocks/.*", weight_qtype="int4")
        model = qwix.quantize_model(model, qwix.QtProvider([rule]), tokens)
    elif not name.startswith(FLOAT):
        rules = kernel_rules(STEPS[name.removesuffix(CARRIED)])
        if name.endswith(CARRIED):
            given = {"fits": ab.fit(nnx.state(model, nnx.Param), rules)}

    def see(model: nnx.Module, alpha: Any, given: Any) -> nnx.Module:
        return model if rules is None else ab_nnx.blended(model, rules, alpha, **(given or {}))

    step, state = adam_step(model, see)
    # In the middle of the ramp, and not known to the compiler.
    arguments = state, tokens, jnp.float32(0.5), given
    options = cpu_options() if jax.default_backend() == "cpu" else None

    def lower() -> Any:
        jax.clear_caches()  # what was compiled once would be handed out again
        return jax.jit(step, donate_argnums=0, compiler_options=options).lower(*arguments)

    return lower, arguments


def _model(config: Config) -> UntiedDecoder:
    c = config
    return UntiedDecoder(
        vocabulary=c.vocabulary,
        width=c.width,
        heads=c.heads,
        layers=c.layers,
        context=c.context,
        rngs=nnx.Rngs(c.seed),
    )


def _of_loops(config: Config, name: str) -> float:
    """The bytes of the loops in a step's fits, but for one round of each, which is counted."""
    if name.startswith(FLOAT) or name == QWIX or name.endswith(CARRIED):
        return 0
    model = _model(dataclasses.replace(config, layers=1))
    rules, params = kernel_rules(STEPS[name]), nnx.state(model, nnx.Param)

    loop, rounds = jax.lax.fori_loop, set[int]()

    def bytes_without(skipped: int | None) -> float:
        """Of the fits, each loop's body counted once; none of loops of so many rounds."""

        def looped(start: int, stop: int, body: Callable[[Any, Any], Any], state: Any) -> Any:
            rounds.add(stop - start)
            return state if stop - start == skipped else loop(start, stop, body, state)

        jax.clear_caches()
        with mock.patch("jax.lax.fori_loop", looped):
            lowered = jax.jit(lambda params: ab.quantize(params, rules)).lower(params)
        program: Any = lowered.compile()
        return float(program.cost_analysis()["bytes accessed"])

    once = bytes_without(None)
    more = sum((count - 1) * (once - bytes_without(count)) for count in sorted(rounds))
    jax.clear_caches()
    return config.layers * more


def errors(records: Sequence[Record]) -> str:
    """The Markdown table of errors over the least there is, of records side by side."""
    head = ["levels", "blocks"]
    head += [f"{_version(record)}: {what}" for record in records for what in ("most", "median")]
    groups: dict[tuple[str, str], list[list[float]]] = {}
    for i, record in enumerate(records):
        for row in record["errors"]:
            blocks = row["blocks"] if row["size"] is None else f"of {row['size']}"
            cells = groups.setdefault((row["quantizer"], blocks), [[] for _ in records])
            cells[i] += row["ratios"]
    rows = [
        [_CALLED[name], blocks, *(_told(of(r)) for r in cells for of in (max, statistics.median))]
        for (name, blocks), cells in groups.items()
    ]
    c = records[0]["config"]
    caption = (
        f"Squared error / the least there is, most and median over blocks: {c['channels']} of each "
        f"of {len(least_errors.KINDS)} distributions ({', '.join(least_errors.KINDS)}), or up to "
        f"{c['channels']} channels of each kernel of a trained network. For 3 and 4 scales the "
        f"least that {c['starts']} random starts find. Errors below a millionth of the squares are "
        f"none."
    )
    return f"{markdown(head, rows, left=2)}\n\n{caption}"


def costs(records: Sequence[Record]) -> str:
    """The Markdown table of what steps take over the float step, of records side by side."""
    blocks = []
    for record in records:
        compilations = ratio_cells(record["compile_seconds"], lambda s: f"{s:.1f} s", 2)
        steps = ratio_cells(record["seconds"], lambda s: f"{s:.2f} s", 2)
        rows = [
            [
                _CALLED.get(name, name),
                compilations[name],
                f"{record['bytes'][name] / record['bytes'][FLOAT]:.2f}",
                f"{(record['temporaries'][name] - record['temporaries'][FLOAT]) / 1e6:+.0f} MB",
                steps[name],
            ]
            for name in record["seconds"]
        ]
        head = [f"version {_version(record)}", "compile time", "bytes", "temporaries", "step"]
        c = record["config"]
        caption = (
            f"A step of Adam / float: {over_rounds([record])} of the step, over "
            f"{c['compilations']} compilations. A decoder of {record['parameters'] / 1e6:.0f} "
            f"million parameters ({c['layers']} blocks of width {c['width']}, {c['vocabulary']} "
            f"tokens), {c['batch_size']} x {c['context']} tokens, float32, all kernels of the "
            f"blocks blended at alpha 0.5; {record['hardware']}; "
            f"{versions(record, record['peers'])}."
        )
        blocks.append(f"{markdown(head, rows)}\n\n{caption}")
    return "\n\n".join(blocks)


def table(records: Sequence[Record]) -> str:
    """Both tables."""
    return f"{errors(records)}\n\n{costs(records)}"


def _told(ratio: float) -> str:
    return f"{ratio:.3f}" if ratio < 100 else "above 100"


def _version(record: Record) -> str:
    return str(record["packages"].get("ab_jax", "0.1.0"))


if __name__ == "__main__":
    main(Config, run, table, __doc__)
