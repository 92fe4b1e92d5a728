#!/usr/bin/env bash
# BinaryNet at full size (width 1, 32 x 32, 1-bit weights) on one GPU, in MINUTES: float starts, trials
# on validation images, then STE, AB and PARQ on fresh paired seeds. Every stage ends in time and
# leaves its records; the same command goes on where the last one stopped, if runs/ is still there.
#   does it run?   NAME=smoke MINUTES=1 EPOCHS=1 SEEDS=0 OUT=DIRECTORY bash .gpu/run.sh
#   the study      OUT=DIRECTORY bash .gpu/run.sh
#   a rehearsal    NAME=toy MINUTES=3 EPOCHS=0.02 SEEDS=0 WIDTH=0.03 EXTRA=--image_size=8 OUT=DIRECTORY ...
# EXTRA holds further flags of all runs.
set -uo pipefail
: "${OUT:?a directory for what comes back}" "${NAME:=binarynet_full_size}" "${MINUTES:=8}"
: "${EPOCHS:=10}" "${SEEDS:=0..2}" "${JOBS:=3}" "${WIDTH:=1}" "${EXTRA:=}"
deadline=$(($(date +%s) + $(python3 -c "print(int(60 * $MINUTES))")))
left() { echo $((deadline - $(date +%s))); }

site=${SITE:-/tmp/ab_jax_site}
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" \
  .gpu/wheels/*.whl || exit 1
export PYTHONPATH="$site:$PWD" PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false
export TFDS_DATA_DIR=${TFDS_DATA_DIR:-/tmp/ab_jax_data}
python3 -c "import jax, flax, optax, orbax.checkpoint, pydantic; print(jax.__version__, jax.devices())" || exit 1
[ -d "$TFDS_DATA_DIR/cifar10_jpeg" ] ||
  python3 -m ab_jax.data.prepare cifar10_jpeg --source=.gpu/cifar10_jpeg.tar.xz || exit 1

runs=runs/$NAME records=results/$NAME
common=(--network=binarynet --weights=binary --dataset=cifar10_jpeg --width="$WIDTH" --dtype=bfloat16
  --batch_size=512 --epochs="$EPOCHS" --eval_every=5 --keep_checkpoints=1 --parallel=shard_map)
sweep() { # a stage's name, then flags of its runs
  local stage=$1
  shift
  [ "$(left)" -gt 20 ] || { echo "$stage: no time left"; return; }
  timeout -s INT -k 20 "$(left)" python3 -m experiments.sweep train --jobs="$JOBS" --cores_per_job=0 \
    --runs_dir="$runs" --keep="$records" -- "${common[@]}" "$@" $EXTRA
  echo "$stage: $(find "$records/$stage" -name '*.json' 2>/dev/null | wc -l) records, $(left) s left"
}
trials() { # a method, then its rates and other flags
  local method=$1 rates=$2
  sweep trials --method="$method" --learning_rate="$rates" --seed=100 --no_read_test \
    "--init_from=$runs/start/seed{seed}" '--name=trials/{method}_lr{learning_rate}' "${@:3}"
}
best() { # the rate that validation images prefer
  python3 - "$1" "$records" <<'PY'
import glob, json, sys
runs = [json.load(open(file)) for file in glob.glob(f"{sys.argv[2]}/trials/{sys.argv[1]}_lr*.json")]
best = max(runs, key=lambda run: run["summary"]["validation"]["quantized_recalibrated"], default=None)
print(best["config"]["learning_rate"] if best else {"ste": 0.2, "ab": 0.8, "parq": 0.2}[sys.argv[1]])
PY
}
parq=(--ramp=sigmoid --ramp_stop=0.5)

sweep start --method=float --learning_rate=0.2 --seed=100 --no_read_test '--name=start/seed{seed}'
trials ste 0.1,0.2,0.4
trials ab 0.2,0.4,0.8
trials parq 0.1,0.2,0.4 "${parq[@]}"
sweep start --method=float --learning_rate=0.2 --seed="$SEEDS" '--name=start/seed{seed}'
for method in ste ab parq; do
  more=()
  [ $method = parq ] && more=("${parq[@]}")
  sweep final --method=$method --learning_rate="$(best $method)" --seed="$SEEDS" \
    "--init_from=$runs/start/seed{seed}" '--name=final/{method}_seed{seed}' "${more[@]}"
done

mkdir -p "$OUT"
tar czf "$OUT/$NAME.tar.gz" "$records"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader > "$OUT/gpu.txt" 2>/dev/null
echo "$(find "$records" -name '*.json' | wc -l) records in $OUT/$NAME.tar.gz"
