"""A picture of a part of an ONNX file: as it is written, and as ONNX Runtime computes it.

    python -m experiments.exported.graph_picture net.onnx --part=block3 --out=block.png

Left the operators of the file whose names begin with `--part`, those that what flows through the
network passes; beside each what it has of the weights. Right what ONNX Runtime makes of them.
"""

import dataclasses
import io
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ab_jax.files import write_whole
from experiments.reporting.themes import LIGHT
from experiments.settings.command_line import end_with_a_line
from experiments.settings.config import FlagError

_WIDTH, _ROW = 9.0, 0.55  # inches, and those of an operator
_DPI = 130
_INTEGERS = {
    *("MatMulIntegerToFloat", "QLinearConv", "QLinearMatMul", "QuantizeLinear", "Transpose"),
    *("DequantizeLinear", "MaxPool", "Pad", "Slice", "Concat", "Clip"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Which part of which file, and where to."""

    model: tyro.conf.Positional[Path]  # an ONNX file
    part: str  # what the names of its operators begin with
    out: Path  # the PNG to write


@dataclasses.dataclass(frozen=True)
class Step:
    """An operator that what flows through the network passes.

    Attributes:
      operator: its name in ONNX.
      arrays: dtypes and shapes of the weights that it takes.
    """

    operator: str
    arrays: tuple[str, ...]


def run(config: Config) -> None:
    """Draw the part."""
    write_whole(config.out, picture(steps(config.model, config.part)))


def steps(path: Path, part: str) -> dict[str, list[Step]]:
    """The operators of a part of a file, and those that ONNX Runtime makes of them.

    Raises:
      FlagError: no operator has such a name; names some that there are.
    """
    import onnx
    import onnxruntime

    model = onnx.load(path)
    written = [node for node in model.graph.node if node.name.startswith(f"{part}/")]
    written = [node for node in written if not _is_known(model, node.output[0])]
    if not written:
        names = sorted({node.name.split("/")[0] for node in model.graph.node})
        raise FlagError(
            f"No operator of {path} has a name that begins with --part={part}/. Names begin with "
            f"{', '.join(names[:20])}."
        )
    with tempfile.TemporaryDirectory() as folder:
        optimized_path = Path(folder) / "optimized.onnx"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Without what depends on the processor.
        level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.graph_optimization_level = level
        options.optimized_model_filepath = str(optimized_path)
        providers = ["CPUExecutionProvider"]
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
        optimized = onnx.load(optimized_path)
    computed = _between(optimized, written[0].input[0], written[-1].output[0])
    return {
        "in the file": [_step(model, node) for node in written],
        "in ONNX Runtime": [_step(optimized, node) for node in computed],
    }


def _is_known(model: Any, name: str) -> bool:
    """Whether a value depends on no input of the network."""
    makers = {output: node for node in model.graph.node for output in node.output}
    inputs = {value.name for value in model.graph.input}
    seen, left = set(), [name]
    while left:
        at = left.pop()
        if at in inputs:
            return False
        if at not in seen and at in makers:
            left += [x for x in makers[at].input if x]
        seen.add(at)
    return True


def _between(model: Any, first: str, last: str) -> list[Any]:
    """The operators from one value to another, in their order."""
    makers = {output: node for node in model.graph.node for output in node.output}
    wanted, left = set(), [last]
    while left:
        at = left.pop()
        if at != first and at in makers and at not in wanted:
            wanted.add(at)
            left += [x for x in makers[at].input if not _is_known(model, x)]
    return [node for node in model.graph.node if wanted & set(node.output)]


def _step(model: Any, node: Any) -> Step:
    """An operator with the weights that it takes, through operators of these alone."""
    from onnx import TensorProto

    arrays = {array.name: array for array in model.graph.initializer}
    makers = {output: n for n in model.graph.node for output in n.output}
    found, left = [], [x for x in node.input if x and _is_known(model, x)]
    while left:
        name = left.pop(0)
        if name in arrays:
            array = arrays[name]
            if len(array.dims) and max(array.dims) > 1:
                kind = TensorProto.DataType.Name(array.data_type).lower()
                found.append(f"{kind} {'x'.join(map(str, array.dims))}")
        elif name in makers:
            left += [x for x in makers[name].input if x]
    return Step(node.op_type, tuple(found))


def picture(columns: Mapping[str, Sequence[Step]]) -> bytes:
    """The PNG of columns of operators, from top to bottom."""
    rows = max(map(len, columns.values()))
    height = (rows + 1.2) * _ROW
    with mpl.rc_context({"font.size": 9, "text.color": LIGHT.text}):
        figure = Figure(figsize=(_WIDTH, height), facecolor=LIGHT.background, layout="constrained")
        for axes, (title, steps) in zip(
            figure.subplots(1, len(columns)), columns.items(), strict=True
        ):
            _column(axes, title, steps, rows)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def _column(axes: Axes, title: str, steps: Sequence[Step], rows: int) -> None:
    axes.set_title(title, loc="left", weight="bold")
    axes.set(xlim=(0, 10), ylim=(rows + 0.2, -0.7))
    axes.axis("off")
    for i, step in enumerate(steps):
        color = "#cfe8e4" if step.operator in _INTEGERS else "#f3e2c2"
        box = {"boxstyle": "round,pad=0.35", "facecolor": color, "edgecolor": "#8a8a8a"}
        axes.text(2.6, i, step.operator, ha="center", va="center", bbox=box)
        axes.text(5.4, i, ", ".join(step.arrays), ha="left", va="center", fontsize=7.5)
        if i:
            arrow = {"arrowstyle": "->", "color": "#8a8a8a", "shrinkA": 9, "shrinkB": 9}
            axes.annotate("", (2.6, i), (2.6, i - 1), arrowprops=arrow)


def main() -> None:
    """The command line."""
    config = tyro.cli(Config, description=__doc__, use_underscores=True)
    end_with_a_line(lambda: run(config))


if __name__ == "__main__":
    main()
