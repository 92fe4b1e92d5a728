"""What each width of weights costs in an ONNX file: size, and time in ONNX Runtime.

    python -m benchmarks.deploy_bits        (some six minutes on a core)

ResNet-50 v1 of random weights with 8-bit inputs of its layers, for one image, and the decoder of
`deploy_transformers` for one token, its matrices with a scale for each 32 rows. Each in two forms,
against float32: as files are written unless told otherwise, and with `integer_biases=True`
(ResNet-50) or `fused=True` (the decoder, activations rounded to 8 bits by ONNX Runtime).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

import ab_jax as ab
from ab_jax.linen import WithQuantizedInputs
from ab_jax.models.resnet import resnet50
from benchmarks import deploy, deploy_transformers
from benchmarks.measuring.benchmark_command import (
    Record,
    main,
    recorded,
    require_at_least_one,
    versions,
)
from benchmarks.measuring.ratios import in_rounds, markdown, over_rounds, ratio_cells

_IMAGE = 224
_FORMS = ("float32", "as written", "faster form")


def _widths(group_size: int | None) -> dict[str, ab.Quantizer]:
    shared: dict[str, Any] = {"group_size": group_size}
    return {
        "8 bits": ab.Uniform(bits=8, scale="absmax", **shared),
        "4 bits": ab.Uniform(bits=4, scale="absmax", **shared),
        "2 bits": ab.Uniform(bits=2, scale="absmax", **shared),
        "ternary": ab.Ternary(**shared),
        "1 bit": ab.Binary(**shared),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How often to time, and where to write the record."""

    rounds: int = 9  # measurements of each, after a round to warm up
    repeats: int = 5  # runs in a row in a measurement
    seed: int = 0  # of the order in which a round runs them
    out: Path = Path("results/bench_deploy_bits/one_core.json")


Files = dict[str, bytes]  # by the form


def resnet_files() -> Iterator[tuple[str, Files]]:
    """ResNet-50 v1 at each width."""
    plain = resnet50()
    quantized = WithQuantizedInputs(plain, deploy.INPUTS)
    variables = deploy.random_variables(plain, _IMAGE)
    float32 = deploy.to_file(plain, variables, _IMAGE)
    for width, quantizer in _widths(None).items():
        rules = ab.Rules([(r"(.*/)?kernel", quantizer), (r".*", None)])
        whole = {**variables, "params": ab.quantize(variables["params"], rules)}
        pair = (deploy.to_file(quantized, whole, _IMAGE, integer_biases=i) for i in (False, True))
        yield width, dict(zip(_FORMS, (float32, *pair), strict=True))


def decoder_files() -> Iterator[tuple[str, Files]]:
    """The decoder at each width."""
    params = deploy_transformers.decoder_params(np.random.default_rng(0))
    inputs = deploy_transformers.decoder_inputs()
    to_file = functools.partial(deploy_transformers.decoder_to_file, inputs=inputs)
    float32 = to_file(params)
    for width, quantizer in _widths(32).items():
        codes = ab.quantize(params, deploy_transformers.decoder_rules(quantizer))
        pair = (to_file(codes, fused=fused) for fused in (False, True))
        yield width, dict(zip(_FORMS, (float32, *pair), strict=True))


def _images() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {deploy.IMAGES: rng.standard_normal((1, _IMAGE, _IMAGE, 3), np.float32)}


def _token() -> dict[str, np.ndarray]:
    return deploy_transformers.named(deploy_transformers.decoder_inputs())


#: What is timed: files by their widths, and what they are fed.
SUBJECTS: dict[
    str, tuple[Callable[[], Iterator[tuple[str, Files]]], Callable[[], dict[str, np.ndarray]]]
] = {
    "ResNet-50 v1, 8-bit inputs": (resnet_files, _images),
    "decoder of 109 M weights": (decoder_files, _token),
}


@recorded("benchmarks.deploy_bits")
def run(config: Config) -> Record:
    """Time both networks at each width, on one core."""
    c = config
    require_at_least_one(c, "rounds", "repeats")
    seconds: dict[str, dict[str, Any]] = {}
    sizes: dict[str, dict[str, Any]] = {}
    for name, (make, feed) in SUBJECTS.items():
        fed = feed()
        seconds[name], sizes[name] = {}, {}
        for width, files in make():  # one at a time: sessions hold their weights multiplied out
            calls = {
                form: functools.partial(
                    deploy_transformers.seconds_of,
                    deploy_transformers.one_core_session(data, {}),
                    fed,
                    c.repeats,
                )
                for form, data in files.items()
            }
            seconds[name][width] = in_rounds(calls, rounds=c.rounds, seed=c.seed)
            sizes[name][width] = {form: len(data) for form, data in files.items()}
    return {"onnxruntime": onnxruntime.__version__, "bytes": sizes, "seconds": seconds}


def table(records: Sequence[Record]) -> str:
    """The Markdown table of a record: sizes and times as ratios to float32."""
    (record,) = records
    rows = []
    for name, by_width in record["seconds"].items():
        for width, by_form in by_width.items():
            sizes = record["bytes"][name][width]
            times = ratio_cells(by_form, lambda s: f"{1e3 * s:.1f} ms", digits=2)
            share = f"{sizes['as written'] / sizes['float32']:.3f}"
            rows.append([name, width, share, *(times[form] for form in _FORMS[1:])])
    caption = (
        f"Ratios to float32: {over_rounds(records)}; {record['hardware']}; "
        f"{versions(record, {'onnxruntime': record['onnxruntime']})}."
    )
    head = ["network", "weights", "file", *(f"time, {form}" for form in _FORMS[1:])]
    return f"{markdown(head, rows, left=2)}\n\n{caption}"


if __name__ == "__main__":
    main(Config, run, table, __doc__)
