#!/bin/bash
# ResNet-50 on ImageNet in Slurm, on hosts of eight GPUs. Edit the three places marked EDIT, then:
#
#     sbatch docs/slurm.sh
#
# The same command again goes on from the last checkpoint; a job that is stopped at its time limit
# puts itself into the queue again. (For the many small runs of a study: docs/pod.md, "A study".)

# EDIT 1: which machines, how many, for how long; a process for each GPU.
#SBATCH --partition=gpu
#SBATCH --nodes=2
#SBATCH --gres=gpu:8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120

#SBATCH --job-name=ab_jax
#SBATCH --output=%x-%j.log
set -euo pipefail

# EDIT 2: the clone, its environment, and two directories that every host sees.
cd "$HOME/ab_jax"
source .venv/bin/activate
DATA=/shared/data
RUNS=/shared/runs

# Tasks must see all GPUs of their host (no --gpus-per-task): each takes the one of its own number.
# EDIT 3: the experiment and its flags. The batch is that of all GPUs together.
srun python -m experiments.resnet50_imagenet --distributed \
    --dataset=imagenet2012 --data_dir="$DATA" --workers=10 \
    --runs_dir="$RUNS" --name=resnet50/slurm \
    --network=resnet50_v1 --method=ab --weights=int4 --act_bits=4 \
    --batch_size=1024 --dtype=bfloat16 || {
    code=$?
    if [ $code -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi # stopped, and all is saved
    exit $code
}
