r"""ResNet-20 on CIFAR-10: low-precision weights in all layers, in float, by STE, soft STE or AB.

Source: section 4.2 of arXiv 1512.03385 for the network (shortcuts without parameters), its batches,
crops and flips; alpha-blending (arXiv 1903.01061) for the method. Ramp, warm-up and cosine are our
choice.

Full size, on an accelerator, from scratch as in the table below:

    python -m experiments.resnet20_cifar10 --method=float --name=resnet20/float
    python -m experiments.resnet20_cifar10 --method=ste --weights=binary --name=resnet20/ste
    python -m experiments.resnet20_cifar10 --method=ab --weights=binary --name=resnet20/ab

Each is 9 million images of 0.24 GFLOP, 2.2e15 in all. To go on from the float network instead, add
--init_from=runs/resnet20/float.

To compare with: PARQ (arXiv 2503.15748), ResNet-20, test accuracy (%), means of three seeds:

    float 91.82      1 bit    ternary    2 bits
    STE              89.56      90.94     91.22
    BinaryRelax      89.98      91.25     91.57
    PARQ             90.48      91.45     91.71

Its code too quantizes every layer and trains for 200 epochs by SGD, rate 0.1, momentum 0.9, batches
of 128; unlike here on all 50,000 images, with a weight decay of 2e-4, rates divided by 10 at epochs
80, 120 and 150 (float: 100 and 150), a ramp that ends at 150, one scale a tensor, and four levels
+-v1 +-v2 at 2 bits, where int2 has three. So compare gaps to float, not levels.

Small, on one core, three to four minutes each (1,250 images/s, half a minute to compile):

    flags="--dataset=cifar10_jpeg --image_size=16 --width=0.5"
    python -m experiments.resnet20_cifar10 $flags --epochs=4 --method=float --name=small/float
    python -m experiments.resnet20_cifar10 $flags --epochs=4 --method=ab --name=small/ab \
        --init_from=runs/small/float
"""

from experiments import train
from experiments.settings.config import Config

DEFAULTS = Config(
    network="resnet20",
    epochs=200.0,
    weight_decay=1e-4,
    name="resnet20_cifar10",
)

if __name__ == "__main__":
    train.main(DEFAULTS, __doc__, "experiments.resnet20_cifar10")
