"""Weights trained elsewhere, loaded: the logits must be those of the network they come from.

Keras' are computed by Keras; those of PyTorch's state dicts by a network written out in numpy,
under the names that its weights have there.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from safetensors.numpy import save_file

from ab_jax.models.binarynet import BinaryNet
from ab_jax.models.efficientnet_lite import EfficientNetLite
from ab_jax.models.mobilenet import MobileNet
from ab_jax.models.pretrained import load_pretrained
from ab_jax.models.resnet import KERAS_V1, KERAS_V2, TIMM_V2, TORCHVISION, ResNet, resnet50
from tests.models import torch_writer


def logits_of(model: nn.Module, variables: Any, images: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(partial(model.apply, train=False))(variables, images))


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal but for the rounding of some fifty float32 layers."""
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


# Keras


def keras_reference(network: str, folder: Path) -> Path:
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # compiles faster, for one batch
        "KERAS_BACKEND": "jax",
        "KERAS_HOME": str(folder),  # Keras writes its settings there
    }
    script = Path(__file__).with_name("keras_reference.py")
    seed = str(np.random.SeedSequence().generate_state(1)[0])
    command = [sys.executable, str(script), network, str(folder), seed]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def keras_mobilenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Keras' MobileNet of width 0.25 and 10 classes, in three layouts."""
    return keras_reference("mobilenet", tmp_path_factory.mktemp("keras"))


MOBILENET = MobileNet(num_classes=10, width=0.25)


@pytest.mark.parametrize("file", ["weights.h5", pytest.param("model.h5", marks=pytest.mark.long)])
def test_mobilenet_of_keras(
    keras_mobilenet: Path, random_variables: Callable[..., Any], file: str
) -> None:
    variables = random_variables(MOBILENET, (64, 64, 3))
    loaded = load_pretrained(keras_mobilenet / file, variables)
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    reference = np.load(keras_mobilenet / "logits.npz")
    assert_close(logits_of(MOBILENET, loaded, reference["images"]), reference["logits"])


@pytest.mark.long
@pytest.mark.parametrize(("network", "variant"), [("resnet50", KERAS_V1), ("resnet50v2", KERAS_V2)])
def test_resnet_of_keras(
    tmp_path: Path, random_variables: Callable[..., Any], network: str, variant: Any
) -> None:
    keras_reference(network, tmp_path)
    model = resnet50(variant=variant, num_classes=10)
    loaded = load_pretrained(tmp_path / "weights.h5", random_variables(model, (64, 64, 3)))
    reference = np.load(tmp_path / "logits.npz")
    assert_close(logits_of(model, loaded, reference["images"]), reference["logits"])


def test_names_of_older_keras_files(
    keras_mobilenet: Path, tmp_path: Path, random_variables: Callable[..., Any]
) -> None:
    """Keras 2 wrote `conv1/kernel:0` and `depthwise_kernel:0`, and its first files `probs`."""
    variables = random_variables(MOBILENET, (64, 64, 3))
    expected = load_pretrained(keras_mobilenet / "weights.h5", variables)
    path = shutil.copy(keras_mobilenet / "weights.h5", tmp_path / "old.h5")
    with h5py.File(path, "r+") as file:
        for layer, group in file.items():
            old_names = []
            for name in group.attrs["weight_names"]:
                old = name.replace("/kernel", "/depthwise_kernel") if "_dw_" in name else name
                group.move(name, f"{old}:0")
                old_names.append(f"{old}:0".encode())
            del group.attrs["weight_names"]
            group.attrs["weight_names"] = old_names
            assert layer
    loaded = load_pretrained(path, variables)
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)


def keras_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file of Keras as safetensors of such networks name them."""
    with h5py.File(path) as file:
        return {
            f"{layer}/{'depthwise_' if '_dw_' in weight and 'kernel' in weight else ''}"
            f"{weight.rsplit('/', 1)[-1]}": np.asarray(group[weight])
            for layer, group in file.items()
            for weight in group.attrs["weight_names"]
        }


@pytest.mark.parametrize("decoration", ["", ":0"])
def test_safetensors_by_the_names_of_keras(
    keras_mobilenet: Path, tmp_path: Path, random_variables: Callable[..., Any], decoration: str
) -> None:
    variables = random_variables(MOBILENET, (64, 64, 3))
    arrays = keras_arrays(keras_mobilenet / "weights.h5")
    assert {"conv1/kernel", "conv_dw_1/depthwise_kernel", "conv_pw_13_bn/gamma"} < arrays.keys()
    path = tmp_path / "weights.safetensors"
    save_file({f"{name}{decoration}": array for name, array in arrays.items()}, path)
    expected = load_pretrained(keras_mobilenet / "weights.h5", variables)
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(path, variables), expected)


def test_one_weight_by_two_names_of_keras_is_refused(
    keras_mobilenet: Path, tmp_path: Path, random_variables: Callable[..., Any]
) -> None:
    arrays = keras_arrays(keras_mobilenet / "weights.h5")
    path = tmp_path / "weights.safetensors"
    save_file({**arrays, "conv_dw_1/kernel": arrays["conv_dw_1/depthwise_kernel"]}, path)
    with pytest.raises(ValueError, match=r"weights\.safetensors .*conv_dw_1/kernel.* twice"):
        load_pretrained(path, random_variables(MOBILENET, (64, 64, 3)))


def test_the_layout_of_keras_3_is_refused(
    keras_mobilenet: Path, random_variables: Callable[..., Any]
) -> None:
    variables = random_variables(MOBILENET, (64, 64, 3))
    with pytest.raises(ValueError, match=r"load it into its model.*model\.save\('name\.h5'\)"):
        load_pretrained(keras_mobilenet / "keras3.weights.h5", variables)


# PyTorch: networks written out, which name their weights and draw them when they first ask for them


class Torch:
    """PyTorch's layers in numpy, on [batch, channels, height, width], at test time."""

    def __init__(
        self, rng: np.random.Generator, *, epsilon: float = 1e-5, same: bool = False
    ) -> None:
        self.rng = rng
        self.epsilon = epsilon
        self.same = same  # pad as TensorFlow does
        self.weights: dict[str, np.ndarray] = {}

    def draw(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        values = self.rng.normal(size=shape) * np.sqrt(2 / max(1, np.prod(shape[1:])))
        if name.endswith("running_var"):
            values = self.rng.uniform(0.5, 2, shape)
        self.weights[name] = values.astype(np.float32)
        return self.weights[name]

    def conv(
        self, x: np.ndarray, name: str, features: int, window: int, stride: int = 1
    ) -> np.ndarray:
        kernel = self.draw(f"{name}.weight", (features, x.shape[1], window, window))
        return np.einsum("nchwij,ocij->nohw", self.windows(x, window, stride, 0.0), kernel)

    def depthwise(self, x: np.ndarray, name: str, stride: int, window: int = 3) -> np.ndarray:
        kernel = self.draw(f"{name}.weight", (x.shape[1], 1, window, window))
        return np.einsum("nchwij,cij->nchw", self.windows(x, window, stride, 0.0), kernel[:, 0])

    def max_pool(self, x: np.ndarray) -> np.ndarray:
        return self.windows(x, 3, 2, -np.inf).max((4, 5))

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        scale, shift, mean, var = (
            self.draw(f"{name}.{part}", (x.shape[1],))[:, None, None]
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        self.weights[f"{name}.num_batches_tracked"] = np.array(7)
        return (x - mean) / np.sqrt(var + self.epsilon) * scale + shift

    def head(self, x: np.ndarray, name: str, classes: int, *, conv: bool = False) -> np.ndarray:
        shape = (classes, x.shape[1], 1, 1) if conv else (classes, x.shape[1])
        kernel = self.draw(f"{name}.weight", shape).reshape(classes, -1)
        return x.mean((2, 3)) @ kernel.T + self.draw(f"{name}.bias", (classes,))

    def windows(self, x: np.ndarray, window: int, stride: int, padding: float) -> np.ndarray:
        """[batch, channels, height, width, window, window]."""
        sides = [(window // 2, window // 2)] * 2
        if self.same:
            # As much as the last window lacks; what is odd in it comes behind.
            lacking = [max(0, window - 1 - (size - 1) % stride) for size in x.shape[2:]]
            sides = [(lack // 2, lack - lack // 2) for lack in lacking]
        padded = np.pad(x, ((0, 0), (0, 0), *sides), constant_values=padding)
        return sliding_window_view(padded, (window, window), (2, 3))[:, :, ::stride, ::stride]


def timm_mobilenet(torch: Torch, x: np.ndarray) -> np.ndarray:
    x = np.clip(torch.norm(torch.conv(x, "conv_stem", 4, 3, 2), "bn1"), 0, 6)
    for stage, (features, blocks) in enumerate([(8, 1), (16, 2), (32, 2), (64, 6), (128, 2)]):
        for i in range(blocks):
            block, stride = f"blocks.{stage}.{i}", 2 if stage > 0 and i == 0 else 1
            x = torch.depthwise(x, f"{block}.conv_dw", stride)
            x = np.clip(torch.norm(x, f"{block}.bn1"), 0, 6)
            x = torch.conv(x, f"{block}.conv_pw", features, 1)
            x = np.clip(torch.norm(x, f"{block}.bn2"), 0, 6)
    return torch.head(x, "classifier", 5)


def efficientnet_lite(torch: Torch, x: np.ndarray) -> np.ndarray:
    """Of an eighth of the width; its names are those of the package with the published weights."""
    x = np.clip(torch.norm(torch.conv(x, "_conv_stem", 4, 3, 2), "_bn0"), 0, 6)
    stages = [(1, 1, 3, 2), (2, 2, 3, 3), (2, 2, 5, 5), (3, 2, 3, 10), (3, 1, 5, 14), (4, 2, 5, 24)]
    blocks = [
        (stride if first else 1, window, features)
        for count, stride, window, features in [*stages, (1, 1, 3, 40)]
        for first in [True] + [False] * (count - 1)
    ]
    for i, (stride, window, features) in enumerate(blocks):
        block, y = f"_blocks.{i}", x
        if i > 0:
            y = torch.conv(y, f"{block}._expand_conv", 6 * x.shape[1], 1)
            y = np.clip(torch.norm(y, f"{block}._bn0"), 0, 6)
        y = torch.depthwise(y, f"{block}._depthwise_conv", stride, window)
        y = np.clip(torch.norm(y, f"{block}._bn1"), 0, 6)
        y = torch.norm(torch.conv(y, f"{block}._project_conv", features, 1), f"{block}._bn2")
        x = x + y if x.shape == y.shape else y
    x = np.clip(torch.norm(torch.conv(x, "_conv_head", 160, 1), "_bn1"), 0, 6)
    return torch.head(x, "_fc", 5)


def timm_resnet(torch: Torch, x: np.ndarray) -> np.ndarray:
    x = np.maximum(torch.norm(torch.conv(x, "conv1", 4, 7, 2), "bn1"), 0)
    x = torch.max_pool(x)
    for stage, blocks in enumerate((2, 3, 1)):
        features = 4 * 2**stage
        for i in range(blocks):
            block, stride = f"layer{stage + 1}.{i}", 2 if stage > 0 and i == 0 else 1
            shortcut = x
            if i == 0:
                shortcut = torch.conv(x, f"{block}.downsample.0", 4 * features, 1, stride)
                shortcut = torch.norm(shortcut, f"{block}.downsample.1")
            y = torch.conv(x, f"{block}.conv1", features, 1)
            y = np.maximum(torch.norm(y, f"{block}.bn1"), 0)
            y = torch.conv(y, f"{block}.conv2", features, 3, stride)
            y = np.maximum(torch.norm(y, f"{block}.bn2"), 0)
            y = torch.norm(torch.conv(y, f"{block}.conv3", 4 * features, 1), f"{block}.bn3")
            x = np.maximum(y + shortcut, 0)
    return torch.head(x, "fc", 5)


def timm_resnetv2(torch: Torch, x: np.ndarray) -> np.ndarray:
    x = torch.max_pool(torch.conv(x, "stem.conv", 4, 7, 2))
    for stage, blocks in enumerate((2, 3, 1)):
        features = 4 * 2**stage
        for i in range(blocks):
            block, stride = f"stages.{stage}.blocks.{i}", 2 if stage > 0 and i == 0 else 1
            y = np.maximum(torch.norm(x, f"{block}.norm1"), 0)
            shortcut = x
            if i == 0:
                shortcut = torch.conv(y, f"{block}.downsample.conv", 4 * features, 1, stride)
            y = torch.conv(y, f"{block}.conv1", features, 1)
            y = np.maximum(torch.norm(y, f"{block}.norm2"), 0)
            y = torch.conv(y, f"{block}.conv2", features, 3, stride)
            y = np.maximum(torch.norm(y, f"{block}.norm3"), 0)
            x = torch.conv(y, f"{block}.conv3", 4 * features, 1) + shortcut
    x = np.maximum(torch.norm(x, "norm"), 0)
    return torch.head(x, "head.fc", 5, conv=True)


TIMM = {
    "mobilenet": (
        timm_mobilenet,
        MobileNet(num_classes=5, width=1 / 8, epsilon=1e-5, padding="symmetric"),
    ),
    "resnet": (timm_resnet, ResNet((2, 3, 1), 4, variant=TORCHVISION, num_classes=5)),
    "resnetv2": (timm_resnetv2, ResNet((2, 3, 1), 4, variant=TIMM_V2, num_classes=5)),
}


LITE = EfficientNetLite(num_classes=5, width=1 / 8)


def write_timm(rng: np.random.Generator, network: str, path: Path) -> tuple[Any, Any, Any]:
    """The network, random images and their logits; its weights are in the file."""
    reference, model = TIMM[network]
    return write(Torch(rng), reference, model, path)


def write(
    torch: Torch, reference: Callable[..., np.ndarray], model: nn.Module, path: Path
) -> tuple[Any, Any, Any]:
    rng = torch.rng
    images = rng.normal(size=(2, 48, 48, 3)).astype(np.float32)
    logits = reference(torch, images.transpose(0, 3, 1, 2).astype(np.float64))
    if path.suffix == ".safetensors":
        save_file(torch.weights, path)
    else:
        torch_writer.save(path, torch_writer.state_dict(torch.weights))
    return model, images, logits


@pytest.mark.parametrize("network", list(TIMM))
def test_networks_of_timm(
    rng: np.random.Generator, tmp_path: Path, random_variables: Callable[..., Any], network: str
) -> None:
    path = tmp_path / "weights.safetensors"
    model, images, logits = write_timm(rng, network, path)
    loaded = load_pretrained(path, random_variables(model, (48, 48, 3)))
    assert_close(logits_of(model, loaded, images), logits)


@pytest.mark.parametrize("name", ["net.pth", "net.pt", "net.safetensors"])
def test_efficientnet_lite_of_pytorch(
    rng: np.random.Generator, tmp_path: Path, random_variables: Callable[..., Any], name: str
) -> None:
    torch = Torch(rng, epsilon=1e-3, same=True)
    model, images, logits = write(torch, efficientnet_lite, LITE, tmp_path / name)
    loaded = load_pretrained(tmp_path / name, random_variables(model, (48, 48, 3)))
    assert_close(logits_of(model, loaded, images), logits)


def test_networks_of_timm_are_read_from_pytorchs_older_files(
    rng: np.random.Generator, tmp_path: Path, random_variables: Callable[..., Any]
) -> None:
    model, images, logits = write_timm(rng, "resnet", tmp_path / "resnet.pth")
    loaded = load_pretrained(tmp_path / "resnet.pth", random_variables(model, (48, 48, 3)))
    assert_close(logits_of(model, loaded, images), logits)


# What does not fit


@pytest.fixture
def timm_file(rng: np.random.Generator, tmp_path: Path) -> Path:
    path = tmp_path / "resnet.safetensors"
    write_timm(rng, "resnet", path)
    return path


def test_a_head_of_other_classes_is_kept_only_when_asked_for(
    timm_file: Path, random_variables: Callable[..., Any]
) -> None:
    fitting = TIMM["resnet"][1]
    expected = load_pretrained(timm_file, random_variables(fitting, (48, 48, 3)))
    for classes in (3, 5):
        variables = random_variables(fitting.clone(num_classes=classes), (48, 48, 3))
        if classes == 3:
            with pytest.raises(ValueError, match=r"fc.weight \(64, 5\), not \(64, 3\)") as error:
                load_pretrained(timm_file, variables)
            assert "--new_head" in str(error.value)
            assert "for the pairs" not in str(error.value)  # nothing but the head is wrong
        loaded = load_pretrained(timm_file, variables, new_head=True)
        assert loaded["params"]["head"]["kernel"].shape == (64, classes)
        np.testing.assert_array_equal(
            loaded["params"]["head"]["kernel"], variables["params"]["head"]["kernel"]
        )
        for variable in (loaded["params"], expected["params"]):
            variable["head"] = None
        jax.tree.map(np.testing.assert_array_equal, loaded, expected)


def test_a_misfit_lists_what_is_missing_unknown_and_of_another_shape(
    timm_file: Path, random_variables: Callable[..., Any]
) -> None:
    other = ResNet((2, 2, 2), 4, width=2, num_classes=5)
    with pytest.raises(ValueError, match="does not fit the network") as error:
        load_pretrained(timm_file, random_variables(other, (48, 48, 3)))
    message = str(error.value)
    assert "15 missing in the file" in message
    assert "layer3.1.conv1.weight" in message
    assert "15 unknown to the network: layer2.2.bn1.bias" in message
    assert "fc.weight (64, 5), not (128, 5)" in message
    assert "more" in message
    assert "for the pairs" in message


def test_the_variant_must_be_that_of_the_file(
    timm_file: Path, random_variables: Callable[..., Any]
) -> None:
    keras = TIMM["resnet"][1].clone(variant=KERAS_V1)
    with pytest.raises(ValueError, match=r"missing in the file: .*conv1\.bias"):
        load_pretrained(timm_file, random_variables(keras, (48, 48, 3)))
    with pytest.raises(ValueError, match=r"unknown to the network: .*layer1"):
        load_pretrained(timm_file, random_variables(TIMM["resnetv2"][1], (48, 48, 3)))


def test_other_variables_are_passed_on(
    timm_file: Path, random_variables: Callable[..., Any]
) -> None:
    variables = random_variables(TIMM["resnet"][1], (48, 48, 3))
    variables["ranges"] = {"stem": jnp.ones(3)}
    variables["params"]["stage0_block0"]["conv0"]["input_scale"] = jnp.full((), 0.5)
    loaded = load_pretrained(timm_file, variables)
    assert loaded["ranges"] is variables["ranges"]
    assert loaded["params"]["stage0_block0"]["conv0"]["input_scale"] == 0.5
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)


@pytest.mark.parametrize("name", ["resnet50.ckpt", "model.keras", "weights"])
def test_other_kinds_of_files_are_refused(
    tmp_path: Path, random_variables: Callable[..., Any], name: str
) -> None:
    with pytest.raises(ValueError, match=r"model\.save.*save_file") as error:
        load_pretrained(tmp_path / name, random_variables(TIMM["resnet"][1], (48, 48, 3)))
    assert name in str(error.value)


def test_keras_has_no_efficientnet_lite(
    tmp_path: Path, random_variables: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match="Keras applications, which have no EfficientNet-Lite"):
        load_pretrained(tmp_path / "lite.h5", random_variables(LITE, (48, 48, 3)))


def test_other_networks_are_refused(timm_file: Path, random_variables: Callable[..., Any]) -> None:
    variables = random_variables(BinaryNet(width=1e-6), (8, 8, 3))
    with pytest.raises(ValueError, match=r"for MobileNet, EfficientNetLite and ResNet.*'dense0'"):
        load_pretrained(timm_file, variables)
