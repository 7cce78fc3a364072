#!/bin/sh
# The GPUs of several machines. On each of them: HEAD=ADDRESS NODES=2 several-nodes.sh RECIPE [options of prefmix train].
# HEAD is the address of one of the machines, where they meet on PORT. The folder of the run lies on a disk that all share.
set -eu
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}" # threads of each process
# What is wrong with the recipe is told here, by one process; the token ids are made.
prefmix train "$@" --dry-run --quiet > /dev/null
exec torchrun --nnodes="$NODES" --nproc-per-node="${PROCESSES:-gpu}" \
  --rdzv-backend=c10d --rdzv-id=prefmix --rdzv-endpoint="$HEAD:${PORT:-29500}" -m prefmix train "$@"
