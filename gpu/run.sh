#!/usr/bin/env bash
# BinaryNet at full size (width 1, 32 x 32, 1-bit weights) on one GPU without network, in MINUTES: float
# starts, trials on validation images, then STE, AB and PARQ on fresh paired seeds. It is a study as
# those in studies/, run seed by seed, for networks are lost with the machine and only whole seeds are
# of use: their records and those of trials come back in OUT. What lies under results/NAME already is
# not trained again, also on a fresh machine.
#   does it run?   NAME=smoke MINUTES=4 EPOCHS=1 SEEDS=0 OUT=DIRECTORY bash .gpu/run.sh
#   the study      OUT=DIRECTORY bash .gpu/run.sh
#   a rehearsal    JAX_PLATFORMS=cpu NAME=toy EPOCHS=0.02 WIDTH=0.03 EXTRA=--image_size=8 JOBS=1 ...
# EXTRA holds further flags of all runs, each as --flag=value.
set -uo pipefail
: "${OUT:?a directory for what comes back}" "${NAME:=binarynet_full_size}" "${MINUTES:=8}"
: "${EPOCHS:=10}" "${SEEDS:=0..2}" "${JOBS:=3}" "${WIDTH:=1}" "${EXTRA:=}"
end=$(($(date +%s) + $(python3 -c "print(int(60 * $MINUTES))")))
left() { echo $((end - $(date +%s))); }

flags=${EXTRA//--/$'\n'} # as lines of that file
study() { # the study's file, of these seeds
  cat << TOML
about = """
BinaryNet at full size with 1-bit weights on one GPU: AB against STE and PARQ.

Each method goes on from the float network of its seed. Rates are chosen on validation images of seed
100; the test set is read once.
"""

[flags]
network = "binarynet"
weights = "binary"
dataset = "cifar10_jpeg"
width = $WIDTH
dtype = "bfloat16"
batch_size = 512
epochs = $EPOCHS
warmup = $(python3 -c "print($EPOCHS / 10)")
eval_every = 5.0
keep_checkpoints = 1
parallel = "shard_map"
$flags

[[stages]]
name = "start"
run_name = "seed{seed}"
method = "float"
learning_rate = 0.2
[[stages.runs]]
seeds = 100
read_test = false
[[stages.runs]]
seeds = "$1"

[[stages]]
name = "trials"
seeds = 100
run_name = "{method}_lr{learning_rate}"
init_from = "start/seed{seed}"
read_test = false
[[stages.runs]]
method = "ste"
learning_rate = [0.1, 0.2, 0.4]
[[stages.runs]]
method = "ab"
learning_rate = [0.2, 0.4, 0.8]
[[stages.runs]]
method = "parq"
ramp = "sigmoid"
ramp_stop = 0.5
learning_rate = [0.1, 0.2, 0.4]

[[stages]]
name = "final"
seeds = "$1"
run_name = "{method}_seed{seed}"
init_from = "start/seed{seed}"
learning_rate = "chosen"
choose = { from = "trials", flags = ["learning_rate"] }
[[stages.runs]]
method = ["ste", "ab"]
[[stages.runs]]
method = "parq"
ramp = "sigmoid"
ramp_stop = 0.5
TOML
}

file=studies/$NAME.toml runs=runs/$NAME records=results/$NAME
keep() { # copies the records of these runs, if all are there
  local run
  for run in "$@"; do [ -f "$runs/$run/record.json" ] || return; done
  for run in "$@"; do install -D -m 644 "$runs/$run/record.json" "$records/$run.json"; done
}
pack() {
  local trial
  for trial in "$runs"/trials/*; do keep "trials/${trial##*/}"; done
  study "$SEEDS" > "$file"
  mkdir -p "$OUT" "$runs" "$records"
  tar czf "$OUT/$NAME.tar.gz" "$file" "$records"
  find "$runs" -name log.txt -print0 | tar czf "$OUT/$NAME.logs.tar.gz" --null -T -
  command -v nvidia-smi > /dev/null &&
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv > "$OUT/gpu.txt"
  echo "$(find "$records" -name '*.json' | wc -l) records in $OUT/$NAME.tar.gz, $(left) s left"
}

site=${SITE:-/tmp/ab_jax_site}
python3 -m tarfile --filter data -e .gpu/packages.tar.xz "$site" || exit
export PYTHONPATH="$site:$PWD" PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false
export TFDS_DATA_DIR=${TFDS_DATA_DIR:-/tmp/ab_jax_data}
AB_JAX_REVISION=$(cat .gpu/revision) && export AB_JAX_REVISION # for there may be no git
python3 - << 'PY' || exit
import os, sys, jax
print("JAX", jax.__version__, jax.devices())
if jax.default_backend() == "cpu" and os.environ.get("JAX_PLATFORMS") != "cpu":
    sys.exit("error: JAX finds no GPU; a rehearsal without one wants JAX_PLATFORMS=cpu")
PY
TQDM_DISABLE=1 python3 -m ab_jax.data.prepare cifar10_jpeg --source=.gpu/cifar10_jpeg.tar.xz || exit

# Records alone count as done. That of seed 100's start is kept once no trial needs its network.
for record in "$records"/trials/*.json "$records/start/seed100.json"; do
  run=${record#"$records/"} run=$runs/${run%.json}
  [ -f "$record" ] && [ ! -e "$run" ] && install -D "$record" "$run/record.json"
done

trap pack EXIT
tried() { find "$runs/trials" -name record.json 2> /dev/null | wc -l; }
needed=20 # seconds of a seed, as the last one without trials took
for seed in $(for part in ${SEEDS//,/ }; do seq "${part%..*}" "${part#*..}"; done); do
  [ -f "$records/start/seed$seed.json" ] && echo "seed $seed is there already" && continue
  [ "$(left)" -gt "$needed" ] || { echo "seed $seed has to wait: $(left) s are left"; exit 75; }
  begun=$(date +%s) before=$(tried)
  study "$seed" > "$file"
  timeout -k 20 "$(left)" python3 -m experiments.study "$file" --jobs="$JOBS" --cores_per_job=0 \
    --stop_after=10 --results=
  keep "start/seed$seed" final/{ste,ab,parq}_seed"$seed" start/seed100 ||
    { echo "seed $seed is not whole, $(left) s are left"; exit 75; }
  [ "$(tried)" -gt "$before" ] || needed=$(($(date +%s) - begun))
  pack # in case that somebody else ends it all
done
