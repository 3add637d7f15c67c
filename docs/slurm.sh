#!/bin/bash
# Clips of a prompts file, or latents of shards, by every GPU of a Slurm allocation. The same command
# goes on where a job ended: what is written is kept.
#
#     sbatch docs/slurm.sh generate --prompts prompts.txt --out clips/
#     sbatch docs/slurm.sh precompute "raw/clips-*.tar" latents/ --pipeline FOLDER
#
# The folders lie on a file system that all nodes share; the virtual environment too.
#SBATCH --job-name=gentron
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --output=%x-%j.log
set -euo pipefail

case ${1:-} in
    generate) module=gentron_fast.generate ;;
    precompute) module=gentron_train.precompute ;;
    *) echo "usage: sbatch $0 generate|precompute OPTIONS" >&2; exit 2 ;;
esac
shift
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK

# srun numbers the processes (SLURM_PROCID); each makes its share. One that fails ends no other.
srun --kill-on-bad-exit=0 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    "${GENTRON_PYTHON:-.venv/bin/python}" -m "$module" "$@"
