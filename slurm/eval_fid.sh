#!/usr/bin/env bash
# Samples from a trained run, their distance to the training images, and the report.
#   sbatch slurm/eval_fid.sh --config recipes/imagenet256.yaml [section.field=value ...]      or, on a login node: bash slurm/eval_fid.sh ...
# Submits the real jobs, each after the one before it, and ends; the same command again goes on. --dry-run prints them.
#SBATCH --job-name=fpdm-launch --ntasks=1 --cpus-per-task=1 --mem=4G --time=00:30:00 --output=fpdm-launch-%j.out
set -euo pipefail
for clone in "$(dirname "$0")/.." "${SLURM_SUBMIT_DIR:-.}"; do # sbatch runs a copy of this file, from elsewhere
    if [ -f "$clone/slurm/launch.sh" ]; then
        exec bash "$clone/slurm/launch.sh" "$clone" --stages sample,evaluate,report "$@"
    fi
done
echo "error: $PWD is no clone of this project (no slurm/launch.sh); cd to the clone and sbatch slurm/eval_fid.sh" >&2
exit 2
