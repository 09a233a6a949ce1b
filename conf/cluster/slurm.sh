#!/bin/bash
# sbatch conf/cluster/slurm.sh experiment=demo
# sbatch --nodes 1 --gpus-per-node 2 conf/cluster/slurm.sh experiment=demo launch=experts
#
# Train on all GPUs of all machines that Slurm gives. Submit it in the repository's folder, which all
# machines must see, with the settings of the run as arguments. The same command goes on with a run.
#SBATCH --job-name=wan-lora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue

set -euo pipefail
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export FIRST="$first" PORT=$((20000 + SLURM_JOB_ID % 20000))
export GPUS="${SLURM_GPUS_ON_NODE:?ask Slurm for GPUs, as --gpus-per-node does}"

# When a process fails anywhere, Slurm ends those on all machines at once.
srun --kill-on-bad-exit=1 bash -c '
  exec accelerate launch --multi_gpu --mixed_precision no --dynamo_backend no \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * GPUS))" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$FIRST" --main_process_port "$PORT" \
    train/lora.py "$@"
' train "$@"
