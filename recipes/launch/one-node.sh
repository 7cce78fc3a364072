#!/bin/sh
# All GPUs of this machine: one-node.sh RECIPE [options of prefmix train]. PROCESSES=2 takes two of them.
set -eu
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}" # threads of each process
# What is wrong with the recipe is told here, by one process; the token ids are made.
prefmix train "$@" --dry-run --quiet > /dev/null
exec torchrun --standalone --nproc-per-node="${PROCESSES:-gpu}" -m prefmix train "$@"
