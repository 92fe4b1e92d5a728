#!/usr/bin/env bash
# Packs .gpu/ in the clone: all that a GPU host without network needs to train at full size. The host
# is taken to have Python 3.12 with JAX for CUDA, NumPy, SciPy, OpenCV, Pillow, scikit-learn,
# Matplotlib, rich, h5py, PyArrow, tensorstore, protobuf, psutil and msgpack; what else the project
# imports travels along.
#   usage, from the clone's root:  bash gpu/bundle.sh CIFAR10_JPEG_ARCHIVE
# GPU_PYTHON names another Python of the host (3.12).
set -euo pipefail
: "${1:?the archive that python -m ab_jax.data.prepare cifar10_jpeg --source takes}" "${GPU_PYTHON:=3.12}"
archive=$(realpath -e "$1")
cd "$(dirname "$0")/.."

rm -rf .gpu && mkdir .gpu
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
for_host=(--only-binary=:all: --implementation cp --python-version "$GPU_PYTHON")
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
  for_host+=(--platform "${tag}_x86_64")
done
download=(python3 -m pip download -q -d "$wheels" -c requirements.txt "${for_host[@]}")

# What requirements.txt brings beyond the host's, by name, for pip would bring the host's too. uvloop
# stays out: it is large, and nothing here has an event loop.
packages=(absl-py aiofiles aqtp array-record attrs certifi charset-normalizer dm-tree einops etils
  flatbuffers flax fsspec googleapis-common-protos grain humanize idna immutabledict
  importlib-resources optax orbax-checkpoint portpicker prometheus-client pyyaml qwix requests
  safetensors simple-parsing simplejson six tensorboardx tensorflow-datasets tensorflow-metadata
  termcolor toml tqdm treescope urllib3 wrapt zipp)
"${download[@]}" --no-deps "${packages[@]}"
# These need nothing of the host's, and the very releases that pip finds for them.
with_their_own=(pydantic tyro) # annotated-types, docstring-parser, pydantic-core, typeguard, typing-...
"${download[@]}" "${with_their_own[@]}"
python3 -m pip wheel -q --no-deps -w "$wheels" promise # has no wheel of its own

# Unpacked and packed again they take half the room of wheels.
python3 -m pip install -q --no-index --no-deps --no-compile --ignore-requires-python \
  "${for_host[@]}" --target "$wheels/site" "$wheels"/*.whl
tar cJf .gpu/packages.tar.xz -C "$wheels/site" .
cp "$archive" .gpu/cifar10_jpeg.tar.xz
cp gpu/run.sh .gpu/
git describe --always --dirty --abbrev=40 --exclude='*' > .gpu/revision

bytes() { xargs -0 stat -c %s | awk '{ sum += $1 } END { print sum }'; }
tracked=$(git ls-files -z --cached --others --exclude-standard | bytes)
bundle=$(find .gpu -type f -print0 | bytes)
echo "bundle: $((bundle / 1000000)) MB; other files of the clone: $((tracked / 1000000)) MB"
if [ "$tracked" -ge 24000000 ] || [ $((tracked + bundle)) -ge 60000000 ]; then
  echo "error: that is too much: the host takes 60 MB, the clone's files should stay below 24" >&2
  exit 1
fi
echo "On the host, in the clone's root:  OUT=DIRECTORY bash .gpu/run.sh"
