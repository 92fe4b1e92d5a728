"""A network of Keras with random weights: its files, and its logits of random images.

`test_pretrained.py` runs this file in a process of its own, since Keras chooses its backend when it
is imported and knows nothing of this suite's strictness.

    KERAS_BACKEND=jax python keras_reference.py mobilenet FOLDER SEED
"""

import sys
from pathlib import Path

import numpy as np


def main(network: str, folder: Path, seed: int) -> None:
    import h5py
    import keras
    from keras.src.legacy.saving import legacy_h5_format

    build = {
        "mobilenet": lambda **fields: keras.applications.MobileNet(alpha=0.25, **fields),
        "resnet50": keras.applications.ResNet50,
        "resnet50v2": keras.applications.ResNet50V2,
    }[network]
    model = build(input_shape=(64, 64, 3), classes=10, weights=None, classifier_activation=None)
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        shape = weight.shape
        match weight.path.rsplit("/", 1)[-1]:
            case "kernel":
                # A depthwise kernel, [height, width, channels, 1], sums over 9 inputs alone.
                terms = np.prod(shape[:2] if shape[-1] == 1 else shape[:-1])
                values = rng.normal(size=shape) * np.sqrt(2 / terms)
            case "gamma" | "moving_variance":
                values = rng.uniform(0.5, 1.5, shape)
            case _:
                values = 0.3 * rng.normal(size=shape)
        weight.assign(values)
    images = rng.normal(size=(2, 64, 64, 3)).astype(np.float32)
    np.savez(folder / "logits.npz", images=images, logits=model.predict(images, verbose=0))
    with h5py.File(folder / "weights.h5", "w") as file:  # as Keras' published files are
        legacy_h5_format.save_weights_to_hdf5_group(file, model)
    if network == "mobilenet":
        model.save(folder / "model.h5")
        model.save_weights(folder / "keras3.weights.h5")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
