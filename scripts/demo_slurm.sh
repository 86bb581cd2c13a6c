#!/usr/bin/env bash
# The demo through SLURM: submits it with slurm/train_demo.sh, and shows its jobs until none is left.
# Run inside a cluster; `make demo-slurm` makes one. Arguments are overrides, such as train.total_samples=81920.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 # two training processes share this machine's cores
run=runs/demo-slurm
log=$(mktemp)
trap 'rm -f "$log"' EXIT
sbatch --wait --output="$log" slurm/train_demo.sh name=demo-slurm launch.jobs=2 "$@" || failed=1
cat "$log"
[ -z "${failed:-}" ] || exit 1
while [ -n "$(squeue --noheader)" ]; do
    sleep 20
    echo
    .venv/bin/python slurm/status.py "$run" --lines 0
done
.venv/bin/python slurm/status.py "$run"
if [ ! -f "$run/report.html" ]; then
    echo "error: no report came out; see the jobs above, and the logs in $run/logs" >&2
    exit 1
fi
echo "report: $run/report.html"
