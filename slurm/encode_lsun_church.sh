#!/usr/bin/env bash
# LSUN churches 256 px: encoding to latent shards alone.
#   sbatch slurm/encode_lsun_church.sh [section.field=value ...]      or, on a login node: bash slurm/encode_lsun_church.sh ...
# Submits the real jobs, each after the one before it, and ends; the same command again goes on. --dry-run prints them.
#SBATCH --job-name=fpdm-launch --ntasks=1 --cpus-per-task=1 --mem=4G --time=00:30:00 --output=fpdm-launch-%j.out
set -euo pipefail
for clone in "$(dirname "$0")/.." "${SLURM_SUBMIT_DIR:-.}"; do # sbatch runs a copy of this file, from elsewhere
    if [ -f "$clone/slurm/launch.sh" ]; then
        exec bash "$clone/slurm/launch.sh" "$clone" --config recipes/lsun_church256.yaml --stages encode "$@"
    fi
done
echo "error: $PWD is no clone of this project (no slurm/launch.sh); cd to the clone and sbatch slurm/encode_lsun_church.sh" >&2
exit 2
