#!/usr/bin/env bash
# Packs .gpu/ in the clone: all that a GPU host without network needs to train at full size. The host
# is taken to have Python 3.12 with JAX for CUDA, NumPy, SciPy, OpenCV, Pillow, scikit-learn,
# Matplotlib, rich, h5py, PyArrow, tensorstore, protobuf, psutil and msgpack; what else the project
# imports travels as wheels.
#   usage, from the clone's root:  bash gpu/bundle.sh CIFAR10_JPEG_ARCHIVE
# GPU_PYTHON names another Python of the host (3.12).
set -euo pipefail
: "${1:?the archive that python -m ab_jax.data.prepare cifar10_jpeg --source takes}" "${GPU_PYTHON:=3.12}"
[ -f "$1" ] || { echo "error: there is no $1" >&2; exit 1; }
cd "$(dirname "$0")/.."

rm -rf .gpu && mkdir -p .gpu/wheels
tags=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
  tags+=(--platform "${tag}_x86_64")
done
# One at a time: pip would look for wheels of what the host has, too.
for name in flax optax orbax-checkpoint grain array-record tensorflow-datasets tensorflow-metadata \
    tensorboardX tyro docstring-parser typeguard pydantic annotated-types typing-inspection \
    typing-extensions etils immutabledict dm-tree simple_parsing toml termcolor importlib-resources \
    treescope aiofiles uvloop safetensors humanize simplejson zipp six attrs googleapis-common-protos; do
  python3 -m pip download -q --no-deps --only-binary=:all: --implementation cp \
    --python-version "$GPU_PYTHON" "${tags[@]}" -d .gpu/wheels "$name"
done
# pydantic wants the very release of its core that it was made with.
core=$(python3 - .gpu/wheels/pydantic-*.whl <<'PY'
import re, sys, zipfile
wheel = zipfile.ZipFile(sys.argv[1])
(metadata,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
print(re.search(r"Requires-Dist: (pydantic-core==\S+)", wheel.read(metadata).decode())[1])
PY
)
python3 -m pip download -q --no-deps --only-binary=:all: --implementation cp \
  --python-version "$GPU_PYTHON" "${tags[@]}" -d .gpu/wheels "$core"
python3 -m pip wheel -q --no-deps -w .gpu/wheels promise # has no wheel of its own
cp "$1" .gpu/cifar10_jpeg.tar.xz
cp gpu/run.sh .gpu/

tracked=$(git ls-files -z 2>/dev/null | xargs -0 -r du -cb | tail -n 1 | cut -f1)
echo "bundle: $(du -sm .gpu | cut -f1) MB; tracked files: $((${tracked:-0} / 1000000)) MB"
echo "On the host, in the clone's root:  OUT=DIRECTORY bash .gpu/run.sh"
