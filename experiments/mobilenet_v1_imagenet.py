r"""MobileNet v1 with low-precision weights and activations, by STE, soft STE or AB.

Source: arXiv 1704.04861 for the network, alpha-blending (arXiv 1903.01061) for the method. Ramp,
learning rates, quantizers and the treatment of activations are our choice.

    python -m experiments.mobilenet_v1_imagenet --method=ab --weights=int8 --act_bits=8

Small, on two cores, about a quarter of an hour for both phases:

    python -m experiments.mobilenet_v1_imagenet --image_size=32 --classes=50 --width=0.25 \
        --float_epochs=12 --epochs=6 --method=ab --weights=int4 --name=small/ab

What to expect, at 16 pixels, 100 classes and width 0.25, is in docs/tiny_imagenet.md: float at
23 %, every method within a point of it at W8A8 and one or two below it at W4A8.
"""

from experiments import train
from experiments.settings.config import Config

DEFAULTS = Config(
    network="mobilenet_v1",
    weights="int8",
    outer_bits=8,  # the first and the last layer are a small part of the network and lose the most
    act_bits=8,
    dataset="tiny_imagenet",
    float_epochs=60.0,
    learning_rate=0.02,
    weight_decay=1e-4,
    name="mobilenet_v1",
)

if __name__ == "__main__":
    train.main(DEFAULTS, __doc__, "experiments.mobilenet_v1_imagenet")
