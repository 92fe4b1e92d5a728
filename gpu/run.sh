#!/usr/bin/env bash
# One GPU without network, for MINUTES: studies at full size and benchmarks, whose records come back in OUT.
#   NAME=binarynet_full_size   (or nothing) BinaryNet in float, by STE, AB and PARQ; seeds in turn
#   NAME=resnet20_full_size    a stretch: ResNet-20, 200 epochs, seeds in one program
#   NAME=benchmarks            benchmarks.step, bfloat16_step, device_integers and peers
# Run in the root of the clone's copy (whole seeds: gpu/whole_seeds.py):
#   does it run?  NAME=smoke CHANGES="epochs=1.0 warmup=0.1" SEEDS=0 MINUTES=4 OUT=DIRECTORY bash .gpu/run.sh
#   the study     OUT=DIRECTORY bash .gpu/run.sh
#   a rehearsal   JAX_PLATFORMS=cpu NAME=toy CHANGES="epochs=0.02 warmup=0.0 width=0.03 image_size=8" ...
# CHANGES are flags of all runs in place of those of STUDY, for a study of another NAME.
set -uo pipefail
: "${OUT:?a directory for what comes back}" "${NAME:=binarynet_full_size}" "${MINUTES:=8}"
: "${STUDY:=binarynet_full_size}" "${SEEDS:=0..9}" "${TOGETHER:=5}" "${CHANGES:=}" "${SIZE:=}"
begun=$(date +%s)
left() { python3 -c "print(max(0.1, $MINUTES - ($(date +%s) - $begun) / 60))"; } # minutes

site=${SITE:-/tmp/ab_jax_site}
python3 -m tarfile --filter data -e .gpu/packages.tar.xz "$site" || exit
export PYTHONPATH="$site:$PWD" PYTHONUNBUFFERED=1
export TFDS_DATA_DIR=${TFDS_DATA_DIR:-/tmp/ab_jax_data}
AB_JAX_REVISION=$(cat .gpu/revision) && export AB_JAX_REVISION # for there may be no git
python3 - << 'PY' || exit
import os, sys, jax
print("JAX", jax.__version__, jax.devices())
if jax.default_backend() == "cpu" and os.environ.get("JAX_PLATFORMS") != "cpu":
    sys.exit("error: JAX finds no GPU; a rehearsal without one wants JAX_PLATFORMS=cpu")
PY
mkdir -p "$OUT"
command -v nvidia-smi > /dev/null &&
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv > "$OUT/gpu.txt"

if [ "$NAME" = benchmarks ]; then
  mkdir -p results/gpu
  for batch in ${BATCHES:-512 2048}; do # AB over float; SIZE holds further flags, for a rehearsal
    timeout "$(left)m" python3 -m benchmarks.step --batch_size="$batch" --dtype=bfloat16 \
      --steps "float" "float, again" "STE, 1 bit" "AB, 1 bit" $SIZE --out="results/gpu/step$batch.json"
  done
  for name in bfloat16_step device_integers; do
    timeout "$(left)m" python3 -m "benchmarks.$name" $SIZE --out="results/gpu/$name.json"
  done
  timeout "$(left)m" python3 -m benchmarks.peers $SIZE --out=results/gpu/peers.json
  tar czf "$OUT/benchmarks.tar.gz" results/gpu
  exit
fi

file=studies/$NAME.toml form=in_turn # its layers are wide enough to fill a GPU each
if [ "$NAME" = resnet20_full_size ]; then form=auto; fi
if [ -n "$CHANGES" ]; then
  python3 - "$STUDY" "$NAME" $CHANGES << 'PY' || exit
import sys
from pathlib import Path

study, name, *changes = sys.argv[1:]
target, mark = Path(f"studies/{name}.toml"), f"# {study} with {' '.join(changes)}"
if target.exists() and not target.read_text().startswith("# "):
    sys.exit(f"error: there is a study {name}: CHANGES make another one, of another NAME")
flags = dict(change.split("=", 1) for change in changes)
lines = Path(f"studies/{study}.toml").read_text().splitlines()
lines = [line for line in lines if line.partition(" = ")[0] not in flags]
at = lines.index("[flags]") + 1
lines[at:at] = [f"{flag} = {value}" for flag, value in flags.items()]
target.write_text("\n".join([mark, *lines, ""]))
PY
fi
TQDM_DISABLE=1 python3 -m ab_jax.data.prepare cifar10_jpeg --source=.gpu/cifar10_jpeg.tar.xz || exit
python3 gpu/whole_seeds.py "$file" --seeds="$SEEDS" --together="$TOGETHER" --form="${FORM:-$form}" \
  --minutes="$(left)" --out="$OUT"
