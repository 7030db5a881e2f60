#!/usr/bin/env bash
# One run on several nodes under SLURM: sbatch scripts/slurm.sh RECIPE|FILE.toml [--section.key VALUE ...]
#
# Ten minutes before the time limit, and on pre-emption, SLURM sends SIGTERM: the ranks finish their step, save, and the
# job goes back into the queue, to continue from there. LUFFY_PYTHON: the environment's python. LUFFY_RANKS: ranks on
# each node (default: one for each GPU). LUFFY_PORT: on the first node, reachable from the others.
#SBATCH --job-name=luffy
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=luffy-%j.log
set -euo pipefail

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
    echo "usage: sbatch scripts/slurm.sh RECIPE|FILE.toml [--run-dir DIR] [--section.key VALUE ...]"
    exit 0
fi

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
code=0
# One launcher a node. When one of them fails the others know by themselves, and say why.
srun "${LUFFY_PYTHON:-python}" -m luffy train "$@" --resume auto \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${LUFFY_RANKS:-gpu}" \
    --rdzv-endpoint "$first:${LUFFY_PORT:-29400}" --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    --max-restarts 1 --stopped-exit 75 || code=$?

if [[ $code -eq 75 ]]; then # stopped by SIGTERM, saved
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
