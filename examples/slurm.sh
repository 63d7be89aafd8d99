#!/bin/bash
# Pre-fine-tune on 2 nodes of 8 GPUs under Slurm:  sbatch examples/slurm.sh
#
# Slurm sends SIGTERM two minutes before the time is over (or when the job is preempted); every rank
# then finishes its step, a checkpoint is written, and embkit ends with 75. The job puts itself back
# into the queue and goes on from there, bit for bit.
#SBATCH --job-name=embkit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=embkit-%j.log
set -u

# One file system for all nodes: the store is read, and checkpoints are written, by every rank.
store=${STORE:-$HOME/data/store}
out=${OUT:-$HOME/runs/pre}
recipe=${RECIPE:-recipe.toml}

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # without it a restarted job can hang

srun --kill-on-bad-exit=1 \
  torchrun --nnodes="$SLURM_NNODES" --nproc-per-node=8 \
  --rdzv-backend=c10d --rdzv-endpoint="$head_node:29500" --rdzv-id="$SLURM_JOB_ID" \
  -m embkit prefinetune "$store" --out "$out" --recipe "$recipe" \
  --set prefinetune.checkpoint_every=500 --set prefinetune.watch.background=true &
step=$!
# The shell waits beside srun, so that a signal to the batch script does not end it first.
trap 'wait "$step"' TERM
wait "$step"
code=$?

# torchrun reports any worker that ended early as 1; the checkpoint's state says whether it was
# preempted, which is the only case that belongs back into the queue.
latest=$(ls -td "$(dirname "$out")/.partial-$(basename "$out")-"*/checkpoints/step-* 2>/dev/null | head -n 1)
if [ "$code" -ne 0 ] && [ -n "$latest" ] && grep -q '"preempted":true' "$latest/state.json"; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
