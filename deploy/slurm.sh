#!/bin/bash
# Two nodes of eight GPUs: sbatch deploy/slurm.sh [RECIPE] [--section.key VALUE ...]
# Slurm starts the ranks, so that its signals reach them: ten minutes before the limit every rank writes a
# checkpoint and the job is put back into the queue. Not measured: this script was not run.
#SBATCH --job-name=geo_r1
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@600
set -euo pipefail

run_dir="${RUN_DIR:-runs/$SLURM_JOB_NAME}"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=29500

# shellcheck disable=SC2016  # each task expands its own variables
srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec python -m geo_r1.train "$@"' rank "${@:-geo_r1_7b}" --run.dir "$run_dir"

# The exit code is 0 after a stop, too; a run that is done has a report.
test -e "$run_dir/report.html" || scontrol requeue "$SLURM_JOB_ID"
